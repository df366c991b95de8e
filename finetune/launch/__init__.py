"""Starts the processes of a run and lets them coordinate.

if must_start(config.launch):  # finetune.launch.start
    raise SystemExit(start(config.launch, ["train", "+experiment=quickstart"]))
ranks = Ranks(heartbeat_timeout_seconds=30)
data = ranks.broadcast(prepare() if ranks.is_main else None)
"""

from finetune.launch.config import LaunchConfig, as_launched
from finetune.launch.ranks import Ranks
from finetune.launch.start import start

__all__ = ["LaunchConfig", "Ranks", "as_launched", "start"]
