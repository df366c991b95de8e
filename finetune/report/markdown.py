"""report.md: the run in short, for a terminal, an issue or a model card."""

from collections.abc import Iterable, Sequence

from finetune.inference.artifacts import (
    describe_answer_changes,
    describe_rows,
    metric_names,
    table_cells,
    table_headers,
)
from finetune.report.format import (
    ARTIFACTS,
    count,
    duration,
    figure,
    interval,
    is_share,
    metric_title,
    millions,
    number,
    percent,
    size,
    stage_title,
)
from finetune.report.overview import VERDICTS, quantization_name, short_name
from finetune.report.run_data import Fields


def markdown(report: Fields) -> str:
    """The content of report.json as a page of Markdown."""
    parts = [f"# {report['run']}", _status(report), _headline(report), _facts(report), _artifacts(report), _merge(report), _proofs(report),
             _exports(report), _costs(report), _decisions(report)]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines
    )


def _status(report: Fields) -> str:
    if not report["missing"]:
        return f"Status: {report['status']}."
    return f"Status: {report['status']}. Not done: {', '.join(stage_title(stage) for stage in report['missing'])}."


def _headline(report: Fields) -> str:
    found = report["headline"]
    if found is None:
        return ""
    before, after = found["before"], found["after"]
    share = is_share([value for value in (before["value"], after["value"]) if value is not None])
    words = interval(after, share=share)
    return (
        f"**{metric_title(found['metric'])}: {figure(before['value'], share=share)} → {figure(after['value'], share=share)}**"
        + (f" (95 % interval {words})" if words else "")
        + f", base model to {ARTIFACTS[found['artifact']].lower()}, {count(found['rows'])} held-out rows. {VERDICTS[found['verdict']]}"
    )


def _facts(report: Fields) -> str:
    model, data, train = report["model"], report["data"] or {}, report["train"] or {}
    base = f"{short_name(model['name'])}, {millions(model['parameters'])} weights, {quantization_name(model['quantization'])}"
    speed = f"{count(train.get('steps'))} steps in {duration(train.get('seconds'))}, {count(train.get('tokens_per_second'))} tokens/s"
    rows = [
        ["Base model", base],
        ["Trained weights", count(model["trainable_parameters"])],
        ["Training rows", f"{count(data.get('train_rows'))} ({count(data.get('trained_tokens'))} trained tokens)"],
        ["Training", speed],
        ["Loss", f"{number(train.get('first_loss'))} → {number(train.get('final_loss'))}"],
        ["Command", f"`{report['command']}`"],
    ]
    return _table(["", "this run"], rows)


def _artifacts(report: Fields) -> str:
    lines = report["artifacts"]
    if not lines:
        return ""
    listed = _table(table_headers(lines, metric_title), [table_cells(line, metric_names(lines)) for line in lines])
    return "\n\n".join(
        [
            "## Every artifact on the same rows",
            describe_rows(lines),
            listed,
            *describe_answer_changes(lines, metric_title),
        ]
    )


def _merge(report: Fields) -> str:
    if report["merge"] is None:
        return ""
    rows = []
    for item in report["merge"]["candidates"] or []:
        name = f"**{item['name']}**" if item["name"] == report["merge"]["chosen"] else item["name"]
        rows.append([name, number(item.get("kl")), percent(item.get("top1_agreement"))])
    return "## Merge\n\n" + _table(["Candidate (chosen in bold)", "KL to the trained model", "Same top token"], rows)


def _proofs(report: Fields) -> str:
    found = (report["preflight"] or {}).get("proofs") or []
    return "## Proved before training\n\n" + "\n".join(
        f"- {'holds' if item['passed'] else 'FAILS'}: {item.get('sentence') or item['name']}" for item in found
    ) if found else ""  # fmt: skip


def _exports(report: Fields) -> str:
    rows = [[item["format"], f"`{item['path']}`", size(item.get("bytes"))] for item in report["export"]]
    return "## Exports\n\n" + _table(["Format", "Path", "Size"], rows) if rows else ""


def _costs(report: Fields) -> str:
    rows = [[stage_title(stage), duration(cost["seconds"]), size(cost["peak_rss_bytes"])]
            for stage, cost in report["stages"].items() if cost["seconds"] is not None]  # fmt: skip
    return "## Time and memory\n\n" + _table(["Stage", "Time", "Peak memory"], rows) if rows else ""


def _decisions(report: Fields) -> str:
    return (
        "## Decided automatically\n\n" + "\n".join(f"- {reason}" for reason in report["decisions"])
        if report["decisions"]
        else ""
    )
