"""Run as ``python -m finetune.preflight.reload``: opens base and saved adapter as later stages do, and writes its logits."""

from pathlib import Path
from typing import Any

from finetune.inference.adapted import load_adapted_model
from finetune.inference.fresh_process import serve_request
from finetune.model.spec import read_spec


def logits(request: dict[str, Any]) -> dict[str, Any]:
    """Writes the last logits of one document to a file: as JSON they would take minutes."""
    import torch
    from safetensors.torch import save_file

    from finetune.preflight.context import last_logits

    spec = read_spec(request["spec"])
    torch.set_num_threads(spec.placement.threads)
    model = load_adapted_model(spec, Path(request["adapter"]))
    last = last_logits(model, request["input_ids"], numbers=getattr(torch, spec.placement.dtype))
    save_file({"logits": last.contiguous().cpu()}, request["logits"])
    return {"positions": len(last)}


if __name__ == "__main__":
    serve_request(logits)
