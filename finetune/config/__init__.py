"""The configuration of a run: typed, composed by Hydra from ``conf/``, and checked before anything starts.

from finetune.config import load, to_yaml

config = load(["+experiment=quickstart", "lora.rank=8"])   # ConfigError names every problem
config.lora.rank                                           # 8
print(to_yaml(config))
"""

from finetune.config.compose import compose, load, to_dict, to_yaml
from finetune.config.schema import RunConfig

__all__ = ["RunConfig", "compose", "load", "to_dict", "to_yaml"]
