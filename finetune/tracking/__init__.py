"""Where the figures of a run go besides its folder. tracking/metrics.jsonl is always written; the rest is chosen."""

from finetune.tracking.config import TrackerConfig
from finetune.tracking.figures import figures
from finetune.tracking.trackers import Tracker, Trackers, open_trackers

__all__ = ["Tracker", "TrackerConfig", "Trackers", "figures", "open_trackers"]
