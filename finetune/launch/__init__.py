"""How many processes do the work."""

from finetune.launch.config import LaunchConfig, as_launched
from finetune.launch.logs import keep_log
from finetune.launch.ranks import Ranks
from finetune.launch.start import must_start, refuse_planned, start

__all__ = ["LaunchConfig", "Ranks", "as_launched", "keep_log", "must_start", "refuse_planned", "start"]
