"""report.html: one file with its style and pictures inside."""

from finetune.html import render
from finetune.report.answers import answers
from finetune.report.configuration import configuration_section
from finetune.report.files_section import files_section
from finetune.report.overview import overview
from finetune.report.provenance_section import checks_section, environment_section
from finetune.report.results import artifacts_section, merge_section, scores_section
from finetune.report.run_data import Fields, RunData
from finetune.report.titles import stage_title
from finetune.report.training_section import costs_section, data_section, training_section


def page(report: Fields, data: RunData) -> str:
    """Returns the whole page.

    Args:
        report: Content of report.json.
        data: The run folder, for the series behind the pictures.
    """
    return render(
        "report.html",
        report=report,
        missing_titles=list(map(stage_title, report["missing"])),
        overview=overview(report),
        scores=scores_section(report),
        artifacts=artifacts_section(report),
        answers=answers(report, data.samples),
        training=training_section(report, data),
        files=files_section(report, data),
        rows=data_section(report, data),
        examples=data.examples,
        costs=costs_section(report, data),
        merge=merge_section(report),
        checks=checks_section(report),
        environment=environment_section(report, data),
        configuration=configuration_section(data),
        preview="data/preview.html" if (data.run / "data" / "preview.html").is_file() else "",
    )
