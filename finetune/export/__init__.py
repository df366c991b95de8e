"""Exports adapter, merged model and card; each export is loaded in its own runtime and compared before it counts.

Example::

    exports = export(config.export, folder=folder, spec=spec, adapter=adapter, merged=merged, scores=scores, ...)
    exports.exports[0].path  # "export/adapter"
    model, tokenizer = load("outputs/my-run")
"""

from finetune.export.config import ExportConfig
from finetune.export.loader import load
from finetune.export.stage import export

__all__ = ["ExportConfig", "export", "load"]
