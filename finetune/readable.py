"""Refuses damaged model folders with one message, before or instead of what a library would do with them.

Example::

    check_folder(folder)
    with refusing(f"{folder} holds no tokenizer that transformers can read", "add tokenizer.json"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError, ModelError

OBJECTS = (
    *("config.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
    *("processor_config.json", "preprocessor_config.json", "model.safetensors.index.json", "chat_template.json"),
)
"""Files that must be a JSON object where a folder has them."""

OPENED = ("*.safetensors", "*.jinja", "*.model", "*.txt", "*.json")
SIZES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("max_position_embeddings", "num_hidden_layers", "n_embd", "n_layer", "n_head", "n_positions"),
)
LARGEST_SIZE = 10**8
MOST_LAYERS = 2000
"""Ten times the layers of the deepest published models: building more takes minutes before anything else fails."""

FACTORS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "initializer_range")
LONGEST_REASON = 200
"""Characters of a library's message that are shown."""

PANIC = "PanicException"
"""The error of Rust code that gave up, which does not derive from Exception and cannot be imported."""

TORCH_MEMORY_ERROR = "OutOfMemoryError"

DAMAGED = "it is damaged or not what its name says; download it again"


def check_folder(folder: Path) -> None:
    """Checks the files that transformers opens, without weights.

    Raises:
        ModelError: A file is not a regular one or not a JSON object, or config.json has sizes that no model has.
    """
    for pattern in OPENED:
        for file in sorted(folder.glob(pattern)):
            if file.exists() and not file.is_file():
                raise ModelError(f"model.name: {file} is not a regular file; {DAMAGED}")
    for name in OBJECTS:
        if (folder / name).exists():
            read_object(folder / name)
    check_sizes(folder / "config.json", read_object(folder / "config.json"))
    _check_index(folder)


def read_object(file: Path, *, remedy: str = DAMAGED) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ModelError: The file cannot be read, is not JSON, or is not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"model.name: {file} cannot be read: {error.strerror}; {remedy}") from error
    except (ValueError, RecursionError) as error:  # a GGUF is a binary file
        raise ModelError(f"model.name: {file} is not JSON: {error}; {remedy}") from error
    if not isinstance(content, dict):
        raise ModelError(f"model.name: {file} is not a JSON object but a {type(content).__name__}; {remedy}")
    return content


def check_sizes(file: Path, content: dict[str, Any]) -> None:
    """Checks the dimensions of a config.json, also those of its text decoder.

    Raises:
        ModelError: One is not a positive number of a size that models have, or the family is not a text.
    """
    decoder = content.get("text_config", {})
    if not isinstance(decoder, dict):
        raise ModelError(f"model.name: text_config in {file} must be an object; got {decoder!r}; {DAMAGED}")
    for part in (content, decoder):
        family = part.get("model_type", "")
        if not isinstance(family, str):
            raise ModelError(f"model.name: model_type in {file} must be a text; got {family!r}; {DAMAGED}")
        for key in SIZES:
            most = MOST_LAYERS if key in ("num_hidden_layers", "n_layer") else LARGEST_SIZE
            value = part.get(key)
            values = value if isinstance(value, list) and value else [value]  # some families list one for each layer
            if value is not None and not all(type(item) is int and 0 < item <= most for item in values):
                rule = f"must be a whole number from 1 to {most:,}"
                raise ModelError(f"model.name: {key} in {file} {rule}; got {value!r:.40}; {DAMAGED}")
        for key in FACTORS:
            value = part.get(key)
            if isinstance(value, float) and not math.isfinite(value):
                raise ModelError(f"model.name: {key} in {file} must be finite; got {value}; {DAMAGED}")


def _check_index(folder: Path) -> None:
    """Checks that the index of the weights names files inside the folder."""
    file = folder / "model.safetensors.index.json"
    if not file.is_file():
        return
    names = read_object(file).get("weight_map")
    parts = set(names.values()) if isinstance(names, dict) and all(isinstance(n, str) for n in names.values()) else None
    if not parts or any(os.path.basename(part) != part for part in parts):
        raise ModelError(f"model.name: weight_map in {file} must name the file of each tensor; {DAMAGED}")


@contextmanager
def refusing(what: str, remedy: str) -> Iterator[None]:
    """Turns what a library raises for damaged files into one message.

    Raises:
        ModelError: With ``what``, the library's message and the remedy.
    """
    try:
        yield
    except (FinetuneError, MemoryError):
        raise
    except BaseException as error:  # tokenizers raises Exception itself, other libraries whatever fails first
        name = type(error).__name__
        if name == TORCH_MEMORY_ERROR or not (isinstance(error, Exception) or name == PANIC):
            raise
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        kind = "" if type(error) in (OSError, ValueError, ImportError, Exception) else f"{name}: "
        raise ModelError(f"model.name: {what} ({kind}{reason}); {remedy}") from error
