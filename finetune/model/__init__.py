"""Finds the base model, describes how it is loaded, and loads it.

spec = ModelSpec(base=fetch(config.model), config=config.model, quantization=config.quantization, placement=placement)
tokenizer, model = spec.load_tokenizer(), spec.load()
"""

from finetune.model.base import Base, ModelFiles, fetch
from finetune.model.config import ModelConfig
from finetune.model.spec import ModelSpec

__all__ = ["Base", "ModelConfig", "ModelFiles", "ModelSpec", "fetch"]
