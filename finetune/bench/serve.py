"""`finetune bench serve`: a run's models under load, next to `transformers serve`, vLLM and llama.cpp's own server.

Each server is a process of its own, and one after the other is asked the same by the same clients.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from finetune.bench.load import Load, LoadResult, Messages, measure_load
from finetune.console import log
from finetune.errors import ConfigError
from finetune.serve.artifacts import Artifacts, find_artifacts, served_name
from finetune.serve.page import read_samples
from finetune.serve.upstream import free_port

START_SECONDS = 300
TOPICS = ("rivers", "copper", "the moon", "bread", "chess", "whales", "clocks", "paper", "Rome", "rain")
PEERS = {"transformers serve": "merged", "vllm serve": "merged", "llama.cpp's server": "gguf"}
"""Servers of others, each with the model that it is asked for; the same is served by this project."""

PEER_MEMORY = 0.2
"""Share of the free memory for the cache of `transformers serve`, whose own default on a CPU is 0.6: a choice. It
computes in the dtype of the training, as this project's server does."""

LLAMA_CPP = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.n_parallel, params.n_ctx, params.verbosity = 4, 4 * 2048, -1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[3])
server = xllamacpp.Server(params)
time.sleep(10**6)
"""
"""llama.cpp's HTTP server, as its binding has it, with the four slots that `finetune serve` gives it."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A server to measure.

    Attributes:
        command: Starts it; ``{port}`` is replaced.
        model: Name in the requests.
    """

    command: list[str]
    model: str


def compare_servers(target: Path, *, clients: int, seconds: int, max_tokens: int) -> None:
    """Prints a table and one line of JSON.

    Args:
        target: Folder of a run or of an export, or a GGUF file.
        clients: Number of clients at the same time.
        seconds: Time under load for each server.
        max_tokens: Length of an answer at most.

    Raises:
        ConfigError: There is nothing to serve, or a server does not start.
    """
    results: dict[str, LoadResult] = {}
    for name, contender in contenders(target, find_artifacts(target)).items():
        with started(name, contender) as (url, pid):
            load = Load(
                url=url,
                model=contender.model,
                questions=questions(target),
                clients=clients,
                seconds=seconds,
                max_tokens=max_tokens,
                pid=pid,
            )
            results[name] = asyncio.run(measure_load(load))
        log("bench", _line(name, results[name]))
    summary = {name: asdict(result) | {"errors": len(result.errors)} for name, result in results.items()}
    sys.stdout.write(json.dumps(summary | {"ratios": ratios(results)}) + "\n")


def questions(target: Path) -> list[Messages]:
    """Returns the held-out chats of a run, which its model answers with confidence; else questions about anything."""
    chats = [sample["messages"] for sample in read_samples(target)]
    return chats or [[{"role": "user", "content": f"Tell me a fact about {topic}."}] for topic in TOPICS]


def contenders(target: Path, artifacts: Artifacts) -> dict[str, Contender]:
    """Returns the servers to measure: each model of a run in ours, and those of others that can serve one of them."""
    finetune = [sys.executable, "-m", "finetune", "serve", str(target), "--port", "{port}", "--models"]
    kinds = [kind for kind in artifacts.kinds() if kind != "base"]
    found = {
        f"finetune serve, {kind}": Contender(command=[*finetune, kind], model=served_name(artifacts, kind, [kind]))
        for kind in kinds
    }
    threads = str(os.cpu_count() or 1)
    if artifacts.merged:
        folder = str(artifacts.merged)
        script = str(Path(sys.executable).with_name("transformers"))
        record = json.loads((artifacts.merged / "finetune.json").read_text(encoding="utf-8"))
        command = [script, "serve", folder, "--continuous-batching", "--port", "{port}", "--device", "cpu"]
        command += ["--dtype", record["computation"]["dtype"], "--cb-max-memory-percent", str(PEER_MEMORY)]
        found["transformers serve"] = Contender(command=command, model=folder)
        if shutil.which("vllm"):
            command = ["vllm", "serve", folder, "--port", "{port}", "--dtype", record["computation"]["dtype"]]
            found["vllm serve"] = Contender(command=command, model=folder)
    if artifacts.gguf:
        command = [sys.executable, "-c", LLAMA_CPP, str(artifacts.gguf), "{port}", threads]
        found["llama.cpp's server"] = Contender(command=command, model="gguf")
    return found


def ratios(results: dict[str, LoadResult]) -> dict[str, float]:
    """Returns the tokens per second under load of this project's server over those of another with the same model."""
    return {
        peer: round(results[f"finetune serve, {kind}"].tokens_per_second / results[peer].tokens_per_second, 2)
        for peer, kind in PEERS.items()
        if peer in results and results[peer].tokens_per_second
    }


@contextmanager
def started(name: str, contender: Contender) -> Iterator[tuple[str, int]]:
    """Starts a server and yields its address and process id once it answers.

    Raises:
        ConfigError: It ended, or did not answer in time; the message has the end of its log.
    """
    port = free_port()
    command = [word.replace("{port}", str(port)) for word in contender.command]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            ends = time.monotonic() + START_SECONDS
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > ends:
                    output.seek(0)
                    raise ConfigError(f"bench serve: {name} does not start: {output.read()[-500:].strip()}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()
            process.wait()


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _line(name: str, result: LoadResult) -> str:
    first = "-" if result.first_token_seconds is None else f"{result.first_token_seconds:.1f} s"
    speeds = f"{result.tokens_per_second_one:6.1f} tokens/s alone, {result.tokens_per_second:6.1f} together"
    checked = f"{result.answers} answers, {result.mixed_up} mixed up, {len(result.errors)} errors"
    return f"{name:24} {speeds}, first token after {first}, {checked}, {result.resident_mib_most} MiB"
