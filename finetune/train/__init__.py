"""Training: TRL's trainer on the adapted base, checkpointed, resumable, with nothing decided behind the user's back."""

from finetune.train.config import TrainConfig, TrainedAdapter
from finetune.train.stage import assist, fit

__all__ = ["TrainConfig", "TrainedAdapter", "assist", "fit"]
