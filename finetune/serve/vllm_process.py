"""Starts vLLM's own server as a child process: on this machine's own address, with a key of its own."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from finetune.console import log
from finetune.errors import ConfigError, ModelError
from finetune.serve.config import MIB, ServeConfig
from finetune.serve.upstream import Upstream, UpstreamError, free_port

PROGRAM = "vllm"
START_SECONDS, END_SECONDS, POLL_SECONDS = 1800, 30, 0.5
"""Time to load and compile a large model, and to end: choices."""

PDEATHSIG = 1
"""Source: linux/prctl.h."""

LOG_CHARACTERS = 1500
"""Of vLLM's log, in the message where it does not start: a choice."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank. Source: vllm 0.32, config/lora.py."""

LOADED_ADAPTERS = 4
"""Adapters that one batch of vLLM may mix where clients load more: a choice. Each reserves memory."""


@dataclass(frozen=True, kw_only=True)
class VllmModel:
    """What vLLM serves.

    Attributes:
        weights: Folder of the base or of the merged model.
        tokenizer: Folder of the tokenizer of the training.
        name: What the weights are called.
        dtype: In which it computes.
        adapter: Name and folder of a LoRA adapter of these weights; None for none.
        rank: Largest rank of the adapter.
    """

    weights: Path
    tokenizer: Path
    name: str
    dtype: str
    adapter: tuple[str, Path] | None = None
    rank: int = 0


def missing_vllm() -> list[str]:
    """Returns a sentence where there is no vLLM."""
    if shutil.which(PROGRAM):
        return []
    return [
        "serve --engine vllm: there is no program vllm on PATH; install it in an environment of its own, since it "
        "needs other versions: python -m venv ~/vllm && ~/vllm/bin/pip install vllm, then start with "
        "PATH=$PATH:~/vllm/bin"
    ]


def vllm_command(model: VllmModel, config: ServeConfig, *, port: int) -> list[str]:
    """Returns the words that start vLLM.

    Raises:
        ModelError: The adapter's rank is larger than vLLM takes.
    """
    flags = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--served-model-name": model.name,
        "--tokenizer": str(model.tokenizer),
        "--dtype": model.dtype,
        "--max-model-len": "auto",
        "--max-num-seqs": str(config.concurrent),
        "--kv-cache-memory-bytes": str(config.cache_mib * MIB),
        "--generation-config": "vllm",  # no sampling settings of the checkpoint: a request's own are sent
        "--uvicorn-log-level": "warning",
    }
    words = [word for flag in flags.items() for word in flag]
    command = [PROGRAM, "serve", str(model.weights), *words, "--disable-uvicorn-access-log", "--disable-log-stats"]
    if model.adapter is None:
        return command
    rank = next((rank for rank in RANKS if rank >= model.rank), None)
    if rank is None:
        raise ModelError(
            f"{model.adapter[1]}: vLLM takes adapters of rank {RANKS[-1]} at most; this one has {model.rank}. "
            "Serve the merged model (--models merged), or leave out --engine vllm"
        )
    name, folder = model.adapter
    loras = str(1 if config.adapters is None else LOADED_ADAPTERS)
    limits = ["--enable-lora", "--max-loras", loras, "--max-lora-rank", str(rank)]
    return [*command, *limits, "--lora-modules", f"{name}={folder}"]


class VllmProcess:
    """A running vLLM.

    Args:
        command: Starts it.
        port: Where it will listen.
        with_adapters: Whether adapters may be loaded while it runs.

    Attributes:
        server: Answers requests.

    Raises:
        ModelError: It ended, or does not answer in time; the message has the end of its log.
    """

    def __init__(self, command: Sequence[str], *, port: int, with_adapters: bool) -> None:
        key = secrets.token_hex()
        environment = {
            **os.environ,
            "VLLM_API_KEY": key,  # other users can read a command's words, but not its environment
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1" if with_adapters else "0",
        }
        self.server = Upstream(f"http://127.0.0.1:{port}", key)
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        log("serve", f"vLLM starts, which can take minutes: {' '.join(command)}")
        # In a session of its own, so that Ctrl-C does not end it before running answers are finished.
        with self._log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def is_alive(self) -> bool:
        """Returns whether it runs and takes requests."""
        if self._process.poll() is not None:
            return False
        try:
            self.server.ask("/health")
        except UpstreamError:
            return False
        return True

    def close(self) -> None:
        """Ends vLLM and the processes that it has started."""
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()

    def _wait(self) -> None:
        ends = time.monotonic() + START_SECONDS
        while not self.is_alive():
            if self._process.poll() is not None or time.monotonic() > ends:
                words = self._log.read_text(errors="replace").strip()[-LOG_CHARACTERS:]
                raise ModelError(f"vLLM does not start; the end of its log: {words or 'empty'}")
            time.sleep(POLL_SECONDS)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _end_with_parent() -> None:
    """Lets Linux send SIGTERM to this process when the server ends in any way, so that vLLM does not keep the GPU."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGTERM)


def start_vllm(model: VllmModel, config: ServeConfig) -> VllmProcess:
    """Starts vLLM and waits until it answers.

    Raises:
        ConfigError: There is no vLLM.
        ModelError: It does not start.
    """
    problems = missing_vllm()
    if problems:
        raise ConfigError(*problems)
    port = free_port()
    return VllmProcess(vllm_command(model, config, port=port), port=port, with_adapters=config.adapters is not None)
