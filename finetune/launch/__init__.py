"""How many processes do the work."""

from finetune.launch.config import LaunchConfig

__all__ = ["LaunchConfig"]
