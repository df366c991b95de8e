"""How the frozen base is stored: what to pass to the loader, and what must hold afterwards."""

from finetune.quantization.bnb import prepare, protect
from finetune.quantization.config import QuantizationConfig, spec
from finetune.quantization.copy import copy_of
from finetune.quantization.keep import check_keep, is_kept, patterns
from finetune.quantization.libraries import (
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
from finetune.quantization.sensitivity import KeptLayers, keep_by_measure

__all__ = [
    "KeptLayers",
    "QuantizationConfig",
    "check_installed",
    "check_keep",
    "copy_of",
    "dense",
    "dense_parameters",
    "holdings",
    "is_kept",
    "keep_by_measure",
    "library_of",
    "loader_arguments",
    "patterns",
    "prepare",
    "protect",
    "quantize",
    "quantized_layers",
    "save",
    "spec",
    "stored",
]
