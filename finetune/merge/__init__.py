"""Merges base and adapter into one dense model: builds candidates and compares each with the trained model.

merged = merge(config.merge, folder=Path("outputs/run/merge"), spec=spec, adapter=adapter, data=data, seed=1)
print(merged.chosen, merged.rule)
"""

from finetune.merge.config import MergeConfig
from finetune.merge.stage import merge

__all__ = ["MergeConfig", "merge"]
