"""Writes ``finetune.json``, the record that a loader needs to rebuild exactly the trained model, or to refuse."""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from finetune.cache import file_sha256
from finetune.hardware.backends import BACKENDS
from finetune.inference.chat import Chat
from finetune.jsonable import to_jsonable
from finetune.model import ModelSpec
from finetune.model.base import weights_sha256
from finetune.quantization.config import spec as quantization_spec
from finetune.run import write_json

FILE = "finetune.json"
SCHEMA = 2
"""Version of the record; raised when a field changes its place or meaning, so that older records are refused."""

SETTINGS = (".json", ".jinja", ".model")
WEIGHTS = (".safetensors", ".gguf", ".onnx", ".data")
PACKAGES = ("finetune", "torch", "transformers", "peft")


def write_record(folder: Path, kind: str, *, spec: ModelSpec, chat: Chat) -> dict[str, Any]:
    """Writes the record into an export's folder, after its weights and its tokenizer.

    Args:
        folder: Holds the weights already.
        kind: ``adapter`` or ``merged``.
        spec: The base as it was loaded for training, or the export itself.
        chat: Tokenizer and end tokens.
    """
    base, quantization = spec.base, spec.quantization
    settings = {**to_jsonable(spec.config), "name": base.public_name, "revision": base.revision}
    settings.pop("architecture")
    packages = [*PACKAGES, *filter(None, [BACKENDS[quantization.method].library])]
    record = {
        "schema": SCHEMA,
        "kind": kind,
        "weights_sha256": weights_sha256(folder),
        "settings_sha256": settings_sha256(folder),
        "base": {
            "name": base.public_name,
            "revision": base.revision,
            "source": base.source,
            "sha256": base.sha256,
            "files": {file.name: file_sha256(file) for file in sorted(base.folder.glob("*.safetensors"))},
        },
        "model": settings,
        "quantization": {"settings": to_jsonable(quantization), "spec": quantization_spec(quantization)},
        "computation": {"dtype": spec.placement.dtype, "attention": spec.placement.attention},
        "tokenizer": tokenizer_record(chat),
        "versions": {package: version(package) for package in packages},
    }
    write_json(folder / FILE, record)
    return record


def tokenizer_record(chat: Chat) -> dict[str, Any]:
    """Returns the template's hash, special tokens, and the use of BOS, EOS and padding."""
    tokenizer = chat.tokenizer
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return {
        "template_sha256": template_sha256(tokenizer),
        "special_tokens": {
            name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items()) if isinstance(token, str)
        },
        "bos": {"id": tokenizer.bos_token_id, "added_by_tokenizer": adds_bos},
        "eos": {"id": tokenizer.eos_token_id, "ends_an_answer": chat.ends},
        "pad": {
            "id": tokenizer.pad_token_id,
            "is_an_end_token": tokenizer.pad_token_id in chat.ends,
            "training_side": "right",
        },
        "system": chat.system,
        "vocabulary": len(tokenizer),
    }


def template_sha256(tokenizer: Any) -> str | None:
    """Returns the hash of the chat template's text; None without a template."""
    template = tokenizer.chat_template
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest() if template else None


def folder_sha256(folder: Path, *, reuse: bool = True) -> str:
    """Returns a hash over names and contents of all weight files of any format; ``reuse`` as in `file_sha256`."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.suffix in WEIGHTS):
        digest.update(f"{file.relative_to(folder)}:{file_sha256(file, reuse=reuse)}\n".encode())
    return digest.hexdigest()


def settings_sha256(folder: Path) -> dict[str, str]:
    """Returns the hash of each configuration file: adapter, model, generation, tokenizer."""
    return {
        file.name: file_sha256(file)
        for file in sorted(folder.iterdir())
        if file.suffix in SETTINGS and file.name != FILE
    }


def version(package: str) -> str | None:
    """Returns a package's installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
