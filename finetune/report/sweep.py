"""The jobs of a sweep on one page: a table and a picture, with the reason why a job failed or was stopped."""

from pathlib import Path

from finetune.console import log, table
from finetune.errors import ConfigError
from finetune.files import atomic_write_text
from finetune.html import Figure, render
from finetune.html.format import MISSING, duration, number, size
from finetune.report.run_data import Fields
from finetune.report.sweep_picture import parallel_picture
from finetune.run import write_json
from finetune.sweep import Job, jobs_in

SCHEMA = 1
HEADS = ["state", "held-out loss", "tokens/s", "peak memory", "time", "why"]
REASON_WIDTH = 60
"""Letters of a reason that fit into the console's table; the page has all of it."""

CAPTION = (
    "A line is a job: its settings, then its held-out loss in nats per trained token. The best one stands out; "
    "faint lines were stopped. Jobs without a loss are only in the table."
)


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
    cells = [_cells(job, content["settings"], width=REASON_WIDTH) for job in content["jobs"]]
    table("sweep", [*content["settings"], *HEADS], cells)
    write_json(folder / "report.json", content)
    atomic_write_text(folder / "report.html", page(content))
    log("sweep", _summary(content["jobs"]), f"the whole sweep on one page: {folder / 'report.html'}")
    return all(job["state"] in ("done", "pruned") for job in content["jobs"])


def summarize(name: str, jobs: list[Job]) -> Fields:
    """Returns report.json of a sweep. A setting that a job does not have, or a figure that it lacks, is null."""
    settings = list(dict.fromkeys(key for job in jobs for key in job.changed))
    return {"schema": SCHEMA, "sweep": name, "settings": settings, "jobs": [_job(job, settings) for job in jobs]}


def _job(job: Job, settings: list[str]) -> Fields:
    return {
        "run": job.folder.name,
        "changed": {key: job.changed.get(key) for key in settings},
        "state": job.state,
        "reason": job.reason,
        "held_out": dict.fromkeys(("loss", "low", "high")) | job.held_out(),
        **job.cost(),
        "seconds": job.seconds,
    }


def _cells(job: Fields, settings: list[str], *, width: int | None = None) -> list[str]:
    loss, reason = job["held_out"], job["reason"]
    between = f" [{loss['low']:.4f}, {loss['high']:.4f}]" if loss["low"] is not None else ""
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
    """Returns the whole page for the content of a sweep's report.json."""
    jobs = content["jobs"]
    measured = [job for job in jobs if job["held_out"]["loss"] is not None and job["state"] != "failed"]
    order = sorted(jobs, key=lambda job: (job not in measured, job["state"] != "done", job["held_out"]["loss"] or 0))
    ranked = _ranked(jobs)
    return render(
        "sweep.html",
        content=content,
        summary=_summary(jobs),
        picture=Figure(picture=parallel_picture(content["settings"], measured), caption=CAPTION),
        heads=HEADS,
        jobs=[(job, _cells(job, content["settings"])) for job in order],
        best=ranked[0]["run"] if ranked else None,
    )


def _ranked(jobs: list[Fields]) -> list[Fields]:
    """Returns the finished jobs, the lowest held-out loss first."""
    done = [job for job in jobs if job["state"] == "done" and job["held_out"]["loss"] is not None]
    return sorted(done, key=lambda job: job["held_out"]["loss"])


def _summary(jobs: list[Fields]) -> str:
    """Returns the number of jobs by state, the best job, and how many others may be as good."""
    states = [job["state"] for job in jobs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    text = f"{len(jobs)} {'job' if len(jobs) == 1 else 'jobs'}: {counts}"
    if not (ranked := _ranked(jobs)):
        return f"{text}; none has a held-out loss"
    best, *others = ranked
    text += f"; lowest held-out loss: {best['run']}, {best['held_out']['loss']:.4f}"
    high = best["held_out"]["high"]
    close = sum(bool(high) and (job["held_out"]["low"] or 0) <= high for job in others)
    return f"{text}; {close} {'others are' if close > 1 else 'other is'} not clearly worse" if close else text
