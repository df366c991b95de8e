"""The verb: reads what the stages left in the run folder and writes three files at its top."""

from dataclasses import dataclass
from pathlib import Path

from finetune.console import log
from finetune.files import atomic_write_text
from finetune.report.markdown import markdown
from finetune.report.page import page
from finetune.report.run_data import gather
from finetune.report.summary import summarize
from finetune.run import write_json


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """Where the report is.

    Attributes:
        folder: The run folder.
        json: The contract, for programs; see docs/report.md.
        markdown: The same in short, as text.
        html: The same in full, one file that needs no network.
        status: ``complete``, or ``partial`` where stages are missing.
    """

    folder: Path
    json: Path
    markdown: Path
    html: Path
    status: str


def report(run: Path, *, status: str = "complete") -> ReportFiles:
    """Writes report.json, report.md and report.html from whatever stages have finished.

    Args:
        run: The run folder.
        status: What the caller knows of the run; ``complete`` holds only where no stage is missing.

    Returns:
        The files and the status that they state.

    Raises:
        ConfigError: The folder holds no run.
        DataError: A file in it is damaged.
    """
    facts = gather(run)
    content = summarize(facts, status=status)
    files = ReportFiles(
        folder=run, json=run / "report.json", markdown=run / "report.md", html=run / "report.html", status=content["status"]
    )  # fmt: skip
    write_json(files.json, content)
    atomic_write_text(files.markdown, markdown(content))
    atomic_write_text(files.html, page(content, facts))
    if content["missing"]:
        log("report", f"partial: {', '.join(content['missing'])} did not finish in this run")
    log("report", f"the whole run on one page: {files.html}")
    return files
