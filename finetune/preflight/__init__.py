"""The step-0 proofs: on the real model and the real first batches, before paying for the run."""

from finetune.preflight.config import PreflightConfig, PreflightResult, UpcomingRun
from finetune.preflight.stage import run_preflight

__all__ = ["PreflightConfig", "PreflightResult", "UpcomingRun", "run_preflight"]
