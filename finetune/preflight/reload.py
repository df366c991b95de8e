"""Loads base and saved adapter as later stages do and writes the logits: ``python -m finetune.preflight.reload``."""

from pathlib import Path
from typing import Any

from finetune.inference.adapted import load_adapted_model
from finetune.inference.fresh_process import serve_request
from finetune.model.spec import read_spec


def write_logits(request: dict[str, Any]) -> dict[str, Any]:
    """Writes the last logits of one document to a file: as JSON they would take minutes."""
    import torch
    from safetensors.torch import save_file

    from finetune.preflight.context import last_logits

    spec = read_spec(request["spec"])
    torch.set_num_threads(spec.placement.threads)
    model = load_adapted_model(spec, Path(request["adapter"]))
    logits = last_logits(model, request["input_ids"], dtype=getattr(torch, spec.placement.dtype))
    save_file({"logits": logits.contiguous().cpu()}, request["logits"])
    return {"positions": len(logits)}


if __name__ == "__main__":
    serve_request(write_logits)
