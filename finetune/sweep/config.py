"""The sweep group."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """Settings of ``--multirun``: where its jobs are, and when one of them is pruned. A single run ignores them."""

    name: str | None = None
    """Folder under ``run.root`` with a folder for each job; None: ``<run.name>-sweep``. Trackers group jobs by it."""

    prune: bool = False
    """Stops a job whose best held-out loss is worse than the median of the finished jobs at the same step.

    The rule is Optuna's MedianPruner.
    """

    prune_after_jobs: int = 5
    """Finished jobs before any is stopped. Source: Optuna's default, ``n_startup_trials``."""

    prune_after_steps: int = 0
    """Optimizer steps of a job before it may be stopped."""

    def problems(self) -> Iterator[str]:
        if self.name is not None and (not self.name or "/" in self.name or self.name.startswith(".")):
            yield f"sweep.name must be a plain folder name; got {self.name!r}"
        for key in ("prune_after_jobs", "prune_after_steps"):
            if getattr(self, key) < 0:
                yield f"sweep.{key} must not be negative; got {getattr(self, key)}"
