"""Loads models of text, and of image-text models the text decoder alone, without its towers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from finetune.console import log
from finetune.errors import ModelError
from finetune.readable import DAMAGED

RENAMED = {
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.": "model.",
}
"""Names of a decoder's tensors inside an image-text checkpoint, of transformers 4 and 5, and in one of text alone."""


def from_pretrained(folder: Path | str, **arguments: Any) -> Any:
    """Calls ``AutoModelForCausalLM.from_pretrained``; of an image-text model it loads the decoder alone.

    Args:
        folder: Holds config.json and safetensors.
        arguments: As transformers takes them.

    Raises:
        ModelError: The folder lacks weights of the decoder.
    """
    from transformers import AutoModelForCausalLM

    config = config_of_text(folder, trust_remote_code=arguments.get("trust_remote_code", False))
    if config is None:
        whole: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
        _require_same_layers(folder, *whole)
        return whole[0]
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, config=config, key_mapping=RENAMED, output_loading_info=True, **arguments
    )
    model, found = loaded
    if found["missing_keys"]:
        raise ModelError(f"model.name: {folder} has no {', '.join(sorted(found['missing_keys'])[:3])} of the decoder")
    model._weight_conversions = None  # a copy of the decoder keeps the names that its own class has
    unused = sorted({name.removeprefix("model.").partition(".")[0] for name in found["unexpected_keys"]})
    without = f", without {', '.join(unused)}" if unused else ""
    log("model", f"text only: {type(model).__name__} is loaded{without}")
    return model


def _require_same_layers(folder: Path | str, model: Any, found: dict[str, Any]) -> None:
    """Refuses a model that transformers would complete with random weights, or cut to fewer layers than its file has.

    Weights that are stored quantized have other names than their layers: their quantizer looks for them.
    """
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None) or 0
    numbers = {name: re.search(r"\.layers\.(\d+)\.", name) for name in found["unexpected_keys"]}
    cut = [name for name, number in numbers.items() if number and int(number[1]) >= layers]
    quantizer = getattr(model, "hf_quantizer", None)
    missing = [] if quantizer and quantizer.pre_quantized else found["missing_keys"]
    for names, problem in ((missing, "has no"), (cut, f"has, beyond the {layers} layers of its config.json,")):
        if names:
            raise ModelError(f"model.name: {folder} {problem} {', '.join(sorted(names)[:3])}; {DAMAGED}")


def config_of_text(folder: Path | str, *, trust_remote_code: bool = False) -> Any | None:
    """Returns the configuration of an image-text model's decoder; None where the whole model is one of text."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    decoder = config.get_text_config()
    if decoder is config or type(decoder) not in AutoModelForCausalLM._model_mapping:
        return None
    stored = getattr(config, "quantization_config", None)
    if stored and not getattr(decoder, "quantization_config", None):
        decoder.quantization_config = stored
    decoder.tie_word_embeddings = decoder.tie_word_embeddings or config.tie_word_embeddings  # either may name it
    return decoder


def decoder_name(name: str) -> str:
    """Returns the name that a tensor of an image-text checkpoint has in its decoder's class; other names unchanged."""
    for pattern, replacement in RENAMED.items():
        name = re.sub(pattern, replacement, name)
    return name
