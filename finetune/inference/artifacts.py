"""Collects what evaluation, merge and exports measured on the same held-out rows into one list and one table."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.console import change_text

Fields = Mapping[str, Any]

BEFORE = {"base": None, "base_quantized": ("quantization", "base"), "adapter": ("tuning", "base, quantized")}
"""Key of the change that the evaluation measured, and the artifact before it."""

TITLES = {
    "base": "Base model",
    "base_quantized": "Base, quantized",
    "adapter": "Quantized base + adapter",
    "merged": "Merged model",
}

ADAPTER, MERGED = "adapter", "merged"
MADE_FROM = {"adapter": "adapter", "gguf_lora": "adapter on the original base", "onnx": "merged, in float32"}
"""What an export's loss is compared with, by format; the merged model by default."""

FIGURES = ("loss", "loss_low", "loss_high", "perplexity", "tokens")
ANSWERS = ("metrics", "stop_rate", "mean_tokens", "repetition")


def collect_artifacts(scores: Fields | None, merge: Fields | None, exports: Sequence[Fields]) -> list[dict[str, Any]]:
    """Returns one entry for each artifact, in the order in which they are made.

    Args:
        scores: The evaluation's product; None where it is missing.
        merge: The merge's product; None where it is missing.
        exports: Descriptions of the exports; those without a runtime are left out.

    Returns:
        Entries with the keys ``title``, ``kept`` (the merge that was written), ``loss_rows``, ``loss``, ``loss_low``,
        ``loss_high``, ``perplexity``, ``tokens``, ``change`` (of the loss: ``from``, ``difference``, ``low``, ``high``;
        or None), ``answer_rows`` (0 without answers), ``metrics`` (by name: ``value``, ``low``, ``high``),
        ``stop_rate``, ``mean_tokens``, ``repetition`` and ``beside`` (``model``, ``changes``; or None). Missing figures
        are None."""
    scores, merge = scores or {}, merge or {}
    return [*_evaluated(scores), *_merged(scores, merge), *_exported(exports)]


def _evaluated(scores: Fields) -> Iterator[dict[str, Any]]:
    for name, step in BEFORE.items():
        figures = scores.get("artifacts", {}).get(name)
        if figures:
            measured = (scores.get("changes") or {}).get(step[0]) if step else None
            change = {"from": step[1], **measured["loss"]} if step and measured else None
            rows = {"loss_rows": scores.get("loss_rows"), "answer_rows": scores.get("rows")}
            yield _entry(TITLES[name], figures, rows=rows, change=change)


def _merged(scores: Fields, merge: Fields) -> Iterator[dict[str, Any]]:
    measured = scores.get("artifacts", {}).get(MERGED) or {}
    for candidate in merge.get("candidates") or []:
        kept = candidate["name"] == merge["chosen"]
        figures = {**candidate, **measured} if kept else candidate
        change = {"from": ADAPTER, **candidate["loss_difference"]} if "loss_difference" in candidate else None
        rows = {"loss_rows": merge.get("loss_rows"), "answer_rows": scores.get("rows") if kept and measured else 0}
        yield _entry(f"Merged: {candidate['name']} + adapter", figures, rows=rows, change=change, kept=kept)


def _exported(exports: Sequence[Fields]) -> Iterator[dict[str, Any]]:
    for export in exports:
        parity = export["parity"]
        if not parity:
            continue
        from_merged = parity.get("cost", {})  # in another dtype than the model that it was compared with
        before = MERGED if from_merged else MADE_FROM.get(export["format"], MERGED)
        difference = from_merged.get("loss_difference") or parity.get("loss_difference")
        answers = parity.get("answers") or {}
        yield _entry(
            f"Export {Path(export['path']).name}",
            {**parity, **answers},
            rows={"loss_rows": parity.get("rows"), "answer_rows": answers.get("rows")},
            change={"from": before, **difference} if difference else None,
            beside={"model": answers["model"], "changes": answers["changes"]} if answers else None,
        )


def _entry(
    title: str,
    figures: Fields,
    *,
    rows: Mapping[str, int | None],
    change: Fields | None,
    kept: bool = False,
    beside: Fields | None = None,
) -> dict[str, Any]:
    answers: dict[str, Any] = {**dict.fromkeys(ANSWERS), "metrics": {}}
    if rows["answer_rows"]:
        answers = {name: figures.get(name) for name in ANSWERS}
    return {
        "title": title,
        "kept": kept,
        "loss_rows": rows["loss_rows"] or 0,
        **{name: figures.get(name) for name in FIGURES},
        "change": change,
        "answer_rows": rows["answer_rows"] or 0,
        **answers,
        "beside": beside,
    }


def describe_rows(entries: Sequence[Fields]) -> str:
    """Returns a caption: which rows were measured (``The same 160 held-out rows ...``), and where fewer were."""
    most = {key: max((entry[key] for entry in entries), default=0) for key in ("loss_rows", "answer_rows")}
    text = f"The same {most['loss_rows']} held-out rows went through every artifact for the loss (nats per token)"
    text += f", and those asked for answers answered the first {most['answer_rows']}" if most["answer_rows"] else ""
    fewer = [
        f"{entry['title']}: {entry[key]} rows for the {measure}"
        for entry in entries
        for key, measure in (("loss_rows", "loss"), ("answer_rows", "answers"))
        if 0 < entry[key] < most[key]
    ]
    return f"{text}. Brackets are 95 % intervals; a change is paired by row." + (
        f" Fewer: {'; '.join(fewer)}." if fewer else ""
    )


def describe_conditions(scores: Fields | None, merge: Fields | None) -> Iterator[str]:
    """Yields a sentence for each artifact that was left out, on the dtypes, and on batches that were halved."""
    scores, merge = scores or {}, merge or {}
    for name, reason in (scores.get("left_out") or {}).items():
        yield f"Not measured: {TITLES[name].lower()}; {reason}."
    by_dtype: dict[str, list[str]] = {}
    for name, dtype in (scores.get("compute_dtypes") or {}).items():
        by_dtype.setdefault(dtype, []).append(TITLES[name].lower())
    if by_dtype:
        yield "; ".join(f"Computed in {dtype}: {', '.join(names)}" for dtype, names in by_dtype.items()) + "."
    halvings = {"merge": merge.get("halvings") or 0, "eval": scores.get("halvings") or 0}
    for stage, count in halvings.items():
        if count:
            yield f"Memory ran out {count} times in {stage}, and batches were halved each time."


def table_headers(entries: Sequence[Fields], title: Callable[[str], str]) -> list[str]:
    """Returns the titles of the table's columns; ``title`` returns that of a metric."""
    names = metric_names(entries)
    return [
        "Artifact",
        "Loss",
        "Perplexity",
        "Change of the loss",
        *map(title, names),
        *(["Ended", "Tokens"] if names else []),
    ]


def table_cells(entry: Fields, names: Sequence[str]) -> list[str]:
    """Returns a row of the table. ``not asked``: no answers; a dash: not measured."""
    kept = " (kept)" if entry["kept"] else ""
    loss = "–" if entry["loss"] is None else f"{entry['loss']:.4f}"
    if entry["loss_low"] is not None:
        loss += f" [{entry['loss_low']:.4f}, {entry['loss_high']:.4f}]"
    perplexity = "–" if entry["perplexity"] is None else f"{entry['perplexity']:.3f}"
    change = f"{change_text(entry['change'])} from {entry['change']['from']}" if entry["change"] else "–"
    if not names:
        answered = []
    elif entry["metrics"]:
        answered = [
            *[_level(entry["metrics"][name]) for name in names],
            f"{entry['stop_rate']:.2f}",
            f"{entry['mean_tokens']:.1f}",
        ]
    else:
        answered = [*["not asked"] * len(names), "", ""]
    return [entry["title"] + kept, loss, perplexity, change, *answered]


def describe_answer_changes(entries: Sequence[Fields], title: Callable[[str], str]) -> Iterator[str]:
    """Yields a sentence for each export with answers: how they differ from the model's answers to the same prompts."""
    for entry in entries:
        if entry["beside"]:
            model, changes = entry["beside"]["model"], entry["beside"]["changes"]
            differences = ", ".join(
                f"{title(name)} {change_text(changes[name])} from {level['value']:.3f}"
                for name, level in model["metrics"].items()
            )
            before, rows = TITLES[model["name"]].lower(), entry["answer_rows"]
            yield f"{entry['title']}, compared with {before} on the same {rows} rows: {differences}."


def metric_names(entries: Sequence[Fields]) -> list[str]:
    """Returns the names of the task's metrics, in the order of the configuration."""
    return list(next((entry["metrics"] for entry in entries if entry["metrics"]), {}))


def _level(level: Fields) -> str:
    return f"{level['value']:.3f} [{level['low']:.3f}, {level['high']:.3f}]"
