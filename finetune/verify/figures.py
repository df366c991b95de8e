"""The checks that compare figures: the held-out loss and the metrics of the task, paired by row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finetune.inference.bootstrap import RESAMPLES, Bootstrap, Ratio, mean_of
from finetune.inference.rows import IGNORED
from finetune.verify.checks import DIFFERS, PASS, UNASKED, Answered, Check
from finetune.verify.endpoint import Endpoint, Refused
from finetune.verify.reference import Reference


def check_loss(endpoint: Endpoint, reference: Reference, *, bound: float) -> Check:
    """Compares the held-out loss with the run's own, past the server's template: are these the weights?

    Args:
        endpoint: The server.
        reference: The rows and their losses.
        bound: Of the difference in nats per token, averaged over rows without its sign.
    """
    name, allowed = "held-out loss", bound + reference.rounding
    try:
        scored, missing = _scored(endpoint, reference)
    except Refused as refused:
        if refused.status in (0, 500, 503):
            return Check(name=name, verdict=DIFFERS, detail=f"the server fails: {refused}")
        return Check(name=name, verdict=UNASKED, detail=f"it gives no log-probabilities of a prompt ({refused})")
    if not scored:
        detail = (
            "it gives no log-probability of some token of each row" if missing else "the run measured no row's loss"
        )
        return Check(name=name, verdict=UNASKED, detail=detail)
    own = Ratio(*(np.array([reference.losses[number][side] for number in scored], dtype=float) for side in (0, 1)))
    served = Ratio(totals=np.array(list(scored.values())), weights=own.weights)
    distance = float(np.abs(served.totals - own.totals).sum() / own.weights.sum())
    change = Bootstrap(len(scored), samples=RESAMPLES, seed=reference.seed).difference(own, served)
    detail = (
        f"{served.value:.4f} nats per token on {len(scored)} rows, the run's own {own.value:.4f}: "
        f"{change.text()}; rows differ by {distance:.4f} on average (bound {allowed:.4f})"
    )
    if missing:
        detail += f"; {missing} rows are left out, since the server gives no log-probability of some of their tokens"
    return Check(
        name=name, verdict=PASS if distance <= allowed else DIFFERS, detail=detail, figure=distance, bound=allowed
    )


def check_metrics(answered: Sequence[Answered], reference: Reference) -> list[Check]:
    """Compares the metrics of the task with the run's own on the same rows; DIFFERS where the interval excludes 0."""
    from finetune.eval.metrics import METRICS

    if not answered:
        return []
    checks = []
    for metric in reference.metrics:
        scores = [[METRICS[metric](text, item.wanted.row) for text in item.texts] for item in answered]
        own, served = (mean_of([pair[side] for pair in scores]) for side in (0, 1))
        change = Bootstrap(len(scores), samples=RESAMPLES, seed=reference.seed).difference(own, served)
        detail = (
            f"{served.value:.3f} on {len(scores)} held-out rows, the run's own {own.value:.3f}: {change.text(digits=3)}"
        )
        verdict = PASS if change.low <= 0 <= change.high else DIFFERS
        checks.append(Check(name=metric, verdict=verdict, detail=detail, figure=change.difference, bound=0))
    return checks


def _scored(endpoint: Endpoint, reference: Reference) -> tuple[dict[int, float], int]:
    """Returns nats by row number, and how many rows the server could not score."""
    nats: dict[int, float] = {}
    missing = 0
    for number, row in enumerate(reference.scored):
        targets = _targets(row)
        scores = endpoint.score(row["input_ids"], targets) if targets else {}
        if targets and len(scores) == len(targets):
            nats[number] = -sum(scores.values())
        else:
            missing += bool(targets)
    return nats, missing


def _targets(row: dict[str, list[int]]) -> list[int]:
    """Returns the places of the tokens with loss."""
    return [place for place, label in enumerate(row["labels"]) if place and label != IGNORED]
