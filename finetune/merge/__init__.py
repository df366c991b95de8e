"""Makes one plain model of base and adapter: several candidates, each measured against the graph that was trained."""

from finetune.merge.config import MergeConfig
from finetune.merge.stage import MergedModel, merge

__all__ = ["MergeConfig", "MergedModel", "merge"]
