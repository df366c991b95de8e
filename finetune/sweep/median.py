"""Optuna's median rule, applied to the jobs' folders: it needs no storage of its own and works with any sweeper."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from finetune.errors import ConfigError

Losses = Mapping[int, float]
"""Held-out losses by optimizer step."""


def require_optuna() -> None:
    """Checks that Optuna is installed.

    Raises:
        ConfigError: It is not.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ConfigError("sweep.prune=true needs Optuna; run: pip install 'finetune-qlora[optuna]'") from error


def should_prune(losses: Losses, others: Sequence[Losses], *, after_jobs: int, after_steps: int) -> str:
    """Returns why a job should be stopped now; empty if it may continue.

    Args:
        losses: Held-out losses of the job so far.
        others: Those of each finished job.
        after_jobs: Finished jobs before any job is stopped.
        after_steps: Steps before a job may be stopped.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=after_jobs, n_warmup_steps=after_steps)
    study = optuna.create_study(pruner=pruner)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # stable since Optuna 3, same names
        for other in filter(None, others):
            study.add_trial(optuna.trial.create_trial(value=other[max(other)], intermediate_values=dict(other)))
    trial = study.ask()
    for step, loss in sorted(losses.items()):
        trial.report(loss, step)
    if not trial.should_prune():
        return ""
    best, step = min(losses.values()), max(losses)
    return f"its best held-out loss up to step {step}, {best:.4f}, is worse than the median of the finished jobs"
