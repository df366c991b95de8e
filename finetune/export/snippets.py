"""Code that loads each export: printed in the card, and run unchanged by the parity check."""

from textwrap import indent

from finetune.hardware.backends import BACKENDS
from finetune.model import Base, ModelConfig, ModelSpec
from finetune.quantization import QuantizationConfig
from finetune.quantization.config import PREQUANTIZED
from finetune.quantization.skip_modules import HEADS, skip_patterns


def adapter_snippet(
    folder: str, spec: ModelSpec, *, ends: list[int], splits: bool = False, common: bool = False
) -> str:
    """Returns code that loads the adapter by peft on the base as it was quantized for training.

    Args:
        folder: The adapter's, relative to where the code runs.
        spec: The base as it was loaded for training.
        ends: Tokens that end an answer.
        splits: Whether the base has experts in 4 bits, which transformers alone leaves in 16 bit.
        common: Whether the adapter is one of all experts of a layer.
    """
    base, quantization, dtype = spec.base, spec.quantization, spec.placement.dtype
    hub = [repr(base.name), f"revision={base.revision!r}"]
    arguments = [
        *(hub if base.source == "hub" else [repr(base.folder.name)]),
        f"dtype=torch.{dtype}",
        'device_map="auto"',
        *_trust(spec.config),
        *_quantization(quantization, dtype=dtype),
    ]
    library = BACKENDS[quantization.method].library
    imports, classes = IMPORTS.get(library, ([], []))
    prequantized = quantization.method == PREQUANTIZED
    context = "quantized_experts()" if splits else f"packed_layers({_folder(base)})" if prequantized else ""
    lines = [
        "import torch",
        *imports,
        *(["from finetune.lora.experts import add_common_layers"] if common else []),
        *(["from finetune.quantization.expert_loading import quantized_experts"] if splits else []),
        *(["from finetune.quantization.prequantized import packed_layers, set_compute_dtype"] if prequantized else []),
        *(["from huggingface_hub import snapshot_download"] if prequantized and base.source == "hub" else []),
        "from peft import PeftModel",
        f"from transformers import {', '.join(['AutoModelForCausalLM', 'AutoTokenizer', *classes])}",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r})",
        *(
            []
            if base.source == "hub"
            else [f"# put here where you have {base.public_name}, weights SHA-256 {base.sha256}"]
        ),
        *_loading(arguments, context=context),
        *([f"set_compute_dtype(base, {dtype!r})"] if prequantized else []),
        *(_replaced(quantization, dtype=dtype) if library == "hqq" else []),
        *(["add_common_layers(base)"] if common else []),
        f"model = PeftModel.from_pretrained(base, {folder!r}).eval()",
        "",
        *_answer(ends),
    ]
    return "\n".join(lines)


def _folder(base: Base) -> str:
    """Returns code for the folder of a base, whose config.json says how it is stored."""
    is_remote = base.source == "hub"
    return f"snapshot_download({base.name!r}, revision={base.revision!r})" if is_remote else repr(base.folder.name)


def _loading(arguments: list[str], *, context: str) -> list[str]:
    lines = ["base = AutoModelForCausalLM.from_pretrained(", *[f"    {argument}," for argument in arguments], ")"]
    return [f"with {context}:", indent("\n".join(lines), "    ")] if context else lines


def merged_snippet(folder: str, *, model: ModelConfig, dtype: str) -> str:
    """Returns code that loads the merged model by transformers."""
    arguments = ", ".join([repr(folder), f"dtype=torch.{dtype}", 'device_map="auto"', *_trust(model)])
    lines = [
        "import torch",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r})",
        f"model = AutoModelForCausalLM.from_pretrained({arguments}).eval()",
        "",
        *_answer([]),
    ]
    return "\n".join(lines)


def packed_snippet(folder: str, *, model: ModelConfig, dtype: str) -> str:
    """Returns code that loads packed weights by this project's decoder, and the command that serves them."""
    arguments = ", ".join([repr(folder), f"dtype=torch.{dtype}", 'device_map="auto"', *_trust(model)])
    lines = [
        f"# In vLLM: vllm serve {folder}",
        "import torch",
        "from finetune.quantization.prequantized import packed_layers",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r})",
        f"with packed_layers({folder!r}):",
        f"    model = AutoModelForCausalLM.from_pretrained({arguments}).eval()",
        "",
        *_answer([]),
    ]
    return "\n".join(lines)


def finetune_snippet(folder: str) -> str:
    """Returns code that calls this project's own loader, which refuses another base."""
    return "\n".join(["import finetune", "", f"model, tokenizer = finetune.load({folder!r})"])


def _trust(model: ModelConfig) -> list[str]:
    return ["trust_remote_code=True"] if model.trust_remote_code else []


IMPORTS = {
    "bitsandbytes": ([], ["BitsAndBytesConfig"]),
    "torchao": (["from torchao.quantization import Int8WeightOnlyConfig"], ["TorchAoConfig"]),
    "hqq": (["import re", "", "from hqq.core.quantize import BaseQuantizeConfig, HQQLinear"], []),
}
"""Import lines, and names to import from transformers, by library."""


def _quantization(config: QuantizationConfig, *, dtype: str) -> list[str]:
    library, kept = BACKENDS[config.method].library, skip_patterns(config.skip_modules)
    if library == "torchao":
        return [f"quantization_config=TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert={kept!r})"]
    if library != "bitsandbytes":
        return []
    skip = [f"llm_int8_skip_modules={kept!r}"]
    if config.method == "int8":
        settings = ["load_in_8bit=True", f"llm_int8_threshold={config.threshold}", *skip]
    else:
        settings = [
            "load_in_4bit=True",
            f'bnb_4bit_quant_type="{config.method}"',
            f"bnb_4bit_use_double_quant={config.double}",
            f"bnb_4bit_compute_dtype=torch.{dtype}",
            *skip,
        ]
    lines = "".join(f"        {setting},\n" for setting in settings)
    return [f"quantization_config=BitsAndBytesConfig(\n{lines}    )"]


def _replaced(config: QuantizationConfig, *, dtype: str) -> list[str]:
    """Returns code that replaces the layers of a loaded model, as hqq requires."""
    names = skip_patterns(config.skip_modules)
    kept = "|".join(f"(?:.*[.])?{name}" if name in HEADS else name for name in names)
    return [
        f"settings = BaseQuantizeConfig(nbits={config.bits}, group_size={config.group_size}, axis=1)",
        f"kept = re.compile({kept!r})",
        "for name, layer in list(base.named_modules()):",
        "    if isinstance(layer, torch.nn.Linear) and not kept.fullmatch(name):",
        f"        quantized = HQQLinear(layer, settings, compute_dtype=torch.{dtype}, device=str(layer.weight.device))",
        "        base.set_submodule(name, quantized)",
    ]


def _answer(ends: list[int]) -> list[str]:
    stop = f", eos_token_id={ends}" if ends else ""
    return [
        'messages = [{"role": "user", "content": "Hello!"}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        f"output = model.generate(**inputs.to(model.device), max_new_tokens=32, do_sample=False{stop})",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
