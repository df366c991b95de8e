"""How many processes do the work."""

from finetune.launch.config import SHARDABLE, LaunchConfig, as_launched
from finetune.launch.logs import log_to_file
from finetune.launch.ranks import Ranks
from finetune.launch.start import end, must_start, refuse, start

__all__ = ["SHARDABLE", "LaunchConfig", "Ranks", "as_launched", "end", "log_to_file", "must_start", "refuse", "start"]
