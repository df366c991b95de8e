"""QLoRA fine-tuning: plan, data, preflight, train, merge, eval, export and report, from one command.

model, tokenizer = finetune.load("outputs/mine")
"""

from typing import Any

__version__ = "0.1.0"


def load(run_or_folder: str, *, device: str | None = None, base: str | None = None) -> tuple[Any, Any]:
    """Loads a run or one of its exports as it was trained; see `finetune.export.load`."""
    from finetune.export import load as load_export

    return load_export(run_or_folder, device=device, base=base)
