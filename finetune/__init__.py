"""QLoRA fine-tuning that proves what it did: plan, data, rehearse, train, merge, eval, export, report."""

from typing import Any

__version__ = "0.1.0"


def load(run_or_folder: str, *, device: str | None = None) -> tuple[Any, Any]:
    """Loads a run or one of its exports as it was trained; see `finetune.export.load`."""
    from finetune.export import load as load_export

    return load_export(run_or_folder, device=device)
