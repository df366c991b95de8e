"""The adapter: which linear layers learn, in how many columns, from which start, and proof that every target matched."""

from finetune.lora.adapter import attach, cast_adapter, linear_layers, prepare, resolve
from finetune.lora.calibration import read_documents
from finetune.lora.config import LoraConfig

__all__ = ["LoraConfig", "attach", "cast_adapter", "linear_layers", "prepare", "read_documents", "resolve"]
