"""report.md: the run in short, for a terminal, an issue or a model card."""

from collections.abc import Iterable, Sequence

from finetune.html.format import count, duration, interval, level, millions, number, percent, size
from finetune.inference.artifacts import (
    describe_answer_changes,
    describe_conditions,
    describe_rows,
    metric_names,
    table_cells,
    table_headers,
)
from finetune.report.overview import VERDICTS, headline_is_share, quantization_name, short_name
from finetune.report.run_data import Fields
from finetune.report.titles import ARTIFACTS, metric_title, stage_title


def markdown(report: Fields) -> str:
    """Returns the content of report.json as a page of Markdown."""
    sections = (_status, headline, _use, _summary, _artifacts, _merge, _checks, _exports, _costs, _decisions)
    parts = [f"# {report['run']}", *(section(report) for section in sections)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _status(report: Fields) -> str:
    if not report["missing"]:
        return f"Status: {report['status']}."
    return f"Status: {report['status']}. Not done: {', '.join(map(stage_title, report['missing']))}."


def headline(report: Fields) -> str:
    """Writes the score before and after as one sentence; empty where nothing was evaluated."""
    scores = report["headline"]
    if scores is None:
        return ""
    share = headline_is_share(scores)
    before, after = (level(scores[side]["value"], share=share) for side in ("before", "after"))
    between = interval(scores["after"], share=share)
    between = f" (95 % interval {between})" if between else ""
    return (
        f"**{metric_title(scores['metric'])}: {before} → {after}**{between}, "
        f"{ARTIFACTS[scores['from']].lower()} to {ARTIFACTS[scores['artifact']].lower()}, "
        f"{count(scores['rows'])} held-out rows. "
        f"{VERDICTS[scores['verdict']]}"
    )


def _summary(report: Fields) -> str:
    model, data, train = report["model"], report["data"] or {}, report["train"] or {}
    weights = f"{millions(model['parameters'])} weights, {quantization_name(model['quantization'])}"
    steps = f"{count(train.get('steps'))} steps in {duration(train.get('seconds'))}"
    rows = [
        ["Base model", f"{short_name(model['name'])}, {weights}"],
        ["Trained weights", count(model["trainable_parameters"])],
        ["Training rows", f"{count(data.get('train_rows'))} ({count(data.get('trained_tokens'))} trained tokens)"],
        ["Training", f"{steps}, {count(train.get('tokens_per_second'))} tokens/s"],
        ["Loss", f"{number(train.get('first_loss'))} → {number(train.get('final_loss'))}"],
        ["Command", f"`{report['command']}`"],
    ]
    return _table(["", "this run"], rows)


def _artifacts(report: Fields) -> str:
    entries = report["artifacts"]
    if not entries:
        return ""
    rows = [table_cells(entry, metric_names(entries)) for entry in entries]
    parts = [
        describe_rows(entries),
        _table(table_headers(entries, metric_title), rows),
        *describe_answer_changes(entries, metric_title),
        *describe_conditions(report["eval"], report["merge"]),
    ]
    return _section("Every artifact on the same rows", *parts)


def _merge(report: Fields) -> str:
    if report["merge"] is None:
        return ""
    rows = []
    for candidate in report["merge"]["candidates"] or []:
        name = candidate["name"]
        title = f"**{name}**" if name == report["merge"]["chosen"] else name
        rows.append([title, number(candidate.get("kl")), percent(candidate.get("top1_agreement"))])
    return _section("Merge", _table(["Candidate (chosen in bold)", "KL to the trained model", "Same top token"], rows))


def _checks(report: Fields) -> str:
    checks = (report["preflight"] or {}).get("checks") or []
    lines = [f"- {'PASS' if check['passed'] else 'FAIL'}: {check.get('sentence') or check['name']}" for check in checks]
    return _section("Checked before training", "\n".join(lines)) if lines else ""


def _exports(report: Fields) -> str:
    rows = [[export["format"], f"`{export['path']}`", size(export.get("bytes"))] for export in report["export"]]
    return _section("Exports", _table(["Format", "Path", "Size"], rows)) if rows else ""


def _use(report: Fields) -> str:
    commands = "\n".join(f"{use['command']}  # {use['title']}" for use in report["use"])
    return _section("Use it", f"```sh\n{commands}\n```") if commands else ""


def _costs(report: Fields) -> str:
    costs = {stage: cost for stage, cost in report["stages"].items() if cost["seconds"] is not None}
    rows = [
        [stage_title(stage), duration(cost["seconds"]), size(cost["peak_rss_bytes"])] for stage, cost in costs.items()
    ]
    return _section("Time and memory", _table(["Stage", "Time", "Peak memory"], rows)) if rows else ""


def _decisions(report: Fields) -> str:
    reasons = [f"- {reason}" for reason in report["decisions"]]
    return _section("Decided automatically", "\n".join(reasons)) if reasons else ""


def _section(title: str, *parts: str) -> str:
    return "\n\n".join([f"## {title}", *parts])
