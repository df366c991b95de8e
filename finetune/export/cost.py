"""What an export in other numbers costs beside the merged model itself, said wherever its parity is."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from finetune.console import change_text
from finetune.export.config import ExportConfig
from finetune.export.parity import Expected, compare


def cost(
    name: str, *, merged: Expected, export: Expected, config: ExportConfig, desk: Path, seed: int
) -> dict[str, Any]:
    """How far an export in fewer bits is from the merged model: no bound is set, the user decides.

    Args:
        name: The export's.
        merged: What the merged model gives.
        export: What the same weights in the export's numbers give.
        config: Its settings.
        desk: For a file of logits meanwhile.
        seed: Of the interval.

    Returns:
        ``{"kl", "top1_agreement", "rows", "loss", "model_loss", "loss_difference"}`` as `compare` gives them, and ``note``,
        a sentence; losses only where ``rows`` is not 0.
    """
    file = desk / "cost.npz"
    np.savez(file, **{f"prompt_{number}": logits for number, logits in enumerate(export.logits)})  # type: ignore[arg-type]
    got = {"chat_tokens": merged.chat_tokens, "losses": export.losses, "stopped": merged.stopped, "runtime": ""}
    boundless = dataclasses.replace(config, max_logit_difference=math.inf, max_kl=math.inf)
    found = compare(name, merged, got, file, config=boundless, seed=seed)
    file.unlink()
    kept: dict[str, Any] = {
        key: found[key]
        for key in ("kl", "top1_agreement", "rows", "loss", "model_loss", "loss_difference")
        if key in found
    }
    return {**kept, "note": _sentence(found)}


def _sentence(found: dict[str, Any]) -> str:
    text = f"beside the merged model before that rounding KL {found['kl']:.4f}, top-1 agreement {found['top1_agreement']:.3f}"
    if not found["rows"]:
        return text
    return f"{text}, held-out loss {found['loss']:.4f} where that has {found['model_loss']:.4f} ({change_text(found['loss_difference'])})"
