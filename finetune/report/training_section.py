"""How it came about: the curves of training, the data, memory and time."""

from finetune.report.curves import loss_picture, memory_picture, series, small_picture
from finetune.report.format import MISSING, count, duration, number, percent, size, stage_title
from finetune.report.intervals import length_picture
from finetune.report.markup import Html, figure, joined, section, table, tag
from finetune.report.planned import planned_bars
from finetune.report.provenance_section import planned
from finetune.report.run_data import Facts, Fields


def learning(report: Fields, facts: Facts) -> Html:
    """The curves of training."""
    unit = "nats a pair" if (facts.config.get("train") or {}).get("objective") == "dpo" else "nats a token"
    picture = loss_picture(facts.metrics, unit=unit)
    if not picture:
        return Html("")
    legend = [("1", "training rows"), *([("2", "held-out rows")] if series(facts.metrics, "eval/loss") else [])]
    caption = (
        "Loss is how surprised the model is by the right answer. Both lines should fall; a held-out line that turns up again means "
        "that rows are being learnt by heart."
    )
    small = joined([
        figure(small_picture(facts.metrics, "train/learning_rate", name="learning rate"), ""),
        figure(small_picture(facts.metrics, "train/grad_norm", name="gradient norm before clipping"), ""),
    ])  # fmt: skip
    text = _training_words(report["train"] or {}, unit=unit)
    parts = [tag("p", text) if text else "", figure(picture, caption, legend=legend), tag("div", small, kind="pairs")]
    return section("training", "Training", *parts)


def _training_words(train: Fields, *, unit: str) -> str:
    words = []
    if None not in (train.get("first_loss"), train.get("final_loss")):
        words.append(f"The loss went from {number(train['first_loss'])} to {number(train['final_loss'])} {unit}.")
    optimizer = train.get("optimizer") or {}
    if optimizer.get("used"):
        state = f", {size(optimizer['state_bytes'])} of state" if optimizer.get("state_bytes") else ""
        words.append(f"Optimizer: {optimizer['used']}{state}.")
    if train.get("resumed_from"):
        words.append(f"The training was interrupted once and went on from step {count(train['resumed_from'])}.")
    if train.get("skipped_steps"):
        words.append(f"{count(train['skipped_steps'])} steps were left out, because loss or gradient was no number.")
    if train.get("stopped_early"):
        words.append("It was stopped early, because the held-out loss no longer fell.")
    if train.get("kept_step") not in (None, train.get("steps")):
        words.append(f"The weights of step {count(train['kept_step'])} were kept: their held-out loss was the lowest.")
    return " ".join(words)


def data(report: Fields, facts: Facts) -> Html:
    """Where every input row went, and how long the rows are."""
    found = report["data"]
    if found is None:
        return Html("")
    lengths = found.get("lengths") or {}
    histogram = lengths.get("histogram") or {}
    limit = (facts.config.get("data") or {}).get("max_tokens")
    quantiles = "".join(
        f" {percent(int(name[1:]) / 100, digits=0)} have at most {count(value)} tokens."
        for name, value in _two(lengths)
    )
    return section(
        "data",
        "Data",
        tag("p", _data_words(found)),
        *[tag("p", warning, kind="notice") for warning in found.get("warnings") or []],
        table(["Rows", "Count", "Share"], _ledger(found["rows"] or {}), strong=frozenset({1})),
        figure(
            length_picture(histogram.get("edges") or [], histogram.get("rows") or [], limit=limit),
            f"How long the rows are, in tokens of this model.{quantiles} Longer rows cost more memory and time.",
            title="Lengths",
        ),
    )


def _two(lengths: Fields) -> list[tuple[str, float]]:
    return [(name, value) for name, value in (lengths.get("quantiles") or {}).items() if name in ("p50", "p95")]


def _data_words(found: Fields) -> str:
    tokens, trained = found["tokens"], found["trained_tokens"]
    words = [
        f"{count(found.get('train_rows'))} rows to train on, {count(found.get('heldout_rows'))} held out for the evaluation."
    ]
    if tokens and trained:
        words.append(
            f"{count(trained)} of the {count(tokens)} training tokens ({percent(trained / tokens)}) are answers; only those are learnt."
        )
    if found["packed_rows"] and found["packed_rows"] < (found.get("train_rows") or 0):
        words.append(
            f"They are packed into {count(found['packed_rows'])} rows of at most {count(found.get('longest'))} tokens."
        )
    return " ".join(words)


def _ledger(rows: Fields) -> list[list[str]]:
    """Every row that was read is in exactly one of: kept, duplicate, dropped."""
    total = rows.get("in")
    amounts = [("read", total), ("kept", rows.get("kept")), ("left out as duplicates", rows.get("duplicate"))]
    amounts += [
        (f"dropped: {reason.replace('_', ' ')}", amount) for reason, amount in (rows.get("dropped") or {}).items()
    ]
    amounts += [("cut to the limit (among the kept)", rows.get("truncated"))]
    return [
        [name, count(amount), percent(amount / total) if total and amount is not None else MISSING]
        for name, amount in amounts
    ]


def costs(report: Fields, facts: Facts) -> Html:
    """Memory over time and what each stage took."""
    device = any(row.get("device_bytes", 0) for row in facts.memory)
    rows = [
        [
            stage_title(stage),
            duration(cost["seconds"]),
            size(cost["peak_rss_bytes"]),
            *([size(cost["peak_device_bytes"])] if device else []),
        ]
        for stage, cost in report["stages"].items()
        if cost["seconds"] is not None
    ]
    caption = "Memory held while the run worked, sampled four times a second; the bands are the stages. Pauses before a resumption are cut out."
    legend = [("1", "this process"), ("2", "GPU")] if device else []
    header = ["Stage", "Time", "Peak memory", *(["Peak on the GPU"] if device else [])]
    return section(
        "costs",
        "Memory and time",
        planned(report),
        planned_bars(report),
        figure(memory_picture(facts.memory), caption, legend=legend),
        table(header, rows),
    )
