"""Run as ``python -m finetune.export.onnx_runtime``: opens a graph as its card says, and writes down what it gives."""

import importlib.metadata
import os
import runpy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from finetune.export.parity import POSITIONS, chat_tokens
from finetune.inference.fresh_process import serve_request
from finetune.inference.rows import IGNORED

Past = dict[str, np.ndarray]
Forward = Callable[[list[int], Past], tuple[np.ndarray, Past]]


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Runs the card's snippet in the folder of the exports and asks the session that it opened.

    Returns:
        ``chat_tokens``, ``losses``, ``stopped``, ``answers``, ``answer_seconds`` and ``runtime``; the logits go into a file.
    """
    os.chdir(request["folder"])
    names = runpy.run_path(request["snippet"])
    forward, empty = names["forward"], names["empty"]
    logits = {
        f"prompt_{number}": _last_logits(forward, empty, prompt) for number, prompt in enumerate(request["prompts"])
    }
    np.savez(Path(request["logits"]), **logits)  # type: ignore[arg-type]
    written = names["generate"](request["ending"], request["max_new_tokens"])
    asked, started = request["asked"], time.monotonic()
    answers = [
        _answer(names["generate"](prompt, asked["max_new_tokens"]), request["ends"]) for prompt in asked["prompts"]
    ]
    return {
        "answers": answers,
        "answer_seconds": time.monotonic() - started,
        "chat_tokens": [chat_tokens(names["tokenizer"], messages) for messages in request["chats"]],
        "losses": [_loss(forward(row["input_ids"], empty)[0], row["labels"]) for row in request["rows"]],
        "stopped": bool(set(written) & set(request["ends"])),
        "runtime": ", ".join(f"{package} {importlib.metadata.version(package)}" for package in request["packages"]),
    }


def _answer(written: list[int], ends: list[int]) -> dict[str, Any]:
    stopped = bool(set(written[-1:]) & set(ends))
    return {"tokens": written[:-1] if stopped else written, "stopped": stopped}


def _last_logits(forward: Forward, empty: Past, prompt: list[int]) -> np.ndarray:
    """float32 logits at the last positions, shape (up to 8, vocabulary).

    The prompt goes in as two calls, so that what is compared went through the cache.
    """
    past = forward(prompt[:-POSITIONS], empty)[1] if len(prompt) > POSITIONS else empty
    return forward(prompt[-POSITIONS:], past)[0]


def _loss(logits: np.ndarray, labels: list[int]) -> list[float]:
    """``[nats, trained tokens]`` of a row, from the logits after each of its tokens."""
    targets = np.array(labels[1:])
    trained = np.flatnonzero(targets != IGNORED)
    picked = logits[trained].astype(np.float64)
    top = picked.max(axis=1)
    nats = np.log(np.exp(picked - top[:, None]).sum(axis=1)) + top - picked[np.arange(len(trained)), targets[trained]]
    return [float(nats.sum()), float(len(trained))]


if __name__ == "__main__":
    serve_request(ask)
