"""Reads a training file of another tool: YAML, or a TRL command line."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import ConfigError

AXOLOTL, LLAMA_FACTORY, TRL = "axolotl", "LLaMA-Factory", "TRL"
TRL_METHODS = ("sft", "dpo", "kto", "grpo", "rloo", "reward")
LLAMA_FACTORY_ONLY = {"stage", "finetuning_type", "cutoff_len", "template", "lora_target", "do_train", "model_class"}
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
NESTED = ("peft_config", "quant_config", "lora_config")
"""Mappings whose settings are those of the file, one level down."""

RENAMED = {"model": "model_name_or_path", "train_dataset": "dataset"}
"""LLaMA-Factory's version 1, by the names of version 0."""


@dataclass(frozen=True, slots=True)
class TrainingFile:
    """A training file as it was read.

    Attributes:
        path: The file.
        tool: `AXOLOTL`, `LLAMA_FACTORY` or `TRL`.
        values: Its settings by name.
        data_sets: LLaMA-Factory's ``dataset_info.json``, where it was found.
    """

    path: Path
    tool: str
    values: dict[str, Any]
    data_sets: dict[str, Any]


def read_file(path: Path) -> TrainingFile:
    """Reads a file and finds out which tool it belongs to.

    Raises:
        ConfigError: It cannot be read, or is a training file of none of the three tools.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"convert: {path} cannot be read: {error}; give a YAML file or a TRL command line") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        content = None
    if not isinstance(content, dict) or not _tool(content):
        content = dict(_command_line(text))
    values = {name: _number(value) for name, value in _flat(content).items()}
    tool = _tool(values)
    if tool is None:
        raise ConfigError(
            f"convert: {path} is not a training file of axolotl (base_model), LLaMA-Factory (model_name_or_path with "
            "stage or cutoff_len) or TRL (model_name_or_path, or a line `trl sft --...`)"
        )
    return TrainingFile(path, tool, values, _data_sets(path, values) if tool == LLAMA_FACTORY else {})


def _tool(values: dict[str, Any]) -> str | None:
    if "base_model" in values:
        return AXOLOTL
    if LLAMA_FACTORY_ONLY & set(values) and {"model_name_or_path", "model"} & set(values):
        return LLAMA_FACTORY
    return TRL if "model_name_or_path" in values else None


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    """Lifts nested settings, and renames those of LLaMA-Factory's version 1."""
    if "model_class" not in content and "peft_config" not in content:
        return {str(name): value for name, value in content.items()}
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if name in NESTED and isinstance(value, dict):
            flat |= {RENAMED.get(str(key), str(key)): entry for key, entry in value.items() if key != "name"}
            flat |= {"finetuning_type": value["name"]} if name == "peft_config" and "name" in value else {}
        else:
            flat[RENAMED.get(str(name), str(name))] = value
    return flat


def _command_line(text: str) -> Iterator[tuple[str, Any]]:
    """Yields the flags of the first command of TRL in a text; lines may end with a backslash."""
    lines = re.sub(r"\\\s*\n", " ", text).splitlines()
    for line in lines:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        start = next((index for index, word in enumerate(words) if _is_trl(words, index, word)), None)
        if start is None:
            continue
        yield "method", Path(words[start]).stem
        yield from _flags(words[start + 1 :])
        return


def _is_trl(words: list[str], index: int, word: str) -> bool:
    stem = Path(word).stem
    return stem in TRL_METHODS and (word.endswith(".py") or (index > 0 and words[index - 1] == "trl"))


def _flags(words: list[str]) -> Iterator[tuple[str, Any]]:
    name, values = None, list[str]()
    for word in [*words, "--"]:
        if not word.startswith("--"):
            values.append(word)
            continue
        if name is not None:
            read = [yaml.safe_load(value) for value in values]
            yield name, True if not read else read[0] if len(read) == 1 else read
        flag, equals, value = word.removeprefix("--").partition("=")
        name, values = flag.replace("-", "_"), [value] if equals else []


def _number(value: Any) -> Any:
    """YAML 1.1 reads ``2e-5`` as text."""
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        return float(value) if re.search(r"[.eE]", value) else int(value)
    return value


def _data_sets(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Finds ``dataset_info.json`` in the file's ``dataset_dir``, or in ``data`` of a folder above the file."""
    folder = str(values.get("dataset_dir") or "data")
    for parent in (Path.cwd(), *path.resolve().parents):
        file = parent / folder / "dataset_info.json"
        if file.is_file():
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return {name: entry | {"folder": str(file.parent)} for name, entry in found.items()}
    return {}
