"""The run on one page: report.json for programs, report.md for a terminal or an issue, report.html for people."""

from finetune.report.verb import ReportFiles, report

__all__ = ["ReportFiles", "report"]
