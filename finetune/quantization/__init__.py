"""How the frozen base is stored: what to pass to the loader, and what must hold afterwards."""

from finetune.quantization.bnb import dense, loader_arguments, prepare, protect, quantized_layers
from finetune.quantization.config import QuantizationConfig, spec
from finetune.quantization.copy import copy_of

__all__ = ["QuantizationConfig", "copy_of", "dense", "loader_arguments", "prepare", "protect", "quantized_layers", "spec"]
