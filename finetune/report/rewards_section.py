"""Training on rewards: the rewards of sampled answers by step, their intervals, and the best and worst of groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from finetune.html import Figure, Table
from finetune.html.format import number
from finetune.inference.bootstrap import Bootstrap, mean_of
from finetune.report.answers import answer_text
from finetune.report.curves import curve_picture, series, small_picture
from finetune.report.run_data import Fields, RunData
from finetune.report.titles import metric_title
from finetune.scores import Interval

CAPTION = (
    "Mean reward of the sampled answers, and of greedy answers to held-out prompts. The loss of this objective is near "
    "0 whatever is learned, so it is not drawn."
)
SMALL = {
    "train/dead_groups": "share of groups without a difference in reward",
    "train/kl": "KL divergence to the base, nats per token",
    "train/entropy": "entropy of the sampled tokens, nats",
    "train/answer_tokens": "length of an answer, tokens",
    "train/cut": "share of answers cut at the limit",
    "train/sampler_gap": "sampler against trainer, nats per token",
    "train/grad_norm": "gradient norm before clipping",
}
RESAMPLES = 1000
SHARE_OF_STEPS = 4
"""The first and the last quarter of the steps are compared."""

SHOWN_GROUPS = 2


def rewards_section(data: RunData) -> Fields:
    """Collects curves, intervals and answers of a training on rewards."""
    picture = curve_picture(data.metrics, train="train/reward", heldout="eval/reward", name="reward")
    heldout = [("2", "held-out prompts")] if series(data.metrics, "eval/reward") else []
    figure = Figure(picture=picture, caption=CAPTION, legend=[("1", "sampled answers"), *heldout]) if picture else None
    first, last = ends_of(data.answers)
    return {
        "text": _text(data, first, last),
        "loss": figure,
        "small": [Figure(picture=small_picture(data.metrics, key, name=name)) for key, name in SMALL.items()],
        "tables": [table for table in (_intervals(first, last), _groups(data.answers)) if table.rows],
    }


def ends_of(answers: Sequence[Fields]) -> tuple[list[Fields], list[Fields]]:
    """Returns the answers of the first and of the last quarter of the steps."""
    steps = sorted({answer["step"] for answer in answers})
    size = max(1, len(steps) // SHARE_OF_STEPS)
    early, late = set(steps[:size]), set(steps[-size:])
    return [one for one in answers if one["step"] in early], [one for one in answers if one["step"] in late]


def _text(data: RunData, first: Sequence[Fields], last: Sequence[Fields]) -> str:
    if not first:
        return ""
    before, after = (_steps(part) for part in (first, last))
    sentence = (
        f"The mean reward was {_interval(first, 'reward')} in {before} and {_interval(last, 'reward')} in {after}; the "
        "brackets are 95 % intervals over groups."
    )
    heldout = last_with_interval(data, "eval/reward")
    sentence += f" Greedy answers to held-out prompts ended at {heldout}." if heldout else ""
    divergence, steps = (series(data.metrics, f"train/{name}") for name in ("kl", "reward"))
    if divergence and len(divergence) < len(steps):
        sentence += (
            f" The KL divergence to the base ended at {number(divergence[-1][1])} nats per token; as it has no weight "
            f"in the loss, {len(divergence)} of {len(steps)} steps measured it."
        )
    errors = series(data.metrics, "train/reward_errors")
    if errors and errors[-1][1]:
        sentence += f" {errors[-1][1]:.0f} rewards failed and counted as the stated value."
    return sentence


def last_with_interval(data: RunData, name: str) -> str:
    """Returns the last value of a held-out figure with its interval, empty where there is none."""
    value, low, high = (series(data.metrics, key)[-1:] for key in (name, f"{name}_low", f"{name}_high"))
    if not (value and low and high):
        return number(value[0][1]) if value else ""
    return Interval(value=value[0][1], low=low[0][1], high=high[0][1]).text()


def _steps(answers: Sequence[Fields]) -> str:
    low, high = (edge(answer["step"] for answer in answers) for edge in (min, max))
    return f"step {low}" if low == high else f"steps {low} to {high}"


def _interval(answers: Sequence[Fields], name: str) -> str:
    """Returns the mean of a figure with its interval; answers of one group are not independent, so groups count."""
    groups: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    for answer in answers:
        groups[answer["step"], answer["row"]].append(float(answer["scores"].get(name, answer["reward"])))
    means = [sum(group) / len(group) for group in groups.values()]
    return Bootstrap(len(means), samples=RESAMPLES, seed=1).level(mean_of(means)).text()


def _intervals(first: Sequence[Fields], last: Sequence[Fields]) -> Table:
    names = list(first[0]["scores"]) if first else []
    rows = [[metric_title(name), *(_interval(part, name) for part in (first, last))] for name in names]
    if first:
        rows.append(["Reward, weighted sum", *(_interval(part, "reward") for part in (first, last))])
    header = ["Reward", *((_steps(first).capitalize(), _steps(last).capitalize()) if first else ())]
    return Table(header=header, rows=rows, title="Rewards at the start and at the end")


def _groups(answers: Sequence[Fields]) -> Table:
    """Returns the best and the worst answer of some groups of the first and of the last step."""
    steps = sorted({answer["step"] for answer in answers})
    rows = [row for step in dict.fromkeys([*steps[:1], *steps[-1:]]) for row in _best_and_worst(answers, step)]
    return Table(
        header=["Step", "Best of a group", "Worst of it", "Rewards"],
        rows=rows,
        text_columns=3,
        title="Sampled answers",
        caption="Of the groups of a step, those whose rewards differ most.",
    )


def _best_and_worst(answers: Sequence[Fields], step: int) -> Iterator[list[str]]:
    groups: defaultdict[int, list[Fields]] = defaultdict(list)
    for answer in answers:
        if answer["step"] == step:
            groups[answer["row"]].append(answer)
    ordered = [sorted(group, key=lambda answer: -answer["reward"]) for group in groups.values()]
    ordered.sort(key=lambda group: group[-1]["reward"] - group[0]["reward"])
    for best, *_, worst in ordered[:SHOWN_GROUPS]:
        texts = [answer_text(one["answer"]) for one in (best, worst)]
        yield [str(step), *texts, f"{number(best['reward'])} and {number(worst['reward'])}"]
