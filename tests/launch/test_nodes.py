"""Two machines on one: network namespaces with a cable between them, as scripts/check_launch.py makes them."""

import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from tests.fixtures.overrides import SMALL
from tests.fixtures.rows import data_overrides
from tests.fixtures.scripts import script as open_script

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("ip") is None,
        reason="network namespaces take root on Linux and the program ip (package iproute2)",
    ),
]


@pytest.fixture
def check() -> ModuleType:
    return open_script("check_launch")


def test_node_that_dies_ends_the_other_and_a_restart_goes_on(
    tmp_path: Path,
    tiny_base: Path,
    check: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = [one for one in SMALL if not one.startswith(("train.steps", "+experiment"))]  # the script has its own
    settings = [
        *small,
        f"model.name={tiny_base}",
        *data_overrides(tmp_path),
        "preflight=off",
        "tracking=[]",
        "train.checkpoints=10",
    ]
    monkeypatch.setattr(check, "HEARTBEAT_TIMEOUT_SECONDS", 6)
    assert check.two_machines(tmp_path / "outputs", settings, troubles=[(10, "killed", 1)], steps=100)
    said = capsys.readouterr().out
    assert "node 1 killed: the other ended after" in said
    assert "finetune: process 1" in said
