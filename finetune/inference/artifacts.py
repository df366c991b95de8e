"""The same held-out rows through every artifact: what evaluation, merge and exports measured, as one list."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.console import change_text

Fields = Mapping[str, Any]

BEFORE = {"base": None, "base_quantized": ("quantization", "base"), "adapter": ("tuning", "base, quantized")}
"""The change that the evaluation measured, and from what."""

TITLES = {
    "base": "Base model",
    "base_quantized": "Base, quantized",
    "adapter": "Quantized base + adapter",
    "merged": "Merged model",
}

ADAPTER, MERGED = "adapter", "merged"
MADE_FROM = {"adapter": "adapter", "gguf_lora": "adapter on the original base", "onnx": "merged, in float32"}
"""What an export's loss is held against, by format; the merged model's otherwise."""

FIGURES = ("loss", "loss_low", "loss_high", "perplexity", "tokens")
ANSWERS = ("metrics", "stop_rate", "mean_tokens", "repetition")


def same_rows(scores: Fields | None, merge: Fields | None, exports: Sequence[Fields]) -> list[dict[str, Any]]:
    """One entry for each artifact, in the order in which they are made.

    Args:
        scores: The evaluation's product; None where it is missing.
        merge: The merge's.
        exports: Descriptions of the exports; what no runtime opens is left out.

    Returns:
        ``{"title", "kept", "loss_rows", "loss", "loss_low", "loss_high", "perplexity", "tokens", "change": {"from", "difference",
        "low", "high"} | None, "answer_rows", "metrics": {name: {"value", "low", "high"}}, "stop_rate", "mean_tokens",
        "repetition", "beside": {"model", "changes"} | None}`` each. ``kept`` marks the merge that was written. ``change`` is of
        the loss. ``answer_rows`` is 0 and ``metrics`` empty where no answers were asked for. A figure that is missing is null.
    """
    scores, merge = scores or {}, merge or {}
    return [*_trained(scores), *_merged(scores, merge), *_exported(exports)]


def _trained(scores: Fields) -> Iterator[dict[str, Any]]:
    for name, step in BEFORE.items():
        figures = scores.get("artifacts", {}).get(name)
        if figures:
            change = {"from": step[1], **scores["changes"][step[0]]["loss"]} if step and scores.get("changes") else None
            yield _line(
                TITLES[name], figures, change=change, loss_rows=scores.get("loss_rows"), answer_rows=scores.get("rows")
            )


def _merged(scores: Fields, merge: Fields) -> Iterator[dict[str, Any]]:
    measured = scores.get("artifacts", {}).get(MERGED) or {}
    for one in merge.get("candidates") or []:
        kept = one["name"] == merge["chosen"]
        figures = {**one, **measured} if kept else one
        change = {"from": ADAPTER, **one["loss_difference"]} if "loss_difference" in one else None
        rows = scores.get("rows") if kept and measured else 0
        yield _line(
            f"Merged: {one['name']} + adapter",
            figures,
            change=change,
            loss_rows=merge.get("loss_rows"),
            answer_rows=rows,
            kept=kept,
        )


def _exported(exports: Sequence[Fields]) -> Iterator[dict[str, Any]]:
    for one in exports:
        parity = one["parity"]
        if not parity:
            continue
        from_merged = parity.get("cost", {})  # in other numbers than the model that it was compared with
        before = MERGED if from_merged else MADE_FROM.get(one["format"], MERGED)
        difference = from_merged.get("loss_difference") or parity.get("loss_difference")
        answers = parity.get("answers") or {}
        yield _line(
            f"Export {Path(one['path']).name}",
            {**parity, **answers},
            change={"from": before, **difference} if difference else None,
            loss_rows=parity.get("rows"),
            answer_rows=answers.get("rows"),
            beside={"model": answers["model"], "changes": answers["changes"]} if answers else None,
        )


def _line(
    title: str, figures: Fields, *, change: Fields | None, loss_rows: int | None, answer_rows: int | None, kept: bool = False,
    beside: Fields | None = None,
) -> dict[str, Any]:  # fmt: skip
    answered = (
        {name: figures.get(name) for name in ANSWERS} if answer_rows else {**dict.fromkeys(ANSWERS), "metrics": {}}
    )
    return {
        "title": title, "kept": kept, "loss_rows": loss_rows or 0, **{name: figures.get(name) for name in FIGURES}, "change": change,
        "answer_rows": answer_rows or 0, **answered, "beside": beside,
    }  # fmt: skip


def sentence(lines: Sequence[Fields]) -> str:
    """``The same 160 held-out rows went through every artifact; ...``: which rows, and where fewer were asked."""
    most = {key: max((line[key] for line in lines), default=0) for key in ("loss_rows", "answer_rows")}
    text = f"The same {most['loss_rows']} held-out rows went through every artifact for the loss (nats a token)"
    text += f", and the first {most['answer_rows']} were answered by those asked to" if most["answer_rows"] else ""
    fewer = [
        f"{line['title']}: {line[key]} rows for the {what}"
        for line in lines
        for key, what in (("loss_rows", "loss"), ("answer_rows", "answers"))
        if 0 < line[key] < most[key]
    ]
    return f"{text}. Brackets are 95 % intervals; a change is paired by row." + (
        f" Fewer: {'; '.join(fewer)}." if fewer else ""
    )


def heads(lines: Sequence[Fields], title: Callable[[str], str]) -> list[str]:
    """The table's columns; ``title`` names a metric."""
    names = metric_names(lines)
    return [
        "Artifact",
        "Loss",
        "Perplexity",
        "Change of the loss",
        *map(title, names),
        *(["Ended", "Tokens"] if names else []),
    ]


def cells(line: Fields, names: Sequence[str]) -> list[str]:
    """A line of the table. ``not asked``: no answers; a dash: not measured."""
    kept = " (kept)" if line["kept"] else ""
    loss = "–" if line["loss"] is None else f"{line['loss']:.4f}"
    if line["loss_low"] is not None:
        loss += f" [{line['loss_low']:.4f}, {line['loss_high']:.4f}]"
    perplexity = "–" if line["perplexity"] is None else f"{line['perplexity']:.3f}"
    change = f"{change_text(line['change'])} from {line['change']['from']}" if line["change"] else "–"
    if not names:
        answered = []
    elif line["metrics"]:
        answered = [
            *[_level(line["metrics"][name]) for name in names],
            f"{line['stop_rate']:.2f}",
            f"{line['mean_tokens']:.1f}",
        ]
    else:
        answered = [*["not asked"] * len(names), "", ""]
    return [line["title"] + kept, loss, perplexity, change, *answered]


def beside(lines: Sequence[Fields], title: Callable[[str], str]) -> Iterator[str]:
    """A sentence for each export that gave answers: how they differ from the model's to the same prompts."""
    for line in lines:
        if line["beside"]:
            model, changes = line["beside"]["model"], line["beside"]["changes"]
            told = ", ".join(
                f"{title(name)} {change_text(changes[name])} from {one['value']:.3f}"
                for name, one in model["metrics"].items()
            )
            yield f"{line['title']}, beside {TITLES[model['name']].lower()} on the same {line['answer_rows']} rows: {told}."


def metric_names(lines: Sequence[Fields]) -> list[str]:
    """The task's metrics, in the order in which they were asked for."""
    return list(next((line["metrics"] for line in lines if line["metrics"]), {}))


def _level(level: Fields) -> str:
    return f"{level['value']:.3f} [{level['low']:.3f}, {level['high']:.3f}]"
