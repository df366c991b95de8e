"""Runs many jobs from one command, each in its own process and folder: ``finetune --multirun lora.rank=8,16``.

```python
from finetune.sweep import jobs_in

for job in jobs_in(Path("outputs/quickstart-sweep")):
    print(job.title, job.state, job.held_out(), job.reason)
```
"""

from finetune.sweep.config import SweepConfig
from finetune.sweep.jobs import Job, jobs_in

__all__ = ["Job", "SweepConfig", "jobs_in"]
