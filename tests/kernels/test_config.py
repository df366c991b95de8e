"""The kernels group's problems, and the options that ship."""

from pathlib import Path

import pytest
import yaml

from finetune.kernels import KernelsConfig
from finetune.kernels.config import CHOICES
from tests.kernels.helpers import kernels_config

SHIPPED = sorted((Path(__file__).parents[2] / "conf" / "kernels").glob("*.yaml"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_option_has_no_problem(file: Path) -> None:
    assert list(KernelsConfig(**yaml.safe_load(file.read_text())).problems()) == []


def test_options_are_shipped() -> None:
    assert [file.stem for file in SHIPPED] == ["default", "plain"]


@pytest.mark.parametrize("key", CHOICES)
def test_unknown_value_is_refused_with_those_that_are_known(key: str) -> None:
    (problem,) = kernels_config(**{key: "fastest"}).problems()
    assert problem == f"kernels.{key} must be one of {', '.join(CHOICES[key])}; got 'fastest'"


@pytest.mark.parametrize("key", CHOICES)
def test_every_known_value_is_accepted(key: str) -> None:
    for value in CHOICES[key]:
        assert list(kernels_config(**{key: value}).problems()) == []


@pytest.mark.parametrize(("key", "value"), [("weights", "cached"), ("implementation", "native")])
def test_wish_that_needs_fused_layers_is_refused_with_plain_ones(key: str, value: str) -> None:
    (problem,) = kernels_config(layers="plain", **{key: value}).problems()
    assert problem.startswith(f"kernels.{key}={value} needs fused layers and kernels.layers is plain")


def test_all_problems_are_reported_at_once() -> None:
    assert (
        len(list(kernels_config(layers="plain", weights="cached", implementation="native", loss="none").problems()))
        == 3
    )
