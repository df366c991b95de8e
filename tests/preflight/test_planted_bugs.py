"""Each bug is planted, and the check that is there for it has to catch it."""

from collections.abc import Callable

import pytest

from finetune.preflight.checks import CHECKS
from finetune.preflight.stage import run_checks
from tests.fixtures.preflight import Scene
from tests.preflight.bugs import BUGS, Bug

BEFORE = {"ending": ("learning",), "reload": ("learning",)}
"""Checks whose steps another check needs."""

SLOW = [pytest.param(bug, marks=pytest.mark.slow) if bug.caught_by == "reload" else bug for bug in BUGS]


@pytest.mark.parametrize("bug", SLOW, ids=lambda bug: bug.name)
def test_planted_bug_is_caught(
    bug: Bug, scene: Scene, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    bug.plant(scene, monkeypatch)
    needed = [*BEFORE.get(bug.caught_by, ()), bug.caught_by]
    records, skipped = run_checks(scene.context(bug.level), [check for check in CHECKS if check.name in needed])
    assert not skipped
    check = records[-1]
    record_property("row", {"bug": bug.name, "check": check.name, "figure": check.figure, "bound": check.bound})
    assert (check.name, check.passed) == (bug.caught_by, False), check


def test_every_check_has_a_bug_that_it_catches() -> None:
    assert {bug.caught_by for bug in BUGS} == {check.name for check in CHECKS}
