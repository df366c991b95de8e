"""More than 1,000 bad settings: every setting with every kind of value that its type cannot take.

All settings get one kind of value at a time, in one command line: each must have one problem of its own.
"""

from collections import Counter
from typing import Any

import pytest

from finetune.config import RunConfig, load
from finetune.config.fields import all_keys, field_types, resolve_field
from finetune.errors import ConfigError

MAPPING, LISTS, WORDS = "{a: {b: 1}}", "[[1],2]", "many"
NO_NUMBERS = [WORDS, "2026-01-01", "x" * 500, "'1 2'", "[]", MAPPING, LISTS]
WRONG: dict[Any, list[str]] = {
    int: [*NO_NUMBERS, "1.5", "1e999", "nan", "true"],
    float: [*NO_NUMBERS, "true"],
    bool: [*NO_NUMBERS, "1.5", "null"],
    str: [MAPPING, LISTS],
}
"""By type: values that no setting of it takes."""

NEITHER = [MAPPING, LISTS, WORDS, "null", "true", "-1", "0", "1.5", "1e999", "nan", "[]", "''"]
"""Values for settings that are a number or a list, or else ``auto``."""

NAMED = ("export.", "tracking.", "data.sources.")
"""Settings of an export, a tracker or a source, which need its name."""

KEYS = sorted(all_keys(RunConfig))
SETTINGS = [key for key in KEYS if not key.startswith(NAMED) and not any(other.startswith(f"{key}.") for other in KEYS)]


def type_of(key: str) -> Any:
    owner, name = resolve_field(key, RunConfig)
    hint = field_types(owner)[name]
    return next((kind for kind in (int, float, bool, str) if hint in (kind, kind | None)), Any if hint is Any else None)


CASES = {
    value: [key for key in SETTINGS if value in WRONG.get(type_of(key), [])]
    for value in dict.fromkeys(value for values in WRONG.values() for value in values)
}
AUTOMATIC = [key for key in SETTINGS if type_of(key) is Any]


def test_the_corpus_is_as_large_as_promised() -> None:
    assert sum(map(len, CASES.values())) + len(AUTOMATIC) * len(NEITHER) > 1000


@pytest.mark.parametrize("value", CASES, ids=lambda value: value[:20])
def test_every_setting_refuses_what_its_type_cannot_be_with_one_problem_each(value: str) -> None:
    assert problems_by_setting(CASES[value], value) == dict.fromkeys(CASES[value], 1)


@pytest.mark.parametrize("value", NEITHER)
def test_every_setting_that_may_be_auto_refuses_what_is_neither(value: str) -> None:
    assert problems_by_setting(AUTOMATIC, value) == dict.fromkeys(AUTOMATIC, 1)


def problems_by_setting(settings: list[str], value: str) -> dict[str, int]:
    with pytest.raises(ConfigError) as caught:
        load(["+experiment=quickstart", *(f"{key}={value}" for key in settings)])
    named = Counter(problem.partition(" ")[0].rstrip(":") for problem in caught.value.problems)
    return {key: named[key] for key in settings}


@pytest.mark.parametrize("value", ["${nope}", "${oc.env:NOPE}", "${lora.rank"])
@pytest.mark.parametrize("key", ["lora.rank", "optim.learning_rate", "data.packing", "run.name", "lora.targets"])
def test_interpolations_that_lead_nowhere_are_problems_of_the_configuration(key: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(["+experiment=quickstart", f"{key}={value}"])
    assert [key in problem for problem in caught.value.problems] == [True]


@pytest.mark.parametrize("key", ["run.name", "run.root", "data.path", "model.name", "lora.targets"])
def test_a_nul_is_refused_wherever_text_stands(key: str) -> None:
    value = "['\0']" if key == "lora.targets" else "'a\0'"
    with pytest.raises(ConfigError) as caught:
        load(["+experiment=quickstart", f"{key}={value}"])
    assert [problem.partition(" ")[0].partition("[")[0].rstrip(":") for problem in caught.value.problems] == [key]


def test_a_name_longer_than_file_systems_take_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run\.name must have at most 255 bytes, which file systems take; got 256"):
        load(["+experiment=quickstart", f"run.name={'n' * 256}"])
