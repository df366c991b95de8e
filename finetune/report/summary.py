"""report.json: the run as one object. Its fields are a contract; see docs/report.md before changing one."""

from typing import Any

from finetune.inference.artifacts import collect_artifacts
from finetune.report.run_data import Facts, Fields

SCHEMA = 1
EXPECTED = ("data", "preflight", "train", "merge", "eval", "export")
HEADLINES = ("json_exact", "exact_match", "number", "label", "pass_at_1")
"""Metrics for the first line of the page, the most telling first; otherwise the first that was measured."""

REQUIRED = {
    "data": ("rows", "tokens", "trained_tokens", "packed_rows"),
    "train": (
        "steps",
        "seconds",
        "tokens_per_second",
        "trained_tokens_per_second",
        "first_loss",
        "final_loss",
        "optimizer",
    ),
    "merge": ("candidates", "chosen"),
    "eval": ("artifacts",),
    "preflight": ("proofs",),
}


def summarize(facts: Facts, *, status: str) -> Fields:
    """The content of report.json. A stage that did not finish is null; a field that a stage did not give is null."""
    missing = [stage for stage in EXPECTED if facts.product(stage) is None]
    scores = facts.product("eval")
    run = facts.config.get("run") or {}
    exports = facts.product("export")
    return {
        "schema": SCHEMA,
        "status": "partial" if status == "complete" and missing else status,
        "missing": missing,
        "run": str(run.get("name", facts.run.name)),
        "seed": run.get("seed"),
        "command": facts.command,
        "headline": headline(scores) if scores else None,
        "data": _section(facts, "data"),
        "model": _model(facts),
        "preflight": _section(facts, "preflight"),
        "train": _section(facts, "train"),
        "eval": _section(facts, "eval"),
        "merge": _section(facts, "merge"),
        "export": exports["exports"] if exports else [],
        "artifacts": collect_artifacts(scores, facts.product("merge"), exports["exports"] if exports else []),
        "stages": {stage: _cost(manifest) for stage, manifest in facts.manifests.items()},
        "plan": facts.product("plan"),
        "decisions": _decisions(facts),
        "environment": facts.environment,
    }


def _section(facts: Facts, stage: str) -> Fields | None:
    product = facts.product(stage)
    return None if product is None else dict.fromkeys(REQUIRED[stage]) | product


def _model(facts: Facts) -> Fields:
    """The base as the model stage tells it; before that, as config and plan do."""
    known = {
        "name": (facts.config.get("model") or {}).get("name"),
        "quantization": (facts.config.get("quantization") or {}).get("method"),
    }
    planned = {
        key: value
        for key, value in (facts.product("plan") or {}).items()
        if key in ("parameters", "trainable_parameters") and value
    }
    told = planned | (facts.product("model") or {})
    return dict.fromkeys(("name", "parameters", "trainable_parameters", "quantization", "bytes")) | known | told


def _cost(manifest: Fields) -> Fields:
    return {name: manifest.get(name) for name in ("seconds", "peak_rss_bytes", "peak_device_bytes")}


def _decisions(facts: Facts) -> list[str]:
    """Every automatic choice with its reason, in the order in which they were made."""
    reasons = list((facts.environment.get("placement") or {}).get("reasons", []))
    reasons += (facts.product("model") or {}).get("kernels", [])
    optimizer = (facts.product("train") or {}).get("optimizer") or {}
    if optimizer.get("why") and not any(optimizer["why"] in reason for reason in reasons):
        reasons.append(f"optimizer {optimizer['used']}: {optimizer['why']}")
    merge = facts.product("merge") or {}
    if merge.get("rule"):
        reasons.append(f"merge {merge['chosen']}: {merge['rule']}")
    return reasons


def headline(scores: Fields) -> Fields | None:
    """Did it work: one metric, of the base and of what was made from it, on the same held-out rows.

    Returns:
        ``{"metric", "higher_is_better", "before": {...}, "after": {...}, "artifact", "difference": {...} | None, "rows",
        "verdict"}``; the verdict is ``better``, ``worse`` or ``unclear`` (the interval of the difference holds zero).
        None where the base or every tuned artifact is missing.
    """
    artifacts = scores["artifacts"]
    artifact = next((name for name in ("merged", "adapter") if artifacts.get(name)), None)
    if artifact is None or not artifacts.get("base"):
        return None
    before, after = artifacts["base"], artifacts[artifact]
    metric = headline_metric(scores)
    difference = (scores.get("changes") or {}).get("total", {}).get(metric) if artifact == "merged" else None
    return {
        "metric": metric,
        "higher_is_better": metric != "perplexity",
        "before": _value(before, metric),
        "after": _value(after, metric),
        "artifact": artifact,
        "difference": difference,
        "rows": scores.get("rows"),
        "verdict": _verdict(_value(before, metric), _value(after, metric), difference, higher=metric != "perplexity"),
    }


def headline_metric(scores: Fields) -> str:
    """The metric that decides whether the run worked; perplexity where the task has none."""
    measured = list((scores["artifacts"].get("base") or {}).get("metrics") or {})
    return next((name for name in HEADLINES if name in measured), measured[0] if measured else "perplexity")


def _value(artifact: Fields, metric: str) -> Fields:
    found: Any = (artifact.get("metrics") or {}).get(metric)
    return found if found is not None else {"value": artifact.get(metric), "low": None, "high": None}


def _verdict(before: Fields, after: Fields, difference: Fields | None, *, higher: bool) -> str:
    sign = 1 if higher else -1
    if difference is not None:
        low, high = sorted((sign * difference["low"], sign * difference["high"]))
    elif None not in (before["low"], after["low"]):
        # Without a paired interval: clear only where the two intervals do not touch.
        low, high = sorted((sign * (after["low"] - before["high"]), sign * (after["high"] - before["low"])))
    else:
        return "unclear"
    return "better" if low > 0 else "worse" if high < 0 else "unclear"
