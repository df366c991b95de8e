"""Rows on disk become token ids with masks, and a ledger that says what happened to each row."""

from finetune.data.config import DataConfig, SourceConfig
from finetune.data.prepare import explain, prepare

__all__ = ["DataConfig", "SourceConfig", "explain", "prepare"]
