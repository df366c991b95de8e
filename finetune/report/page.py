"""report.html: one file with its style and pictures inside; it asks the network for nothing and runs no script."""

from html import escape
from pathlib import Path

from finetune.report import provenance_section, results, training_section
from finetune.report.answers import answers
from finetune.report.format import stage_title
from finetune.report.markup import joined
from finetune.report.overview import hero
from finetune.report.run_data import Facts, Fields

STYLE = Path(__file__).with_name("page.css")
STATUS = {"complete": "complete", "partial": "stopped early"}


def page(report: Fields, facts: Facts) -> str:
    """The whole page from report.json's content and the series behind its figures."""
    parts = [
        results.scores(report),
        results.artifacts(report),
        answers(report, facts.samples),
        training_section.learning(report, facts),
        training_section.data(report, facts),
        training_section.costs(report, facts),
        results.merged(report),
        results.exported(report),
        provenance_section.proofs(report),
        provenance_section.decisions(report),
        provenance_section.environment(report, facts),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(report["run"])}: fine-tuning report</title>\n'
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style></head>\n<body>\n{_header(report)}\n"
        f"<main>{_missing(report)}{hero(report, facts.samples)}\n{joined(parts)}</main>\n"
        "<footer>Written by finetune. The figures are in report.json beside this page.</footer></body></html>\n"
    )


def _header(report: Fields) -> str:
    status = report["status"]
    return (
        f'<header><div><span class="eyebrow">Fine-tuning report</span><h1>{escape(report["run"])}</h1></div>'
        f'<span class="chip {escape(status)}">{escape(STATUS.get(status) or status)}</span></header>'
    )


def _missing(report: Fields) -> str:
    if not report["missing"]:
        return ""
    names = ", ".join(map(stage_title, report["missing"]))
    return f'<p class="notice"><b>This run stopped early.</b> Not done: {escape(names)}. What was done is below.</p>'
