"""Run as ``python -m finetune.export.onnx_runtime``: runs an ONNX export's snippet and writes its outputs."""

import os
import runpy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from finetune.export.parity import POSITIONS, chat_tokens, log_softmax, package_versions, save_logits
from finetune.inference.fresh_process import serve_request
from finetune.inference.rows import IGNORED

Past = dict[str, np.ndarray]
Forward = Callable[[list[int], Past], tuple[np.ndarray, Past]]


def run_snippet(request: dict[str, Any]) -> dict[str, Any]:
    """Runs the card's snippet in the folder of the exports, and queries the session that it opens.

    Returns:
        ``chat_tokens``, ``losses``, ``stopped``, ``answers``, ``answer_seconds`` and ``runtime``; the logits go into a
        file.
    """
    os.chdir(request["folder"])
    names = runpy.run_path(request["snippet"])
    forward, empty, generate, ends = names["forward"], names["empty"], names["generate"], set(request["ends"])
    save_logits(Path(request["logits"]), [_last_logits(forward, empty, prompt) for prompt in request["prompts"]])
    written = generate(request["ending"], request["max_new_tokens"])
    wanted, started = request["answers"], time.monotonic()
    answers = [_answer(generate(prompt, wanted["max_new_tokens"]), ends) for prompt in wanted["prompts"]]
    return {
        "answers": answers,
        "answer_seconds": time.monotonic() - started,
        "chat_tokens": [chat_tokens(names["tokenizer"], messages) for messages in request["chats"]],
        "losses": [_loss(forward(row["input_ids"], empty)[0], row["labels"]) for row in request["rows"]],
        "stopped": bool(ends & set(written)),
        "runtime": package_versions(request["packages"]),
    }


def _answer(written: list[int], ends: set[int]) -> dict[str, Any]:
    stopped = bool(ends & set(written[-1:]))
    return {"tokens": written[:-1] if stopped else written, "stopped": stopped}


def _last_logits(forward: Forward, empty: Past, prompt: list[int]) -> np.ndarray:
    """Returns float32 logits at the last positions, shape (up to 8, vocabulary).

    Passes the prompt in two calls, so that the compared logits depend on the cache.
    """
    past = forward(prompt[:-POSITIONS], empty)[1] if len(prompt) > POSITIONS else empty
    return forward(prompt[-POSITIONS:], past)[0]


def _loss(logits: np.ndarray, labels: list[int]) -> list[float]:
    """Returns ``[nats, trained tokens]`` of a row, from the logits after each of its tokens."""
    targets = np.array(labels[1:])
    trained = np.flatnonzero(targets != IGNORED)
    nats = -log_softmax(logits[trained])[np.arange(len(trained)), targets[trained]]
    return [float(nats.sum()), float(len(trained))]


if __name__ == "__main__":
    serve_request(run_snippet)
