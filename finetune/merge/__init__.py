"""Makes one plain model of base and adapter: several candidates, each measured against the graph that was trained.

merged = merge(config.merge, folder=Path("outputs/run/merge"), spec=spec, adapter=adapter, data=data, seed=1)
print(merged.chosen, merged.rule)
"""

from finetune.merge.config import MergeConfig
from finetune.merge.stage import merge

__all__ = ["MergeConfig", "merge"]
