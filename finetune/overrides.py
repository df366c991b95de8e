"""What the user typed, and what was wrong with it, in one sentence each."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

OVERLAYS = ("experiment", "debug")
KINDS = {
    "Integer": "a whole number",
    "Float": "a number",
    "Boolean": "true or false",
    "bool": "true or false",
    "String": "text",
    "float": "a number",
    "str": "text",
}
"""OmegaConf's names of types to words."""

UNREADABLE = (
    "missing EQUAL",
    "mismatched input",
    "no viable alternative",
    "extraneous input",
    "token recognition",
    "LexerNoViableAlt",
)
"""What Hydra's grammar says of a word that it cannot read."""

ELSEWHERE = {
    "batch_size": "train.micro_batch", "per_device_train_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.tokens_per_step", "gradient_checkpointing": "train.checkpointing",
    "max_steps": "train.steps", "num_train_epochs": "train.epochs", "lr": "optim.learning_rate", "optimizer": "optim.name",
    "lr_scheduler_type": "optim.schedule", "r": "lora.rank", "lora_r": "lora.rank", "target_modules": "lora.targets",
    "max_length": "data.max_tokens", "max_seq_length": "data.max_tokens", "output_dir": "run.name",
    "trust_remote_code": "model.remote_code",
}  # fmt: skip
"""Last segment of what other trainers (transformers, TRL, peft) call a setting, and what it is called here."""


def misplaced(overrides: Sequence[str]) -> list[str]:
    """Overlays win by position: ``+debug`` before ``+experiment`` would be overwritten by it without a word."""
    order = [key.lstrip("+") for override in overrides if (key := override.split("=")[0]).lstrip("+") in OVERLAYS]
    problems = [
        f"{override}: {override.split('=')[0]} is an overlay and needs a plus: write +{override}"
        for override in overrides
        if override.split("=")[0] in OVERLAYS
    ]
    if "experiment" in order and "debug" in order and order.index("debug") < order.index("experiment"):
        problems.append(
            "+debug stands before +experiment, so the experiment would undo it; write +experiment=... +debug=..."
        )
    return problems


def opened(overrides: Sequence[str], schema: type) -> list[str]:
    """Settings that hold names of the user's own (``data.columns={prompt: question}``) need no plus of Hydra's."""
    free = [name for name in _free(schema) if "." in name]  # those without are groups, whose options have names of ours
    return [_open(override, free) for override in overrides]


def _open(override: str, free: list[str]) -> str:
    key, equals, value = override.partition("=")
    for name in free:
        if key == name and equals:
            return f"++{override}" if value.strip() not in ("{}", "null") else override
        if key.startswith(f"{name}.") and equals:
            inside = value
            for part in reversed(key.removeprefix(f"{name}.").split(".")):
                inside = f"{{{part}: {inside}}}"
            return f"++{name}={inside}"
    return override


def _free(schema: Any, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if typing.get_origin(hints[field.name]) is dict:
            yield f"{prefix}{field.name}"
        elif kind := _dataclass_of(hints[field.name]):
            yield from _free(kind, f"{prefix}{field.name}.")


def unknown_additions(config: DictConfig, schema: type) -> list[str]:
    """Keys that the schema does not have: Hydra lets ``+lora.rnak=3`` add anything."""
    known = set(paths(schema))
    return [_unknown(key, known) for key in _keys(config, schema)]


def paths(schema: Any, prefix: str = "") -> Iterator[str]:
    """Every setting of a dataclass tree, dotted."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = _dataclass_of(hints[field.name])
        if kind:
            yield from paths(kind, f"{prefix}{field.name}.")
        yield f"{prefix}{field.name}"


def unknown(key: str, schema: Any) -> str | None:
    """Why a key is none of the schema's, with the nearest one; None where it is one."""
    try:
        part_of(key, schema)
    except KeyError:
        return _unknown(key, set(paths(schema)))
    return None


def part_of(key: str, schema: Any) -> tuple[Any, str]:
    """The dataclass that holds a dotted key, and the field; what users name themselves lies in the field of the mapping.

    Raises:
        KeyError: There is no such field.
    """
    name, _, rest = key.partition(".")
    hint = typing.get_type_hints(schema)[name]
    kind, free = _dataclass_of(hint), typing.get_origin(hint) is dict
    if free and kind:
        rest = rest.partition(".")[2]
    if rest and kind:
        return part_of(rest, kind)
    if rest and not free:
        raise KeyError(key)
    return schema, name


def explain(error: Exception, override: str | None, schema: type, conf: Path) -> str:
    """Hydra's or OmegaConf's error as where, rule, value, remedy."""
    text = "\n".join(str(part).strip() for part in (error, error.__cause__) if part is not None)
    where = override.split("=", 1)[0].lstrip("+~") if override else ""
    value = override.split("=", 1)[1] if override and "=" in override else ""
    known = set(paths(schema))
    missing_option = re.search(r"Could not (?:find|load) '([\w/]+)/([^']+)'|In '.*': Could not find '([^']+)'", text)
    if missing_option or ("Could not override" in text and (conf / where).is_dir()):
        found = missing_option.groups() if missing_option else (where, value, None)
        group, option = (found[0], found[1]) if found[0] else (found[2] or where).rpartition("/")[::2]
        return _no_option(group.rsplit("/", 1)[-1] or where, option, conf)
    if "is not in struct" in text or "Could not override" in text or re.search(r"Key '[^']*' not in", text):
        named = re.search(r"Key '([^']+)'", text)
        full = re.search(r"full_key: (\S+)", text)
        return _unknown(where or (full.group(1) if full else named.group(1) if named else text), known)
    wrong = re.search(
        r"Value '(.*?)'.* (?:could not be converted to|is not a valid|of type '.*' could not be converted to) (\w+)",
        text,
    )
    full = re.search(r"full_key: (\S+)", text)
    if wrong:
        return f"{full.group(1) if full else where}: must be {KINDS.get(wrong.group(2), wrong.group(2))}; got {wrong.group(1)!r}"
    mapping = re.search(r"(?:Cannot assign \w+ to |with ListConfig\s[\s\S]*reference_type=)Dict\[str, (\w+)\]", text)
    if mapping:
        return (
            f"{where}: must be names with {KINDS[mapping.group(1)]} each, e.g. '{where}={{<name>: ...}}'; got {value!r}"
        )
    if "is not a ListConfig" in text:
        return f"{where}: must be a list, e.g. '{where}=[{value}]'; got {value!r}"
    if any(sign in text for sign in UNREADABLE):
        word = override or re.sub(r"(?s).*override '(.*?)'\n.*", r"\1", text)
        return f"{word}: cannot be read as an override; write key=value, and quote values that hold spaces or signs"
    first = " ".join(
        line.strip()
        for line in text.splitlines()
        if line.strip() and "object_type" not in line and "full_key" not in line
    )
    return f"{(full.group(1) if full else where) or 'configuration'}: {first}"


def _keys(config: DictConfig, schema: Any, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(schema)
    names = {field.name for field in dataclasses.fields(schema)}
    for key in config:
        name = str(key)
        if name not in names:
            yield f"{prefix}{name}"
            continue
        kind = _dataclass_of(hints[name])
        node = None if OmegaConf.is_missing(config, name) else config[name]
        if kind and isinstance(node, DictConfig) and typing.get_origin(hints[name]) is not dict:
            yield from _keys(node, kind, f"{prefix}{name}.")
        elif kind and isinstance(node, DictConfig):
            for option in map(str, node):
                yield from _keys(node[option], kind, f"{prefix}{name}.{option}.")


def _dataclass_of(hint: Any) -> Any:
    """The dataclass inside ``X``, ``X | None`` or ``dict[str, X]``; None where there is none."""
    if dataclasses.is_dataclass(hint):
        return hint
    if typing.get_origin(hint) in (typing.Union, types.UnionType, dict):
        return next((kind for kind in typing.get_args(hint) if dataclasses.is_dataclass(kind)), None)
    return None


def _unknown(key: str, known: set[str]) -> str:
    usual = ELSEWHERE.get(key.rpartition(".")[2])
    near = [usual] if usual else difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else "`finetune --cfg job` prints every setting"
    return f"{key}: there is no such setting; {hint}"


def _no_option(group: str, option: str, conf: Path) -> str:
    options = (
        sorted(file.stem for file in (conf / group).glob("*.yaml") if not file.stem.startswith("_")) if group else []
    )
    near = difflib.get_close_matches(option, options, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{group}={option}: there is no such option; choose one of {', '.join(options) or '(none)'}{hint}"
