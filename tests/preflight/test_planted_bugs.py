"""Each bug is really planted, and the proof that is there for it has to catch it."""

from collections.abc import Callable

import pytest

from finetune.preflight.checks import CHECKS
from finetune.preflight.stage import attempt
from tests.fixtures.preflight import Scene
from tests.preflight.bugs import BUGS, Bug

BEFORE = {"ending": ("learning",), "reload": ("learning",)}
"""Proofs that another one looks at the steps of."""

SLOW = [pytest.param(bug, marks=pytest.mark.slow) if bug.caught_by == "reload" else bug for bug in BUGS]


@pytest.mark.parametrize("bug", SLOW, ids=lambda bug: bug.name)
def test_planted_bug_is_caught(
    bug: Bug, scene: Scene, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    bug.plant(scene, monkeypatch)
    needed = [*BEFORE.get(bug.caught_by, ()), bug.caught_by]
    results, left_out = attempt(scene.context(bug.level), [proof for proof in CHECKS if proof.name in needed])
    assert not left_out
    found = results[-1]
    record_property("row", {"bug": bug.name, "proof": found["name"], "found": found["figure"], "bound": found["bound"]})
    assert (found["name"], found["passed"]) == (bug.caught_by, False), found


def test_every_proof_has_a_bug_that_it_catches() -> None:
    assert {bug.caught_by for bug in BUGS} == {proof.name for proof in CHECKS}
