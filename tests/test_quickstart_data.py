import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.fixtures.scripts import script as open_script

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "data" / "quickstart"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return open_script("make_quickstart_data")


def _rows(part: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def _request(row: dict[str, Any]) -> str:
    return row["messages"][1]["content"]


def test_shipped_files_are_what_the_script_writes_byte_for_byte(script: ModuleType, tmp_path: Path) -> None:
    for part, file in script.write(tmp_path).items():
        assert file.read_bytes() == (FOLDER / f"{part}.jsonl").read_bytes(), (
            f"run scripts/make_quickstart_data.py: {part}.jsonl differs"
        )


@pytest.mark.parametrize(("part", "of_each_intent"), [("train", 80), ("heldout", 10)])
def test_every_intent_has_as_many_rows(part: str, of_each_intent: int) -> None:
    counts = Counter(row["intent"] for row in _rows(part))
    assert len(counts) == 16
    assert set(counts.values()) == {of_each_intent}


def test_heldout_rows_share_no_phrasing_with_training_rows() -> None:
    import yaml

    source = yaml.safe_load((FOLDER / "phrasings.yaml").read_text(encoding="utf-8"))
    train = {phrasing for intent in source["intents"].values() for phrasing in intent["train"]}
    heldout = {phrasing for intent in source["intents"].values() for phrasing in intent["heldout"]}
    assert not train & heldout
    assert not {row["template"] for row in _rows("train")} & {row["template"] for row in _rows("heldout")}


def test_no_request_occurs_twice() -> None:
    requests = [_request(row).rstrip(".") for part in ("train", "heldout") for row in _rows(part)]
    assert len(requests) == len(set(requests))


def test_heldout_rows_hold_values_that_training_never_saw() -> None:
    trained = " ".join(row["messages"][2]["content"] for row in _rows("train"))
    for value in ("Helsinki", "Sofia", "basement"):
        assert value not in trained
        assert any(value in row["messages"][2]["content"] for row in _rows("heldout"))


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_every_answer_is_one_compact_json_object_that_names_its_intent(part: str) -> None:
    for row in _rows(part):
        answer = row["messages"][2]["content"]
        parsed = json.loads(answer)
        assert json.dumps(parsed, separators=(",", ":"), ensure_ascii=False) == answer
        assert next(iter(parsed)) == "intent"
        assert parsed["intent"] == row["intent"]


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_rows_are_short_enough_for_a_cpu(part: str) -> None:
    """Characters stand in for tokens, so that the test needs no tokenizer: the longest row has 70 of SmolLM2's."""
    for row in _rows(part):
        assert len(_request(row)) <= 90
        assert len(row["messages"][2]["content"]) <= 110


@pytest.mark.parametrize(
    ("hour", "minute", "spoken"),
    [
        (7, 0, "seven in the morning"),
        (12, 45, "quarter to one in the afternoon"),
        (19, 30, "half past seven in the evening"),
    ],
)
def test_times_are_spoken_as_people_say_them(script: ModuleType, hour: int, minute: int, spoken: str) -> None:
    assert script._spoken(hour, minute) == spoken
