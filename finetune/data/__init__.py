"""Rows on disk become token ids with masks, and a ledger that says what happened to each row."""

from finetune.data.config import DataConfig, SourceConfig
from finetune.data.prepare import explain, prepare
from finetune.data.product import PreparedData

__all__ = ["DataConfig", "PreparedData", "SourceConfig", "explain", "prepare"]
