"""Run as ``python -m finetune.export.runtime``: opens an export as its card says, and writes down what it gives."""

import importlib.metadata
import os
import runpy
import time
from pathlib import Path
from typing import Any

import numpy as np

from finetune.export.parity import chat_tokens, last_logits, pairs
from finetune.inference.fresh_process import serve_request
from finetune.inference.generation import generate
from finetune.inference.losses import row_losses


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Runs the card's snippet in the folder of the exports and asks the model that it made.

    Returns:
        ``chat_tokens``, ``losses``, ``stopped``, ``answers``, ``answer_seconds`` and ``runtime``; the logits go into a file.
    """
    import torch

    torch.set_num_threads(request["threads"])
    os.chdir(request["folder"])
    names = runpy.run_path(request["snippet"])
    model, tokenizer = names["model"], names["tokenizer"]
    with torch.no_grad():
        logits = {f"prompt_{number}": last_logits(model, prompt) for number, prompt in enumerate(request["prompts"])}
        np.savez(Path(request["logits"]), **logits)  # type: ignore[arg-type]
        ids = torch.tensor([request["ending"]], device=model.device)
        settings = {"eos_token_id": request["ends"]} if request["ends"] else {}
        written = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=request["max_new_tokens"], do_sample=False, **settings
        )  # fmt: skip
    configured = model.generation_config.eos_token_id
    ends = request["ends"] or (configured if isinstance(configured, list) else [configured])
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in request["packages"])
    asked, started = request["asked"], time.monotonic()
    answers = generate(
        model,
        tokenizer,
        asked["prompts"],
        max_new_tokens=asked["max_new_tokens"],
        batch_rows=asked["batch_rows"],
        ends=ends,
    )
    seconds = time.monotonic() - started
    return {
        "chat_tokens": [chat_tokens(tokenizer, messages) for messages in request["chats"]],
        "losses": pairs(row_losses(model, request["rows"], batch_tokens=request["batch_tokens"])),
        "stopped": bool(set(written[0, ids.shape[1] :].tolist()) & set(ends)),
        "answers": answers,
        "answer_seconds": seconds,
        "runtime": versions,
    }


if __name__ == "__main__":
    serve_request(ask)
