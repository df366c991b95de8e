"""What came out: the scores of the four artifacts and the merge candidates."""

from __future__ import annotations

from finetune.html import Figure, Table
from finetune.html.format import MISSING, is_share, number, percent, signed, size
from finetune.inference.artifacts import (
    describe_answer_changes,
    describe_conditions,
    describe_rows,
    metric_names,
    table_cells,
    table_headers,
)
from finetune.report.intervals import agreement_picture, artifact_picture, change_picture
from finetune.report.run_data import Fields
from finetune.report.summary import headline_metric
from finetune.report.titles import ARTIFACTS, CHANGES, metric_title


def scores_section(report: Fields) -> Fields | None:
    """Collects the scores; None without an evaluation."""
    scores = report["eval"]
    if scores is None:
        return None
    artifacts, changes = scores["artifacts"], scores.get("changes") or {}
    headline = headline_metric(scores)
    names = sorted(metric_names(report["artifacts"]), key=lambda name: name != headline)
    return {
        "figures": [figure for name in names for figure in _metric_figures(artifacts, changes, name)],
        "perplexity_changes": [
            f"{CHANGES[name].lower()} {signed(changes[name]['perplexity']['difference'], share=False)}"
            for name in CHANGES
            if "perplexity" in changes.get(name, {})
        ],
        "forgetting": Figure(
            picture=change_picture(changes, "general_loss", share=False),
            caption="Change of the loss on general text that resembles no training row, in nats per token. "
            "To the right of zero something was forgotten.",
            title="What the model forgot",
        ),
        "tasks": _tasks(artifacts),
    }


def _metric_figures(artifacts: Fields, changes: Fields, name: str) -> list[Figure]:
    values = [item["metrics"][name]["value"] for item in artifacts.values() if name in (item.get("metrics") or {})]
    share = is_share(values)
    title = f"{metric_title(name)}: what each step changed{', in points' if share else ''}"
    return [
        Figure(picture=artifact_picture(artifacts, name), title=metric_title(name)),
        Figure(picture=change_picture(changes, name, share=share), title=title),
    ]


def _tasks(artifacts: Fields) -> Table:
    """Returns the scores of lm-eval's tasks with their standard errors."""
    results = {name: item["harness"]["tasks"] for name, item in artifacts.items() if item.get("harness")}
    columns = {
        (task, metric) for tasks in results.values() for task, result in tasks.items() for metric in result["metrics"]
    }
    rows = []
    for task, metric in sorted(columns):
        scores = [tasks[task]["metrics"].get(metric) if task in tasks else None for tasks in results.values()]
        shown = [f"{number(score['value'])} ± {number(score['stderr'])}" if score else MISSING for score in scores]
        rows.append([task, metric, *shown])
    return Table(header=["lm-eval task", "Metric", *map(ARTIFACTS.__getitem__, results)], rows=rows, text_columns=2)


def artifacts_section(report: Fields) -> Fields | None:
    """Collects every artifact, from the base to each export; None where nothing was measured."""
    entries = report["artifacts"]
    if not entries:
        return None
    names = metric_names(entries)
    kept = frozenset(index for index, entry in enumerate(entries) if entry["kept"])
    table = Table(
        header=table_headers(entries, metric_title), rows=[table_cells(entry, names) for entry in entries], strong=kept
    )
    return {
        "sentence": describe_rows(entries),
        "table": table,
        "remarks": [
            *describe_answer_changes(entries, metric_title),
            *describe_conditions(report["eval"], report["merge"]),
        ],
    }


def merge_section(report: Fields) -> Fields | None:
    """Collects the candidates; None without a merge."""
    merge = report["merge"]
    if merge is None:
        return None
    candidates, reloaded = merge["candidates"] or [], merge.get("reloaded") or {}
    rows = [
        [
            f"{candidate['name'].replace('_', ' ')} + adapter",
            number(candidate.get("kl")),
            percent(candidate.get("top1_agreement")),
            size(candidate.get("bytes")),
        ]
        for candidate in candidates
    ]
    chosen = frozenset(index for index, candidate in enumerate(candidates) if candidate["name"] == merge["chosen"])
    return {
        "agreement": Figure(
            picture=agreement_picture(candidates, merge["chosen"]),
            caption="KL to the model as trained, on a logarithmic axis; further left is closer.",
        ),
        "candidates": Table(header=["Weights", "KL", "Same top token", "Size"], rows=rows, strong=chosen),
        "reloaded": [
            f"{title} {number(reloaded[name])}" for name, title in (("kl", "KL"), ("loss", "loss")) if name in reloaded
        ],
    }
