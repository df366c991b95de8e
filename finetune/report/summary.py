"""report.json: the run as one object. Its fields are a contract; see docs/report.md before changing one."""

from finetune.inference.artifacts import collect_artifacts
from finetune.jsonable import to_jsonable
from finetune.report.run_data import Fields, RunData
from finetune.usage import run_commands

SCHEMA = 1
EXPECTED = ("data", "preflight", "train", "merge", "eval", "export")
HEADLINES = ("json_exact", "exact_match", "number", "label", "pass_at_1")
"""Metrics for the headline, the strictest first; otherwise the first that was measured."""

MODEL_KEYS = ("name", "parameters", "trainable_parameters", "quantization", "bytes")
NOT_REPORTED = ("folder", "rounding")
"""Facts about the model that later commands of this machine read."""

COST_KEYS = ("seconds", "peak_rss_bytes", "peak_device_bytes")
SPEED_KEYS = ("seconds", "tokens_per_second", "trained_tokens_per_second")
REQUIRED = {
    "data": ("rows", "tokens", "trained_tokens", "packed_rows"),
    "train": ("steps", *SPEED_KEYS, "first_loss", "final_loss", "optimizer"),
    "merge": ("candidates", "chosen"),
    "eval": ("artifacts",),
}


def summarize(data: RunData, *, status: str) -> Fields:
    """Returns the content of report.json. An unfinished stage is null, and so is a field that a stage did not give."""
    missing = [stage for stage in EXPECTED if data.product(stage) is None]
    scores = data.product("eval")
    run = data.config.get("run") or {}
    exports = (data.product("export") or {"exports": []})["exports"]
    return {
        "schema": SCHEMA,
        "status": "partial" if status == "complete" and missing else status,
        "missing": missing,
        "run": str(run.get("name", data.run.name)),
        "seed": run.get("seed"),
        "command": data.command,
        "headline": headline(scores) if scores else None,
        "data": _section(data, "data"),
        "model": _model(data),
        "preflight": _preflight(data),
        "train": _section(data, "train"),
        "eval": _section(data, "eval"),
        "merge": _section(data, "merge"),
        "export": exports,
        "use": to_jsonable(run_commands(data.run, [(entry["format"], entry["path"]) for entry in exports])),
        "artifacts": collect_artifacts(scores, data.product("merge"), exports),
        "stages": {stage: {key: manifest.get(key) for key in COST_KEYS} for stage, manifest in data.manifests.items()},
        "plan": data.product("plan"),
        "decisions": _decisions(data),
        "environment": data.environment,
    }


def _section(data: RunData, stage: str) -> Fields | None:
    product = data.product(stage)
    return None if product is None else dict.fromkeys(REQUIRED[stage]) | product


def _preflight(data: RunData) -> Fields | None:
    """Returns the section ``preflight``. A field that the stage did not give is empty."""
    product = data.product("preflight")
    return None if product is None else {"checks": [], "skipped": []} | product


def _model(data: RunData) -> Fields:
    """Returns the base as the model stage describes it; before that stage, as config and plan do."""
    config = {
        "name": (data.config.get("model") or {}).get("name"),
        "quantization": (data.config.get("quantization") or {}).get("method"),
    }
    plan = data.product("plan") or {}
    planned = {key: plan[key] for key in ("parameters", "trainable_parameters") if plan.get(key)}
    loaded = {key: value for key, value in (data.product("model") or {}).items() if key not in NOT_REPORTED}
    return dict.fromkeys(MODEL_KEYS) | config | planned | loaded


def _decisions(data: RunData) -> list[str]:
    """Returns every automatic choice with its reason, in the order in which they were made."""
    reasons = list((data.environment.get("placement") or {}).get("reasons", []))
    reasons += (data.product("model") or {}).get("kernels", [])
    optimizer = (data.product("train") or {}).get("optimizer") or {}
    if optimizer.get("why") and not any(optimizer["why"] in reason for reason in reasons):
        reasons.append(f"optimizer {optimizer['used']}: {optimizer['why']}")
    merge = data.product("merge") or {}
    if merge.get("rule"):
        reasons.append(f"merge {merge['chosen']}: {merge['rule']}")
    return reasons


HEADLINE_PAIRS = (
    ("base", "merged", "total"),
    ("base", "adapter", ""),
    ("base_quantized", "adapter", "tuning"),
)
"""Artifacts that the headline compares, and the change that the evaluation measured; the first pair that is there."""


def headline(scores: Fields) -> Fields | None:
    """Returns whether it worked: one metric of the base and of the tuned artifact, on the same held-out rows.

    Returns:
        ``{"metric", "higher_is_better", "before": {...}, "after": {...}, "from", "artifact", "difference": {...} |
        None, "rows", "verdict"}``; the verdict is ``better``, ``worse`` or ``unclear`` (0 is inside the interval).
        Where the base was left out, the quantized base with and without the adapter. None where a part is missing.
    """
    artifacts = scores["artifacts"]
    pairs = [(first, second, step) for first, second, step in HEADLINE_PAIRS if artifacts.get(first)]
    first, artifact, step = next((pair for pair in pairs if artifacts.get(pair[1])), ("", "", ""))
    if not artifact:
        return None
    metric = headline_metric(scores)
    before, after = _level(artifacts[first], metric), _level(artifacts[artifact], metric)
    difference = (scores.get("changes") or {}).get(step, {}).get(metric)
    higher_is_better = metric != "perplexity"
    return {
        "metric": metric,
        "higher_is_better": higher_is_better,
        "before": before,
        "after": after,
        "from": first,
        "artifact": artifact,
        "difference": difference,
        "rows": scores.get("rows"),
        "verdict": _verdict(before, after, difference, sign=1 if higher_is_better else -1),
    }


def headline_metric(scores: Fields) -> str:
    """Returns the metric that decides whether the run worked; perplexity where the task has none."""
    first: Fields = next(iter(scores["artifacts"].values()), {})
    measured = list(first.get("metrics") or {})
    return next((name for name in HEADLINES if name in measured), measured[0] if measured else "perplexity")


def _level(artifact: Fields, metric: str) -> Fields:
    level: Fields | None = (artifact.get("metrics") or {}).get(metric)
    return {"value": artifact.get(metric), "low": None, "high": None} if level is None else level


def _verdict(before: Fields, after: Fields, difference: Fields | None, *, sign: int) -> str:
    if difference is not None:
        low, high = sorted((sign * difference["low"], sign * difference["high"]))
    elif None not in (before["low"], after["low"]):
        # Without a paired interval: clear only where the two intervals do not overlap.
        low, high = sorted((sign * (after["low"] - before["high"]), sign * (after["high"] - before["low"])))
    else:
        return "unclear"
    return "better" if low > 0 else "worse" if high < 0 else "unclear"
