"""How the frozen base is stored: what to pass to the loader, and what must hold afterwards."""

from finetune.quantization.bnb import dense, loader_arguments, protect, quantized_layers, silence
from finetune.quantization.config import QuantizationConfig, spec

__all__ = ["QuantizationConfig", "dense", "loader_arguments", "protect", "quantized_layers", "silence", "spec"]
