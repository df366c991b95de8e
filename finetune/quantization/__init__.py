"""Quantizes the frozen base: arguments for the loader, libraries on a loaded model, and a cache of the result.

    config = QuantizationConfig(method="nf4", double=True)
    model = AutoModelForCausalLM.from_pretrained(folder, **loader_arguments(config, dtype="bfloat16"))
    print(len(quantized_layers(model)), spec(config))

The package imports no torch; functions that ask about layers are in `backends`.
"""

from finetune.quantization.backends import loader_arguments, quantized_layers
from finetune.quantization.config import QuantizationConfig, spec
from finetune.quantization.sensitivity import choose_skip_modules

__all__ = ["QuantizationConfig", "choose_skip_modules", "loader_arguments", "quantized_layers", "spec"]
