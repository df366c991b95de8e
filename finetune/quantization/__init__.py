"""How the frozen base is stored: what to pass to the loader, and what must hold afterwards."""

from finetune.quantization.backends import (
    check_installed,
    dense,
    dense_parameters,
    holdings,
    library_of,
    loader_arguments,
    quantize,
    quantized_layers,
    save,
    stored,
)
from finetune.quantization.bnb import prepare, protect
from finetune.quantization.cache import quantized_cache
from finetune.quantization.config import QuantizationConfig, spec
from finetune.quantization.sensitivity import KeptLayers, choose_skip_modules
from finetune.quantization.skip_modules import check_keep, is_kept, patterns

__all__ = [
    "KeptLayers",
    "QuantizationConfig",
    "check_installed",
    "check_keep",
    "choose_skip_modules",
    "dense",
    "dense_parameters",
    "holdings",
    "is_kept",
    "library_of",
    "loader_arguments",
    "patterns",
    "prepare",
    "protect",
    "quantize",
    "quantized_cache",
    "quantized_layers",
    "save",
    "spec",
    "stored",
]
