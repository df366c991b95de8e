"""Writes the config.json of a merged model, for transformers 5 and 4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from finetune.merge.candidates import TensorPlan


def write_config(
    config: dict[str, Any], file: Path, *, dtype: torch.dtype, files: dict[str, list[TensorPlan]], untied: bool
) -> None:
    """Writes the base's config.json with what the merge changes.

    Args:
        config: The base's.
        file: To write.
        dtype: Of the weights.
        files: The tensors by file.
        untied: Whether embedding and head are no longer tied.
    """
    written = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    written["dtype"] = str(dtype).removeprefix("torch.")
    written.update(_rope_of_version_4(written))
    if untied:
        written["tie_word_embeddings"] = False
    for plan in (plan for plans in files.values() for plan in plans):
        if plan.shape[:1] != plan.stored.shape[:1] and plan.stored.shape[:1] == (config.get("vocab_size"),):
            written["vocab_size"] = plan.shape[0]
    file.write_text(json.dumps(written, indent=2) + "\n")


def _rope_of_version_4(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the position settings as transformers 4 reads them, where a config.json has those of version 5 only.

    Version 4 does not know ``rope_parameters`` and would compute with its default base without a word.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope or "rope_theta" in config:
        return {}
    scaled = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    settings = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    return settings | ({} if rope.get("rope_type", "default") == "default" else {"rope_scaling": scaled})
