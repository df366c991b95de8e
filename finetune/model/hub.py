"""Fetches a model from the Hugging Face hub in two parts: config and tokenizer first, weights when they are needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import ModelError
from finetune.model.config import ModelConfig

SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "tokenizer*", "*.py", "README.md"]
"""Config and tokenizer. README.md names the licence; Python files run only if ``model.remote_code`` has their hash."""

ALL_FILES = ["*.safetensors", *SMALL_FILES]
"""Excludes pickles."""


def fetch_small_files(config: ModelConfig) -> Path:
    """Downloads all but the weights, a few MB; returns their folder, which is named after the commit.

    Raises:
        ModelError: The hub has no such model or revision, access is missing, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    with _explained(config):
        return Path(snapshot_download(config.name, revision=config.revision, allow_patterns=SMALL_FILES))


def fetch_weights(config: ModelConfig, commit: str) -> Path:
    """Downloads the weights of a commit; returns the folder that holds all of its files.

    Raises:
        ModelError: Access is missing, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    with _explained(config):
        return Path(snapshot_download(config.name, revision=commit, allow_patterns=ALL_FILES))


def fetch_config(config: ModelConfig) -> Path:
    """Downloads ``config.json`` alone, 2 kB; returns its folder.

    Raises:
        ModelError: The hub has no such model or revision, access is missing, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    with _explained(config):
        return Path(hf_hub_download(config.name, "config.json", revision=config.revision)).parent


def cached_folder(config: ModelConfig) -> Path | None:
    """Returns the folder of the model in the hub's cache if it has a ``config.json``; asks no server.

    The folders are those of ``huggingface_hub.try_to_load_from_cache``, whose import takes most of a second.
    """
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE) / f"models--{config.name.replace('/', '--')}"
    revision = config.revision or constants.DEFAULT_REVISION
    reference = repository / "refs" / revision
    commit = reference.read_text(encoding="utf-8") if reference.is_file() else revision
    folder = repository / "snapshots" / commit
    return folder if (folder / "config.json").is_file() else None


def bytes_to_download(config: ModelConfig, folder: Path) -> int:
    """Returns the size of the files of a commit that are not in the cache yet.

    Args:
        config: The model group.
        folder: The model's, in the hub's cache.

    Raises:
        ModelError: The commit has no safetensors, or the hub cannot be reached and weights are missing.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    try:
        with _explained(config):
            files = snapshot_download(config.name, revision=folder.name, allow_patterns=ALL_FILES, dry_run=True)
    except ModelError as error:
        if isinstance(error.__cause__, DryRunError) and has_all_weights(folder):
            return 0
        raise
    if not any(file.filename.endswith(".safetensors") for file in files):
        raise ModelError(
            f"model.name={config.name}: the repository holds no *.safetensors file, and pickles (*.bin, *.pt) are not "
            "fetched from a hub: convert them where you trust them, then give model.name=<folder>"
        )
    return sum(file.file_size or 0 for file in files if file.will_download)


def has_all_weights(folder: Path) -> bool:
    """Returns whether a folder holds its safetensors, all of those that its index names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return all((folder / name).is_file() for name in set(json.loads(index.read_text())["weight_map"].values()))
    return any(folder.glob("*.safetensors"))


@contextmanager
def _explained(config: ModelConfig) -> Iterator[None]:
    """Converts the hub's errors to ours, each with its remedy."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = config.name
    try:
        yield
    except HFValidationError as error:
        raise ModelError(f"model.name={name!r} is neither a local folder nor a hub id such as org/model") from error
    except GatedRepoError as error:
        raise ModelError(
            f"model.name={name} is gated: accept its licence at https://huggingface.co/{name}, then run `hf auth "
            "login`, or set HF_TOKEN to a token of the account that accepted it"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"model.name={name}: the hub has no such model, or it is private; for a private one, run `hf auth "
            "login`, or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"model.revision={config.revision}: {name} has no such revision on the hub") from error
    except LocalEntryNotFoundError as error:
        raise _unreachable(name) from error
    except EntryNotFoundError as error:
        raise ModelError(
            f"model.name={name}: the repository has no config.json, so transformers cannot load it; choose another "
            "model, or give model.name=<folder> with a converted copy"
        ) from error
    except OSError as error:  # the hub's own HTTP errors among them
        raise _unreachable(name) from error


def _unreachable(name: str) -> ModelError:
    return ModelError(
        f"model.name={name}: the hub cannot be reached and the model is not in the local cache; check the network "
        "(HF_HUB_OFFLINE), choose an option of the model group with model=... (finetune --groups), or give "
        "model.name=<folder> with a copy"
    )
