"""Loads the base model and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.chat_templates import read_template
from finetune.errors import ModelError
from finetune.model.base import Base, ModelFiles, weights_sha256
from finetune.readable import DAMAGED, refusing
from finetune.trust import check_remote_code, offer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetune.model.spec import ModelSpec
    from finetune.quantization.cache import QuantizedCache

PAD_TOKENS = (
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<|endoftext|>",
    "<unk>",
)


UNFIT = "weights and config.json do not fit together, or one is damaged: download both again"


def load_tokenizer(
    base: Base | ModelFiles, *, trust_remote_code: bool = False, template: str | None = None
) -> PreTrainedTokenizerBase:
    """Loads the base's tokenizer, with a pad token other than the end token wherever the vocabulary has one.

    Args:
        template: Name of the chat template for a tokenizer that has none, see `finetune.chat_templates`.

    Raises:
        ModelError: The folder has no tokenizer that transformers can read.
        DataError: There is no such template.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    what = f"{base.folder} holds no tokenizer that transformers can read"
    with refusing(what, f"add tokenizer.json{offer(base.folder)}"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=trust_remote_code)
        except StrictDataclassError as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"model.name: {base.folder / 'config.json'}: {reason}; {DAMAGED}") from error
    if not tokenizer.vocab_size:
        raise ModelError(f"model.name: {what} (its vocabulary is empty); add tokenizer.json")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        vocabulary = tokenizer.get_vocab()
        pads = (
            token for token in PAD_TOKENS if vocabulary.get(token, tokenizer.eos_token_id) != tokenizer.eos_token_id
        )
        tokenizer.pad_token = next(pads, None) or tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    if template is not None and not tokenizer.chat_template:
        tokenizer.chat_template = read_template(template, setting="model.template")
    return tokenizer


def describe_padding(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns one sentence on the pad token that was chosen."""
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        return (
            f"pad token {tokenizer.pad_token} is also the end token, since the vocabulary has no other; "
            "labels are masked by position, so the end token is still trained"
        )
    return f"pad token {tokenizer.pad_token}, end token {tokenizer.eos_token}"


def weights_at(max_memory: Mapping[int | str, int] | None, *, scratch: Path | str | None) -> dict[str, Any]:
    """Returns transformers' arguments for weights that are spread; none where all lie on one device.

    Args:
        max_memory: As `load_model` takes it.
        scratch: Likewise.
    """
    if not max_memory:
        return {}
    return {"device_map": "sequential", "max_memory": max_memory, "offload_folder": scratch}


def load_model(
    spec: ModelSpec,
    *,
    max_memory: dict[int | str, int] | None = None,
    scratch: Path | None = None,
    use_cache: bool = True,
) -> PreTrainedModel:
    """Loads the base, quantized as the spec says, in evaluation mode and without gradients.

    A quantized base is read from its cached copy where there is one. A model that has its own code is not cached: the
    code next to the copy would then run from the cache.

    Args:
        spec: The base and how it is loaded.
        max_memory: Bytes of weights by GPU index, and by ``cpu``; the others stay on disk. Empty loads all weights
            onto the run's device.
        scratch: Folder for weights that stay on disk in another form than the base's files have (experts).
        use_cache: Whether a quantized base is read from the cache and written to it; not for a base that is used once.

    Raises:
        ModelError: The model has no layer to quantize, or transformers cannot load it.
    """
    from finetune.quantization import quantized_layers
    from finetune.quantization.bnb import prevent_repacking
    from finetune.quantization.experts import join_codes
    from finetune.quantization.skip_modules import check_skip_modules

    base, config, quantization = spec.base, spec.config, spec.quantization
    cache = cache_of(spec) if use_cache else None
    where = weights_at(max_memory, scratch=scratch)
    cached = cache.read(lambda folder: _open(folder, spec, **where)) if cache else None
    model = cached if cached is not None else _load_and_quantize(spec, **where)
    prevent_repacking(model)
    if spec.is_quantized and not quantized_layers(model):
        raise ModelError(
            f"quantization.method={quantization.method}: {config.name} has no linear layer to quantize; "
            "use quantization=none"
        )
    check_skip_modules(model, quantization.skip_modules)
    if cache and cached is None:
        cache.write(model)
    join_codes(model)
    model.name_or_path = model.config._name_or_path = str(base.folder)  # peft writes it into the adapter
    model.requires_grad_(False)
    return model.eval()


def cache_of(spec: ModelSpec) -> QuantizedCache | None:
    """Returns the cache entry of the quantized base; None where the run stores none, or the model has its own code."""
    from finetune.quantization.cache import quantized_cache

    if not spec.is_quantized or spec.is_prequantized or spec.is_rounded_with_adapter or spec.config.trust_remote_code:
        return None
    base = spec.base.folder
    return quantized_cache(base, weights=weights_sha256(base), quantization=spec.quantization, placement=spec.placement)


def _load_and_quantize(spec: ModelSpec, **where: Any) -> PreTrainedModel:
    from finetune.quantization import loader_arguments
    from finetune.quantization.backends import quantize

    folder, dtype = spec.base.folder, spec.placement.dtype
    try:
        with refusing(f"transformers cannot load {folder}", f"{UNFIT}{offer(folder)}"):
            model = _open(folder, spec, **where, **loader_arguments(spec.quantization, dtype=dtype))
        quantize(model, spec.quantization, dtype=dtype)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"model.name={spec.config.name}: transformers cannot load {folder}: {error}{offer(folder)}"
        ) from error
    return model


def _open(folder: Path, spec: ModelSpec, **arguments: Any) -> PreTrainedModel:
    """Loads a folder's model, onto its device by default, with further arguments of ``from_pretrained``."""
    import torch

    from finetune.model.text_only import from_pretrained
    from finetune.quantization.bnb import quiet_imports
    from finetune.quantization.expert_loading import quantized_experts
    from finetune.quantization.prequantized import packed_layers, set_compute_dtype

    quiet_imports()
    check_remote_code(folder, spec.config.remote_code)
    with packed_layers(folder) if spec.is_prequantized else nullcontext(), quantized_experts():
        model: PreTrainedModel = from_pretrained(
            folder,
            dtype=getattr(torch, spec.placement.dtype),
            attn_implementation=spec.placement.attention,
            trust_remote_code=spec.config.trust_remote_code,
            use_safetensors=True,
            **({"device_map": {"": spec.placement.device}} | arguments),
        )
    if spec.is_prequantized:
        set_compute_dtype(model, spec.placement.dtype)
    return model


def resident_bytes(model: Any) -> int:
    """Returns the bytes of parameters, buffers and quantization constants in memory."""
    from finetune.quantization.backends import all_tensors

    return sum(tensor.numel() * tensor.element_size() for _, tensor in all_tensors(model))


def parameter_count(model: Any) -> int:
    """Counts the weights of the dense model, however they are packed. Tied weights count once."""
    from finetune.quantization.backends import dense_parameters

    return dense_parameters(model)
