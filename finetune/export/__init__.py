"""What leaves the house: adapter, merged weights, card; each opened again by its own runtime before it counts."""

from finetune.export.config import ExportConfig
from finetune.export.loader import load
from finetune.export.stage import export

__all__ = ["ExportConfig", "export", "load"]
