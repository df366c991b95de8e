"""The step-0 proofs: on the real model and the real first batches, before paying for the run."""

from finetune.rehearse.config import Ahead, Rehearsal, RehearseConfig
from finetune.rehearse.rehearse import rehearse

__all__ = ["Ahead", "Rehearsal", "RehearseConfig", "rehearse"]
