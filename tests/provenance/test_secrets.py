"""Secrets come from the environment and go nowhere: no setting takes one, and no file of a run holds one."""

import re
from pathlib import Path

import pytest

from finetune.config import RunConfig
from finetune.config.fields import all_keys
from tests.fixtures.tiny_run import CANARIES, TinyRun

SECRET = re.compile(r"token|secret|key|password|passwd|credential|auth")
NO_SECRETS = {
    "data.checks.secret_share": "the share of rows that look as if they held secrets",
    "data.control_tokens": "what <|im_end|> inside a text means",
    "lora.tokens": "words of the vocabulary",
    "model.architecture.full_value_is_key": "of an attention head: whether its values are its keys",
    "model.architecture.linear_key_heads": "of linear attention: their number",
}
COUNTS = re.compile(r"(_tokens|tokens_per_step|kv_heads)$")
"""Tokens of text, counted."""


def test_the_schema_has_no_field_for_a_secret() -> None:
    suspicious = {
        key for key in all_keys(RunConfig) if SECRET.search(key.rsplit(".", 1)[-1]) and not COUNTS.search(key)
    }
    assert suspicious <= NO_SECRETS.keys()


def holders(folder: Path, canary: str) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and canary.encode() in file.read_bytes()]


def test_the_search_finds_a_planted_canary(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "log").write_bytes(b"\x00before" + CANARIES["HF_TOKEN"].encode() + b"after\xff")
    assert holders(tmp_path, CANARIES["HF_TOKEN"]) == [tmp_path / "a" / "b" / "log"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CANARIES)
def test_a_secret_of_the_environment_is_in_no_byte_that_a_run_writes(tiny_run: TinyRun, name: str) -> None:
    assert tiny_run.code == 0, tiny_run.said
    assert CANARIES[name] not in tiny_run.said
    assert list((tiny_run.folder / "tracking" / "wandb").glob("offline-run-*/*.wandb")), "W&B has written its file"
    assert holders(tiny_run.home, CANARIES[name]) == []
