"""Run as ``python -m finetune.export.runtime``: runs an export's snippet in transformers and writes its outputs."""

import os
import runpy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.export.parity import chat_tokens, last_logits, loss_pairs, package_versions, save_logits
from finetune.inference.budget import Workload
from finetune.inference.dense import place
from finetune.inference.fresh_process import serve_request
from finetune.inference.generation import generate
from finetune.inference.logits import input_device
from finetune.inference.losses import row_losses
from finetune.inference.oom import halve_batches
from finetune.jsonable import from_json
from finetune.model.load import weights_at
from finetune.model.spec import read_spec


def run_snippet(request: dict[str, Any]) -> dict[str, Any]:
    """Runs the card's snippet in the folder of the exports, and queries the model that it loads.

    Returns:
        ``chat_tokens``, ``losses``, ``stopped``, ``answers``, ``answer_seconds``, ``halvings`` and ``runtime``; the
        logits go into a file.
    """
    import torch

    from finetune.quantization.bnb import quiet_imports

    quiet_imports()
    torch.set_num_threads(request["threads"])
    os.chdir(request["folder"])
    with loading_in(request["dtype"], where=placement(request)):
        names = runpy.run_path(request["snippet"])
    model, tokenizer = names["model"], names["tokenizer"]
    save_logits(Path(request["logits"]), [last_logits(model, prompt) for prompt in request["prompts"]])
    ids = torch.tensor([request["ending"]], device=input_device(model))
    limits: dict[str, Any] = {"max_new_tokens": request["max_new_tokens"], "do_sample": False}
    if request["ends"]:
        limits["eos_token_id"] = request["ends"]
    with torch.no_grad():
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **limits)
    configured = model.generation_config.eos_token_id
    ends = request["ends"] or (configured if isinstance(configured, list) else [configured])
    wanted, started = request["answers"], time.monotonic()
    limit, rows = wanted["max_new_tokens"], wanted["batch_rows"]
    with halve_batches("export") as halvings:
        answers = generate(model, tokenizer, wanted["prompts"], max_new_tokens=limit, batch_rows=rows, ends=ends)
        seconds = time.monotonic() - started
        losses = row_losses(model, request["rows"], batch_tokens=request["batch_tokens"])
    return {
        "chat_tokens": [chat_tokens(tokenizer, messages) for messages in request["chats"]],
        "losses": loss_pairs(losses),
        "stopped": bool(set(written[0, ids.shape[1] :].tolist()) & set(ends)),
        "answers": answers,
        "answer_seconds": seconds,
        "halvings": halvings.count,
        "runtime": package_versions(request["packages"]),
    }


def placement(request: dict[str, Any]) -> dict[str, Any]:
    """Returns where transformers puts a dense model that does not fit in memory; nothing where it does."""
    dense = request["dense"]
    if dense is None:
        return {}
    placed = place(read_spec(dense["spec"]), from_json(Workload, dense["workload"]))
    return weights_at(placed.max_memory, scratch=dense["scratch"])


@contextmanager
def loading_in(dtype: str, *, where: dict[str, Any]) -> Iterator[None]:
    """Makes transformers load models in the dtype of the model that they are compared with, and within free memory.

    A CPU without bfloat16 instructions computes the merged model in float32, which holds its weights exactly.
    """
    import torch
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained

    def from_pretrained(_: Any, *arguments: Any, **settings: Any) -> Any:
        return original(*arguments, **(settings | {"dtype": getattr(torch, dtype)} | where))

    AutoModelForCausalLM.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment]
    try:
        yield
    finally:
        del AutoModelForCausalLM.from_pretrained


if __name__ == "__main__":
    serve_request(run_snippet)
