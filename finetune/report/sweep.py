"""The jobs of a sweep on one page: a table and a picture. Jobs that failed or were stopped are in it with their reason."""

from html import escape
from pathlib import Path

from finetune.console import log, table
from finetune.errors import ConfigError
from finetune.files import atomic_write_text
from finetune.report.format import MISSING, duration, number, size
from finetune.report.markup import Html, figure, joined, mark, section, tag
from finetune.report.markup import table as html_table
from finetune.report.page import STYLE
from finetune.report.run_data import Fields
from finetune.report.sweep_picture import parallel_picture
from finetune.run import write_json
from finetune.sweep import Job, jobs_in

SCHEMA = 1
REASON_WIDTH = 60
"""Letters of a reason that fit into the console's table; the page has all of it."""


def report_sweep(folder: Path) -> bool:
    """Prints the jobs' table and writes report.json and report.html into the sweep's folder.

    Returns:
        Whether every job is done or was pruned.

    Raises:
        ConfigError: The folder holds no job.
    """
    jobs = jobs_in(folder)
    if not jobs:
        raise ConfigError(f"sweep.name: {folder} holds no job of a sweep; start one with --multirun, or give run.root")
    content = summarize(folder.name, jobs)
    table(
        "sweep",
        [*content["settings"], *HEADS],
        [_cells(job, content["settings"], width=REASON_WIDTH) for job in content["jobs"]],
    )
    write_json(folder / "report.json", content)
    atomic_write_text(folder / "report.html", page(content))
    log(
        "sweep",
        f"{_count(content['jobs'])}; {best(content['jobs'])}",
        f"the whole sweep on one page: {folder / 'report.html'}",
    )
    return all(job["state"] in ("done", "pruned") for job in content["jobs"])


def summarize(name: str, jobs: list[Job]) -> Fields:
    """report.json of a sweep. A setting that a job does not have, and a figure that it did not reach, is null."""
    settings = list(dict.fromkeys(key for job in jobs for key in job.changed))
    return {
        "schema": SCHEMA,
        "sweep": name,
        "settings": settings,
        "jobs": [
            {
                "run": job.folder.name,
                "changed": {key: job.changed.get(key) for key in settings},
                "state": job.state,
                "reason": job.reason,
                "held_out": dict.fromkeys(("loss", "low", "high")) | job.held_out(),
                **job.cost(),
                "seconds": job.seconds,
            }
            for job in jobs
        ],
    }


HEADS = ("state", "held-out loss", "tokens/s", "peak memory", "time", "why")


def _cells(job: Fields, settings: list[str], *, width: int | None = None) -> list[str]:
    loss = job["held_out"]
    between = f" [{loss['low']:.4f}, {loss['high']:.4f}]" if loss["low"] is not None else ""
    reason = job["reason"]
    return [
        *[MISSING if job["changed"][key] is None else job["changed"][key] for key in settings],
        job["state"],
        MISSING if loss["loss"] is None else f"{loss['loss']:.4f}{between}",
        number(job["tokens_per_second"]),
        size(job["peak_bytes"]),
        duration(job["seconds"]),
        reason if width is None or len(reason) <= width else f"{reason[: width - 1]}…",
    ]


def page(content: Fields) -> str:
    """The whole page; it asks the network for nothing and runs no script."""
    settings, jobs = content["settings"], content["jobs"]
    measured = [job for job in jobs if job["held_out"]["loss"] is not None and job["state"] != "failed"]
    caption = (
        "A line is a job: its settings, then its held-out loss in nats a trained token. The best one stands out; faint lines were stopped."
        " Jobs without a loss are in the table alone."
    )
    order = sorted(jobs, key=lambda job: (job not in measured, job["state"] != "done", job["held_out"]["loss"] or 0))
    rows = [[tag("code", job["run"]), *_marked(_cells(job, settings), job, len(settings))] for job in order]
    title = escape(content["sweep"])
    parts = [
        section("picture", "What the settings did", figure(parallel_picture(settings, measured), caption))
        if measured
        else "",
        section(
            "jobs",
            "Jobs",
            html_table(["job", *settings, *HEADS], rows, text_columns=len(settings) + 2, strong=_strong(order)),
        ),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{title}: a sweep</title>\n'
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style></head>\n<body>\n"
        f'<header><div><span class="eyebrow">Sweep</span><h1>{title}</h1></div></header>\n'
        f"<main>{tag('p', f'{_count(jobs)}; {best(jobs)}.')}{joined(parts)}</main>\n"
        "<footer>Written by finetune. Each job's own report is in its folder; the figures are in report.json beside this page.</footer>"
        "</body></html>\n"
    )


def _marked(cells: list[str], job: Fields, at: int) -> list[object]:
    state: Html = mark(job["state"] == "done", job["state"])
    return [*cells[:at], state, *cells[at + 1 :]]


def _strong(order: list[Fields]) -> frozenset[int]:
    return (
        frozenset([0])
        if order and order[0]["state"] == "done" and order[0]["held_out"]["loss"] is not None
        else frozenset()
    )


def best(jobs: list[Fields]) -> str:
    """The finished job with the lowest held-out loss, and whether the next one may be as good."""
    done = sorted(
        (job for job in jobs if job["state"] == "done" and job["held_out"]["loss"] is not None),
        key=lambda job: job["held_out"]["loss"],
    )
    if not done:
        return "none has a held-out loss"
    first, *others = done
    said = f"lowest held-out loss: {first['run']}, {first['held_out']['loss']:.4f}"
    near = sum(
        1
        for job in others
        if (job["held_out"]["low"] or 0) <= (first["held_out"]["high"] or 0) and first["held_out"]["high"]
    )
    return f"{said}; {near} more within its interval's reach" if near else said


def _count(jobs: list[Fields]) -> str:
    states = [job["state"] for job in jobs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"{len(jobs)} {'job' if len(jobs) == 1 else 'jobs'}: {counts}"
