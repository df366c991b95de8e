"""Checks before the first step, on the real model and the first real batches, before paying for the run.

result = run_preflight(config.preflight, folder=Path("outputs/run/preflight"), job=job, make_trainer=make_trainer)
trainable.apply(result)
"""

from finetune.preflight.config import PreflightConfig
from finetune.preflight.stage import run_preflight

__all__ = ["PreflightConfig", "run_preflight"]
