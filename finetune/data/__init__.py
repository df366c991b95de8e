"""Turns rows on disk into token ids with loss masks, and a ledger that accounts for each row.

Example::

    from finetune.data import explain, prepare

    data = prepare(config.data, folder=Path("outputs/mine/data"), tokenizer=tokenizer, seed=17)
    print(data.rows, data.trained_tokens, data.warnings)
    explain(data.folder, "train.jsonl:137", tokenizer)
"""

from finetune.data.config import DataConfig, SourceConfig
from finetune.data.prepare import explain, prepare, prove

__all__ = ["DataConfig", "SourceConfig", "explain", "prepare", "prove"]
