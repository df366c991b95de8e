"""Reads what the stages left in the run folder and writes three files at its top."""

import sys
from dataclasses import dataclass
from pathlib import Path

from finetune.console import log
from finetune.files import atomic_write_text
from finetune.report.markdown import headline, markdown
from finetune.report.page import page
from finetune.report.run_data import read_run
from finetune.report.summary import summarize
from finetune.run import write_json


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """Where the report is.

    Attributes:
        folder: The run folder.
        json: For programs; docs/report.md describes it.
        markdown: The run in short, as text.
        html: The run in full, one file that loads nothing from the network.
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
        status: What the caller knows of the run. ``complete`` becomes ``partial`` where a stage is missing.

    Returns:
        The files and the status that they state.

    Raises:
        ConfigError: The folder holds no run.
        DataError: A file in it is damaged.
    """
    data = read_run(run)
    content = summarize(data, status=status)
    json, markdown_file, html = (run / f"report.{kind}" for kind in ("json", "md", "html"))
    write_json(json, content)
    atomic_write_text(markdown_file, markdown(content))
    atomic_write_text(html, page(content, data))
    if content["missing"]:
        log("report", f"partial: {', '.join(content['missing'])} did not finish in this run")
    log("report", *filter(None, [headline(content).replace("**", "")]), f"the whole run on one page: {html}")
    for use in content["use"]:  # not wrapped, so that a command can be copied
        sys.stdout.write(f"{'use':<11}{use['title']:<14} {use['command']}\n")
    return ReportFiles(folder=run, json=json, markdown=markdown_file, html=html, status=content["status"])
