"""Run as ``python -m finetune.export.gguf_runtime``: opens a GGUF in llama.cpp as its card says, and writes down what it gives."""

from __future__ import annotations

import importlib.metadata
import json
import os
import runpy
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import ExportError
from finetune.export.gguf.library import Model
from finetune.export.parity import POSITIONS
from finetune.inference.fresh_process import serve_request
from finetune.inference.rows import IGNORED

SLOTS = 4
"""Answers that the server writes at a time: a choice. One pass over the weights gives a token of each, and each holds a cache."""


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Runs the card's snippet in the folder of the exports: its server writes chats and an answer, its library gives logits.

    Returns:
        ``chat_tokens``, ``losses``, ``stopped``, ``answers``, ``answer_seconds`` and ``runtime``; the logits go into a file.
    """
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "passive"
    )  # where others compute too, llama.cpp's threads would wait by spinning
    os.chdir(request["folder"])
    names = runpy.run_path(request["snippet"])
    params, server = names.pop("params"), names.pop("server")
    tokens = [_chat_tokens(server, messages) for messages in request["chats"]]
    written = server.handle_completions(
        {"prompt": request["ending"], "max_tokens": request["max_new_tokens"], "temperature": 0.0}
    )  # fmt: skip
    del server
    adapters = [Path(one.path) for one in params.lora_adapters]
    longest = max(len(text) for text in [*request["prompts"], *[row["input_ids"] for row in request["rows"]]])
    model = Model(
        Path(params.model.path), adapter=adapters[0] if adapters else None, context=longest, threads=request["threads"]
    )
    _check_ends(model, request["ends"])
    logits = {f"prompt_{number}": _last_logits(model, prompt) for number, prompt in enumerate(request["prompts"])}
    np.savez(Path(request["logits"]), **logits)  # type: ignore[arg-type]
    losses = [_loss(model, row) for row in request["rows"]]
    model.close()
    started = time.monotonic()
    answers = _answers(params, request["asked"], threads=request["threads"]) if request["asked"]["prompts"] else []
    seconds = time.monotonic() - started
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in request["packages"])
    stopped = written["choices"][0]["finish_reason"] == "stop"
    told = {"answers": answers, "answer_seconds": seconds, "runtime": versions}
    return {"chat_tokens": tokens, "losses": losses, "stopped": stopped, **told}


def _answers(params: Any, asked: dict[str, Any], *, threads: int) -> list[dict[str, Any]]:
    """Greedy answers, as the card's settings give them, in a server that has room for the longest."""
    from xllamacpp import Server

    room = max(map(len, asked["prompts"])) + asked["max_new_tokens"]
    params.n_parallel, params.n_ctx, params.cpuparams.n_threads = SLOTS, SLOTS * room, threads
    server = Server(params)
    wish = {"n_predict": asked["max_new_tokens"], "temperature": 0, "cache_prompt": False, "return_tokens": True}
    with ThreadPoolExecutor(SLOTS) as pool:
        return [
            _answer(got)
            for got in pool.map(
                lambda prompt: _post(server, "/completion", {"prompt": prompt, **wish}), asked["prompts"]
            )
        ]


def _answer(got: dict[str, Any]) -> dict[str, Any]:
    if got["truncated"]:
        raise ExportError(
            f"llama.cpp cut a prompt of {got['tokens_evaluated']} tokens short, so its answer says nothing"
        )
    stopped = got["stop_type"] == "eos"
    return {"tokens": got["tokens"][:-1] if stopped else got["tokens"], "stopped": stopped}


def _chat_tokens(server: Any, messages: list[dict[str, str]]) -> list[int]:
    """As the server's own chat does it: the file's template, then the file's tokenizer."""
    prompt = _post(server, "/apply-template", {"messages": messages})["prompt"]
    tokens: list[int] = _post(server, "/tokenize", {"content": prompt, "add_special": True, "parse_special": True})[
        "tokens"
    ]
    return tokens


def _post(server: Any, path: str, body: dict[str, Any]) -> dict[str, Any]:
    asked = urllib.request.Request(
        server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it listens on this machine
    with opener.open(asked) as found:
        got: dict[str, Any] = json.load(found)
    return got


def _check_ends(model: Model, ends: list[int]) -> None:
    lost = [end for end in ends if not model.ends(end)]
    if lost:
        raise ExportError(
            f"llama.cpp would talk on after the tokens {lost}, which end an answer: a GGUF has room for three"
        )


def _last_logits(model: Model, prompt: list[int]) -> np.ndarray:
    positions = range(max(len(prompt) - POSITIONS, 0), len(prompt))
    return np.stack([row.copy() for row in model.logits(prompt, positions)])


def _loss(model: Model, row: dict[str, list[int]]) -> list[float]:
    """``[nats, trained tokens]`` of a held-out row."""
    labels = row["labels"]
    positions = [number - 1 for number in range(1, len(labels)) if labels[number] != IGNORED]
    nats = 0.0
    for position, logits in zip(positions, model.logits(row["input_ids"], positions), strict=True):
        numbers = logits.astype(np.float64)
        largest = numbers.max()
        nats += largest + np.log(np.exp(numbers - largest).sum()) - numbers[labels[position + 1]]
    return [float(nats), len(positions)]


if __name__ == "__main__":
    serve_request(ask)
