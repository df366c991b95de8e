"""The files of a run that a reader opens, as links relative to the report."""

from urllib.parse import quote

from markupsafe import Markup

from finetune.html import Table
from finetune.report.run_data import Fields, RunData

FILES = {
    "config.yaml": "the whole configuration",
    "data/preview.html": "rows with the text that is trained on",
    "data/ledger.parquet": "what became of each input row",
    "train/metrics.jsonl": "loss, learning rate and more of each step",
    "train/adapter": "the adapter as trained, on its quantized base",
    "merge/model": "the merged model",
    "eval/samples.jsonl": "the answers of each artifact to each held-out row, with their scores",
}


def files_section(report: Fields, data: RunData) -> Table:
    """Collects the files that are there, and the exports."""
    files = {path: meaning for path, meaning in FILES.items() if (data.run / path).exists()}
    files |= {export["path"]: f"export: {export['format']}" for export in report["export"]}
    link = Markup('<a href="{}"><code>{}</code></a>')
    rows = [[link.format(quote(path), path), meaning] for path, meaning in files.items()]
    return Table(header=["Path", "What it is"], rows=rows, text_columns=2)
