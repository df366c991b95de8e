"""Run as ``python -m finetune.preflight.reload``: opens base and saved adapter as later stages do, and writes its logits."""

from pathlib import Path
from typing import Any

from finetune.hardware import Placement
from finetune.inference.adapted import load_adapted_model
from finetune.inference.fresh_process import answer
from finetune.model import Base, ModelConfig
from finetune.quantization import QuantizationConfig


def logits(request: dict[str, Any]) -> dict[str, Any]:
    """Last logits of one document, in a file: as JSON they would take minutes."""
    import torch
    from safetensors.torch import save_file

    from finetune.preflight.context import last_logits

    torch.set_num_threads(request["placement"]["threads"])
    base = Base(**{**request["base"], "folder": Path(request["base"]["folder"])})
    placement = Placement(**request["placement"])
    graph = load_adapted_model(
        base, ModelConfig(**request["model"]), quantization=QuantizationConfig(**request["quantization"]), placement=placement,
        adapter=Path(request["adapter"]),
    )  # fmt: skip
    found = last_logits(graph, request["input_ids"], numbers=getattr(torch, placement.dtype))
    save_file({"logits": found.contiguous().cpu()}, request["logits"])
    return {"positions": len(found)}


if __name__ == "__main__":
    answer(logits)
