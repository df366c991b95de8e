"""Configs and prepared folders for the data tests."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from finetune.data import DataConfig, prepare
from finetune.products import PreparedData
from tests.data.helpers import checks, write_jsonl

NEUTRAL: dict[str, Any] = {
    "format": "auto",
    "max_tokens": 256,
    "too_long": "drop",
    "packing": False,
    "bad_rows": "error",
    "duplicates": "drop",
    "leaked": "drop",
    "cache": "",
    "workers": 1,
    "preview_rows": 3,
}


@pytest.fixture
def make_config() -> Callable[..., DataConfig]:
    def make(**changes: Any) -> DataConfig:
        return DataConfig(**{**NEUTRAL, "checks": checks(), **changes})

    return make


@pytest.fixture
def run(make_config: Callable[..., DataConfig], tmp_path: Path, tokenizer: Any) -> Callable[..., PreparedData]:
    """Writes rows as JSON lines where they are given, and prepares them."""
    count = iter(range(1000))

    def prepared(
        rows: Iterable[Any] | None = None, *, seed: int = 0, with_tokenizer: Any = None, **changes: Any
    ) -> PreparedData:
        number = next(count)
        if rows is not None:
            changes["path"] = str(write_jsonl(tmp_path / "rows.jsonl", rows))
        return prepare(
            make_config(**changes), folder=tmp_path / f"out{number}", tokenizer=with_tokenizer or tokenizer, seed=seed
        )

    return prepared
