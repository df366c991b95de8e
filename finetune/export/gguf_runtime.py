"""Run as ``python -m finetune.export.gguf_runtime``: runs a GGUF export's snippet and writes its outputs."""

from __future__ import annotations

import json
import os
import runpy
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.errors import ExportError
from finetune.export.gguf.library import LlamaModel
from finetune.export.parity import POSITIONS, log_softmax, package_versions, save_logits
from finetune.inference.fresh_process import serve_request
from finetune.inference.rows import IGNORED

if TYPE_CHECKING:
    from xllamacpp import CommonParams, Server

SLOTS = 4
"""Parallel answers: a choice. One pass over the weights gives a token of each, and each has a cache."""


def run_snippet(request: dict[str, Any]) -> dict[str, Any]:
    """Runs the card's snippet in the folder of the exports, and queries llama.cpp's server and library.

    Returns:
        ``chat_tokens``, ``losses``, ``stopped``, ``answers``, ``answer_seconds``, ``runtime``; logits go into a file.
    """
    # llama.cpp's threads wait by spinning, which slows down other processes on the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.chdir(request["folder"])
    names = runpy.run_path(request["snippet"])
    params, server = names.pop("params"), names.pop("server")
    tokens = [_chat_tokens(server, messages) for messages in request["chats"]]
    limits = {"max_tokens": request["max_new_tokens"], "temperature": 0.0}
    completion = server.handle_completions({"prompt": request["ending"], **limits})
    del server
    adapter = next((Path(lora.path) for lora in params.lora_adapters), None)
    longest = max(map(len, [*request["prompts"], *[row["input_ids"] for row in request["rows"]]]))
    model = LlamaModel(Path(params.model.path), adapter=adapter, context=longest, threads=request["threads"])
    _check_ends(model, request["ends"])
    save_logits(Path(request["logits"]), [_last_logits(model, prompt) for prompt in request["prompts"]])
    losses = [_loss(model, row) for row in request["rows"]]
    model.close()
    wanted, started = request["answers"], time.monotonic()
    answers = parallel_answers(params, wanted, threads=request["threads"]) if wanted["prompts"] else []
    return {
        "chat_tokens": tokens,
        "losses": losses,
        "stopped": completion["choices"][0]["finish_reason"] == "stop",
        "answers": answers,
        "answer_seconds": time.monotonic() - started,
        "runtime": package_versions(request["packages"]),
    }


def parallel_answers(params: CommonParams, wanted: dict[str, Any], *, threads: int) -> list[dict[str, Any]]:
    """Returns greedy answers, with the card's settings, from a server whose context fits the longest one."""
    limit = wanted["max_new_tokens"]
    server = parallel_server(params, slots=SLOTS, tokens=max(map(len, wanted["prompts"])) + limit, threads=threads)
    return [_answer(reply) for reply in complete(server, wanted["prompts"], slots=SLOTS, n_predict=limit)]


def parallel_server(params: CommonParams, *, slots: int, tokens: int, threads: int) -> Server:
    """Opens a server that writes several answers at the same time.

    Args:
        params: The model, and how it is loaded; changed.
        slots: Parallel answers.
        tokens: Of the longest prompt with its answer.
        threads: Number of threads.
    """
    from xllamacpp import Server

    params.n_parallel, params.n_ctx, params.cpuparams.n_threads = slots, slots * tokens, threads
    return Server(params)


def complete(server: Server, prompts: Sequence[Sequence[int]], *, slots: int, **settings: Any) -> list[dict[str, Any]]:
    """Returns the server's greedy replies to prompts of token ids, in their order.

    Args:
        server: From `parallel_server`.
        prompts: Token ids.
        slots: Prompts that are sent at the same time.
        settings: Further fields of the request, such as ``n_predict``.
    """
    fields = {"temperature": 0, "cache_prompt": False, "return_tokens": True, **settings}

    def reply(prompt: Sequence[int]) -> dict[str, Any]:
        return _post(server, "/completion", {"prompt": list(prompt), **fields})

    with ThreadPoolExecutor(slots) as pool:
        return list(pool.map(reply, prompts))


def _answer(reply: dict[str, Any]) -> dict[str, Any]:
    if reply["truncated"]:
        raise ExportError(
            f"llama.cpp cut a prompt of {reply['tokens_evaluated']} tokens short, so its answer is meaningless"
        )
    stopped = reply["stop_type"] == "eos"
    return {"tokens": reply["tokens"][:-1] if stopped else reply["tokens"], "stopped": stopped}


def _chat_tokens(server: Server, messages: list[dict[str, str]]) -> list[int]:
    """Returns the token ids of the server's own chat: the file's template, then the file's tokenizer."""
    prompt = _post(server, "/apply-template", {"messages": messages})["prompt"]
    reply = _post(server, "/tokenize", {"content": prompt, "add_special": True, "parse_special": True})
    tokens: list[int] = reply["tokens"]
    return tokens


def _post(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this machine
    with opener.open(request) as response:
        reply: dict[str, Any] = json.load(response)
    return reply


def _check_ends(model: LlamaModel, ends: list[int]) -> None:
    lost = [end for end in ends if not model.ends_at(end)]
    if lost:
        raise ExportError(
            f"llama.cpp would not stop at the tokens {lost}, which end an answer: a GGUF file holds at most three"
        )


def _last_logits(model: LlamaModel, prompt: list[int]) -> np.ndarray:
    positions = range(max(len(prompt) - POSITIONS, 0), len(prompt))
    return np.stack([row.copy() for row in model.logits(prompt, positions)])


def _loss(model: LlamaModel, row: dict[str, list[int]]) -> list[float]:
    """Returns ``[nats, trained tokens]`` of a held-out row."""
    targets = {index - 1: label for index, label in enumerate(row["labels"]) if index and label != IGNORED}
    logits = model.logits(row["input_ids"], list(targets))
    nats = sum(-log_softmax(after)[label] for label, after in zip(targets.values(), logits, strict=True))
    return [float(nats), len(targets)]


if __name__ == "__main__":
    serve_request(run_snippet)
