"""Optuna's median rule, on what the jobs' folders tell: so it needs no storage of its own and holds for any sweeper."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from finetune.errors import ConfigError

Losses = Mapping[int, float]
"""Held-out losses by optimizer step."""


def require_optuna() -> None:
    """
    Raises:
        ConfigError: Optuna is not installed.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ConfigError("sweep.prune=true needs Optuna; run: pip install 'finetune[optuna]'") from error


def behind(losses: Losses, others: Sequence[Losses], *, after_jobs: int, after_steps: int) -> str:
    """Why a job is to be stopped now; empty where it may go on.

    Args:
        losses: Of the job, so far.
        others: Of each finished job.
        after_jobs: Finished jobs before any is stopped.
        after_steps: Steps before a job may be stopped.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        pruner=optuna.pruners.MedianPruner(n_startup_trials=after_jobs, n_warmup_steps=after_steps)
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", optuna.exceptions.ExperimentalWarning
        )  # stable since Optuna 3, under the same names
        for other in filter(None, others):
            study.add_trial(optuna.trial.create_trial(value=other[max(other)], intermediate_values=dict(other)))
    trial = study.ask()
    for step, loss in sorted(losses.items()):
        trial.report(loss, step)
    if not trial.should_prune():
        return ""
    best, step = min(losses.values()), max(losses)
    return f"its best held-out loss up to step {step}, {best:.4f}, is worse than the median of the jobs done"
