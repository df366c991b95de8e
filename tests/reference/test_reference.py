"""The reference is complete and agrees with what is checked and shipped."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from finetune.cli import main
from finetune.config import RunConfig
from finetune.config.fields import all_keys, dataclass_in, field_types
from finetune.paths import CONF
from finetune.reference import entries, experiment_schema, find, page
from finetune.reference.docstrings import field_docstrings
from finetune.reference.entries import groups
from finetune.reference.rules import allowed_values

ALL = find("")
BY_KEY = {entry.key: entry for entry in ALL}
EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))


def groups_of(owner: Any) -> Iterator[Any]:
    """Yields the dataclasses inside one, at any depth."""
    for hint in field_types(owner).values():
        if kind := dataclass_in(hint):
            yield kind
            yield from groups_of(kind)


@pytest.mark.parametrize("owner", sorted(set(groups_of(RunConfig)), key=str), ids=lambda owner: owner.__name__)
def test_every_field_has_a_docstring(owner: type) -> None:
    documented = field_docstrings(owner)
    assert not [field.name for field in dataclasses.fields(owner) if not documented.get(field.name)]


def test_every_setting_has_one_entry_and_the_page_one_heading_for_it() -> None:
    keys = set(all_keys(RunConfig))
    settings = {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}
    assert {entry.key.replace(".*", "") for entry in ALL} == settings
    headings = re.findall(r"(?m)^### `(.+)`$", page())
    assert headings == [entry.key for entry in ALL]
    assert f"\n{len(settings)} settings in {len(groups())} groups" in page()


def test_an_entry_has_what_the_dataclass_the_check_and_the_files_say() -> None:
    rank, dropout, rate = BY_KEY["lora.rank"], BY_KEY["lora.dropout"], BY_KEY["optim.learning_rate"]
    assert (rank.type, rank.has_default, list(rank.rules)) == ("a whole number", True, ["must be at least 1"])
    assert list(dropout.rules) == ["must be at least 0 and below 1"]
    assert {item.option: (item.value, item.comment) for item in rate.options}["paged_lion_8bit"] == (
        2e-5,
        "a tenth of AdamW's. Source: Lion paper, section 5",
    )
    assert BY_KEY["model.name"].has_default is False
    assert BY_KEY["lora.variant"].default == "lora"  # no file sets it
    assert {item.option: item.value for item in BY_KEY["lora.rank"].options}["dora"] == 16  # through its defaults
    assert {item.value for item in BY_KEY["export.*.format"].options} >= {"gguf", "adapter"}


@pytest.mark.parametrize("entry", [entry for entry in ALL if entry.allowed], ids=lambda entry: entry.key)
def test_values_that_ship_are_among_the_allowed(entry: Any) -> None:
    values = [item.value for item in (*entry.options, *entry.experiments)] + [entry.default]
    assert {str(value) for value in values if value not in (None, "")} <= set(entry.allowed)


def test_words_are_read_from_rules_that_list_them_only() -> None:
    assert allowed_values(["must be one of a, b-c, d_e for train.objective=x"]) == ["a", "b-c", "d_e"]
    assert allowed_values(["must be float32 or bfloat16"]) == ["float32", "bfloat16"]
    assert allowed_values(["must be 0 or more", "must be a whole number of at least 1, or auto"]) == []


def problems(value: Any, node: dict[str, Any], key: str = "") -> Iterator[str]:
    """Yields where a value does not fit the part of JSON schema that is written."""
    if "anyOf" in node and all(list(problems(value, kind, key)) for kind in node["anyOf"]):
        yield f"{key}: {value!r} is none of the kinds"
    kinds = {"integer": int, "number": (int, float), "boolean": bool, "string": str, "array": list, "object": dict}
    kind = node.get("type")
    if kind and not (value is None if kind == "null" else isinstance(value, kinds[kind])):
        yield f"{key}: {value!r} is not of type {kind}"
        return
    if "enum" in node and value not in node["enum"]:
        yield f"{key}: {value!r} is not allowed"
    if "pattern" in node and not re.search(node["pattern"], value):
        yield f"{key}: {value!r} does not match"
    for name, item in value.items() if isinstance(value, dict) else ():
        part = node.get("properties", {}).get(name, node.get("additionalProperties", {}))
        if part is False:
            yield f"{key}.{name}: not a property"
        else:
            yield from problems(item, part, f"{key}.{name}")
    for item in value if isinstance(value, list) else ():
        yield from problems(item, node.get("items", {}), key)


SCHEMA = experiment_schema()


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_every_experiment_fits_the_schema(file: Path) -> None:
    assert not list(problems(OmegaConf.to_container(OmegaConf.load(file)), SCHEMA))


@pytest.mark.parametrize(
    "content",
    [
        {"lora": {"rnak": 8}}, {"lorra": {}}, {"lora": {"rank": "many"}}, {"lora": {"variant": "lra"}},
        {"train": {"steps": 1.5}}, {"data": {"train_roles": "assistant"}}, {"export": {"x": {"formt": "gguf"}}},
    ],
)  # fmt: skip
def test_the_schema_refuses(content: dict[str, Any]) -> None:
    assert list(problems(content, SCHEMA))


def test_the_schema_takes_null_and_references_where_the_configuration_does() -> None:
    content = {"train": {"steps": None}, "merge": {"loss_rows": "${eval.loss_rows}"}, "export": {"mine": {"rows": 3}}}
    assert not list(problems(content, SCHEMA))
    assert list(problems({"lora": {"rank": None}}, SCHEMA))


def test_config_prints_a_setting_a_group_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "lora.rank"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "lora.rank: a whole number; default 16" in printed
    assert "must be at least 1" in printed
    assert main(["config", "export.gguf_q8_0.dtype", "--json"]) == 0
    assert [entry["key"] for entry in json.loads(capsys.readouterr().out)] == ["export.*.dtype"]
    assert main(["config", "train.preference", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {entry["key"] for entry in found} == {
        entry.key for entry in entries("train") if entry.key.startswith("train.preference.")
    }


@pytest.mark.parametrize(
    ("key", "nearest"), [("lora.rnak", "lora.rank"), ("rank", "lora.rank"), ("lora.rank.x", None), ("nothing", None)]
)
def test_config_of_no_setting_names_the_closest(
    key: str, nearest: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", key]) == 2
    error = capsys.readouterr().err
    assert f"{key}: there is no such setting" in error
    assert nearest is None or f"did you mean {nearest}?" in error


def test_schema_is_written_where_the_flag_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "schema.json"
    assert main(["config", "--schema", str(file)]) == 0
    assert json.loads(file.read_text()) == json.loads(json.dumps(SCHEMA))
    assert capsys.readouterr().out.endswith(f"# yaml-language-server: $schema={file}\n")
