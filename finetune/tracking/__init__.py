"""Sends the metrics of a run to trackers. tracking/metrics.jsonl is always written; ``tracking=[wandb]`` adds services.

```python
from finetune.tracking import open_trackers

trackers = open_trackers(config.tracking, run_name="quickstart", folder=folder, run_config=to_dict(config))
trackers.log(step, {"train/loss": 1.5})
trackers.finish()
```
"""

from finetune.tracking.config import TrackerConfig
from finetune.tracking.figures import figures
from finetune.tracking.trackers import Tracker, Trackers, open_trackers

__all__ = ["Tracker", "TrackerConfig", "Trackers", "figures", "open_trackers"]
