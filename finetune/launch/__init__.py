"""How many processes do the work."""

from finetune.launch.config import SHARDABLE, LaunchConfig, as_launched
from finetune.launch.logs import keep_log
from finetune.launch.ranks import Ranks
from finetune.launch.start import end, must_start, refuse, start

__all__ = ["SHARDABLE", "LaunchConfig", "Ranks", "as_launched", "end", "keep_log", "must_start", "refuse", "start"]
