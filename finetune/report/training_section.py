"""How the result came about: the curves of training, the data, memory and time."""

from __future__ import annotations

from finetune.html import Figure, Table
from finetune.html.format import MISSING, count, duration, number, percent, size
from finetune.html.lengths import length_picture
from finetune.objectives import OBJECTIVES, Objective
from finetune.report.curves import loss_picture, memory_picture, series, small_picture
from finetune.report.planned import planned_figure, planned_text
from finetune.report.rewards_section import last_with_interval, rewards_section
from finetune.report.run_data import Fields, RunData
from finetune.report.titles import stage_title

LOSS_CAPTION = (
    "Loss measures how much the right answer surprises the model. Both lines should fall; "
    "a held-out line that rises again means that the model memorizes the training rows."
)
MEMORY_CAPTION = (
    "Memory of the run, sampled four times a second; the bands are the stages. Pauses before a resumption are left out."
)
COMPARED_CAPTION = (
    "The loss falls as good answers are preferred to bad ones, even while both become less likely. Read it with the "
    "margin and the likelihood of the good answers below: where that keeps falling, answers turn into repetitions."
)
SMALL = {"train/learning_rate": "learning rate", "train/grad_norm": "gradient norm before clipping"}
COMPARED = {
    "train/reward_margin": "reward of good answers less that of bad ones",
    "train/reward_accuracy": "share of answers on the right side",
    "train/chosen_logprob_per_token": "log-probability of good answers, per token",
    "train/kl": "reference point (z0), nats per answer",
}
"""Figures of the objectives that compare answers; each is drawn where it was logged."""


def training_section(report: Fields, data: RunData) -> Fields:
    """Collects the curves of training."""
    objective = _objective(data)
    if objective.samples:
        shown = rewards_section(data)
        facts = {**(report["train"] or {}), "first_loss": None}
        return shown | {"text": " ".join(filter(None, [shown["text"], _training_text(facts, unit="")]))}
    unit = f"per {objective.unit}" if objective.unit == "answer" else f"nats per {objective.unit}"
    picture = loss_picture(data.metrics, unit=unit)
    heldout = [("2", "held-out rows")] if series(data.metrics, "eval/loss") else []
    caption = COMPARED_CAPTION if objective.compares else LOSS_CAPTION
    small = SMALL | (COMPARED if objective.compares else {})
    loss = Figure(picture=picture, caption=caption, legend=[("1", "training rows"), *heldout]) if picture else None
    return {
        "text": " ".join([_training_text(report["train"] or {}, unit=unit), *_compared_text(data)]),
        "loss": loss,
        "small": [Figure(picture=small_picture(data.metrics, key, name=name)) for key, name in small.items()],
    }


def _objective(data: RunData) -> Objective:
    return OBJECTIVES[(data.config.get("train") or {}).get("objective", "sft")]


def _compared_text(data: RunData) -> list[str]:
    """Returns what the last held-out evaluation of an objective that compares answers measured."""
    accuracy, margin = (last_with_interval(data, f"eval/{name}") for name in ("reward_accuracy", "reward_margin"))
    likelihood = series(data.metrics, "eval/chosen_logprob_per_token")
    if not accuracy:
        return []
    sentences = [f"At the last held-out evaluation the share of right comparisons was {accuracy}"]
    sentences += [f"the reward margin was {margin}"] if margin else []
    if likelihood:
        before, after = number(likelihood[0][1]), number(likelihood[-1][1])
        sentences.append(f"the log-probability of good answers went from {before} to {after} per token")
    return ["; ".join(sentences) + "."]


def _training_text(train: Fields, *, unit: str) -> str:
    sentences = []
    if None not in (train.get("first_loss"), train.get("final_loss")):
        sentences.append(f"The loss went from {number(train['first_loss'])} to {number(train['final_loss'])} {unit}.")
    optimizer = train.get("optimizer") or {}
    if optimizer.get("used"):
        state = f", with {size(optimizer['state_bytes'])} of state" if optimizer.get("state_bytes") else ""
        sentences.append(f"Optimizer: {optimizer['used']}{state}.")
    if train.get("resumed_from"):
        sentences.append(f"The training was interrupted once and resumed from step {count(train['resumed_from'])}.")
    if train.get("skipped_steps"):
        sentences.append(f"{count(train['skipped_steps'])} steps were skipped: loss or gradient was not finite.")
    if train.get("stopped_early"):
        sentences.append("It was stopped early: the held-out loss no longer fell.")
    if train.get("kept_step") not in (None, train.get("steps")):
        step = count(train["kept_step"])
        sentences.append(f"The weights of step {step} were kept: their held-out loss was the lowest.")
    return " ".join(sentences)


def data_section(report: Fields, data: RunData) -> Fields | None:
    """Collects the figures of the prepared data; None where it was not prepared."""
    prepared = report["data"]
    if prepared is None:
        return None
    lengths = prepared.get("lengths") or {}
    limit = (data.config.get("data") or {}).get("max_tokens")
    caption = ["How long the rows are, in tokens of this model."]
    for name, value in (lengths.get("quantiles") or {}).items():
        if name in ("p50", "p95"):
            caption.append(f"{percent(int(name[1:]) / 100, digits=0)} have at most {count(value)} tokens.")
    caption.append("Longer rows cost more memory and time.")
    samples = _objective(data).samples
    return {
        "text": _data_text(prepared, samples=samples),
        "note": "prompts to sample from" if samples else f"loss on {count(prepared['trained_tokens'])} tokens",
        "ledger": Table(header=["Rows", "Count", "Share"], rows=_ledger(prepared["rows"] or {}), strong=frozenset({1})),
        "lengths": Figure(
            picture=length_picture(lengths.get("histogram") or {}, limit=limit),
            caption=" ".join(caption),
            title="Lengths",
        ),
    }


def _data_text(prepared: Fields, *, samples: bool) -> str:
    tokens, trained, train_rows = prepared["tokens"], prepared["trained_tokens"], prepared.get("train_rows")
    text = f"{count(train_rows)} rows to train on, {count(prepared.get('heldout_rows'))} held out for the evaluation."
    if samples:
        text += " The loss is computed on sampled answers; references are for the rewards and the held-out loss."
    elif tokens and trained:
        answers = f"{count(trained)} of the {count(tokens)} training tokens ({percent(trained / tokens)}) are answers"
        text += f" {answers}; the loss is computed on these only."
    if prepared["packed_rows"] and prepared["packed_rows"] < (train_rows or 0):
        longest = count(prepared.get("longest"))
        text += f" They are packed into {count(prepared['packed_rows'])} rows of at most {longest} tokens."
    return text


def _ledger(rows: Fields) -> list[list[str]]:
    """Returns the table of rows: each row that was read is kept, a duplicate, or dropped."""
    total = rows.get("in")
    amounts = [("read", total), ("kept", rows.get("kept")), ("left out as duplicates", rows.get("duplicate"))]
    dropped = rows.get("dropped") or {}
    amounts += [(f"dropped: {reason.replace('_', ' ')}", amount) for reason, amount in dropped.items()]
    amounts += [("truncated to the limit (among the kept)", rows.get("truncated"))]
    if rows.get("rewritten"):
        several = f"in {count(rows.get('rewritten_pieces'))} rows, as the template rewrites turns (among the kept)"
        amounts += [(several, rows.get("rewritten"))]
    return [
        [name, count(amount), percent(amount / total) if total and amount is not None else MISSING]
        for name, amount in amounts
    ]


def costs_section(report: Fields, data: RunData) -> Fields:
    """Collects planned and measured memory, and the time of each stage."""
    has_device = any(row.get("device_bytes", 0) for row in data.memory)
    rows = []
    for stage, cost in report["stages"].items():
        if cost["seconds"] is not None:
            device = [size(cost["peak_device_bytes"])] if has_device else []
            rows.append([stage_title(stage), duration(cost["seconds"]), size(cost["peak_rss_bytes"]), *device])
    header = ["Stage", "Time", "Peak memory", *(["Peak on the GPU"] if has_device else [])]
    picture = memory_picture(data.memory)
    legend = [("1", "this process"), ("2", "GPU")] if has_device else []
    return {
        "plan": planned_text(report),
        "planned": planned_figure(report),
        "memory": Figure(picture=picture, caption=MEMORY_CAPTION, legend=legend) if picture else None,
        "stages": Table(header=header, rows=rows),
    }
