"""Many runs from one command, each in its own process and folder: ``finetune --multirun lora.rank=8,16``."""

from finetune.sweep.config import SweepConfig
from finetune.sweep.jobs import Job, jobs_in

__all__ = ["Job", "SweepConfig", "jobs_in"]
