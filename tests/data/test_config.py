"""Every data option composes, and every broken rule is named with its remedy."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from finetune.data import DataConfig, SourceConfig

CONF = Path(__file__).parents[2] / "conf"
OPTIONS = sorted(file.stem for file in (CONF / "data").glob("*.yaml") if file.stem != "_base")
WITH_ROWS = {"ultrafeedback", "quickstart", "guanaco", "alpaca_cleaned"}


def compose(name: str) -> DataConfig:
    from hydra import compose, initialize_config_dir

    if not OmegaConf.has_resolver("shipped"):
        OmegaConf.register_new_resolver("shipped", lambda file: f"data/{file}")
    with initialize_config_dir(config_dir=str(CONF), version_base=None):
        return OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(DataConfig), compose(overrides=[f"+data={name}"]).data)
        )  # type: ignore[return-value]


@pytest.mark.parametrize("name", OPTIONS)
def test_option_composes_without_problems_once_it_has_rows(name: str) -> None:
    config = compose(name)
    if name not in WITH_ROWS:
        config.path = "rows.jsonl"
    assert list(config.problems()) == []


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"hub": "a/b"}, "got data.path and data.hub"),
    ({"format": "alpacca"}, "data.format must be one of auto, alpaca"),
    ({"too_long": "cut"}, "data.too_long must be one of drop"),
    ({"max_tokens": 2}, "data.max_tokens must be at least 8; got 2"),
    ({"pack_tokens": 100}, "data.pack_tokens must be at least data.max_tokens"),
    ({"heldout_share": 1.0}, "data.heldout_share must be at least 0 and below 1"),
    ({"heldout_rows": 0}, "data.heldout_rows must be at least 1"),
    ({"heldout_rows": 5, "heldout_path": "x"}, "both name the held-out rows; set one to null"),
    ({"train_roles": ["robot"]}, "data.train_roles may contain system, user, assistant, tool; got ['robot']"),
    ({"train_roles": []}, "no token would be trained on"),
    ({"workers": -1}, "data.workers must not be negative"),
    ({"path": None, "sources": {"a": SourceConfig()}}, "data.sources.a must have either path or hub; got neither"),
    (
        {"path": None, "sources": {"a": SourceConfig(path="x", weight=1.0, rows=2)}},
        "weight and rows exclude each other",
    ),
    (
        {"path": None, "sources": {"a": SourceConfig(path="x", weight=-1.0)}},
        "data.sources.a.weight must be greater than 0",
    ),
    (
        {"path": None, "sources": {"a": SourceConfig(path="x", weight=1.0), "b": SourceConfig(path="y")}},
        "either all sources have a weight",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN)
def test_broken_rule_is_named(changes: dict[str, Any], message: str, make_config: Callable[..., DataConfig]) -> None:
    problems = list(make_config(**{"path": "rows.jsonl", **changes}).problems())
    assert any(message in problem for problem in problems), problems


def test_importing_the_room_loads_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "datasets", "numpy", "pyarrow", "tokenizers"]
    program = f"import sys, finetune.data; print([name for name in {heavy!r} if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
        == "[]"
    )
