"""Adapts a base with LoRA: selects linear layers, initialises the adapter, and sets its dtype.

adapted = attach(model, config.lora, upcast="norms", checkpointing=True, seed=1)
adapted.print_trainable_parameters()
"""

from finetune.lora.adapter import attach, cast_adapter, prepare_for_training, read_documents
from finetune.lora.config import LoraConfig

__all__ = ["LoraConfig", "attach", "cast_adapter", "prepare_for_training", "read_documents"]
