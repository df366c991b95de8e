"""The planned memory as bars."""

import re
import xml.etree.ElementTree as ElementTree

from finetune.report.planned import bars, planned_bars

GIB = 1024**3
PHASES = {
    "load": {"weights": 2 * GIB, "framework": GIB},
    "first_step": {"weights": 2 * GIB, "activations": 3 * GIB, "framework": GIB},
}


def widths(picture: str) -> list[float]:
    return [float(found) for found in re.findall(r'<rect [^>]*width="([\d.]+)"', picture)]


def test_bars_are_as_long_as_their_bytes() -> None:
    drawn = widths(bars(PHASES, memory=0))
    assert len(drawn) == 5
    assert drawn[3] == sorted(drawn)[-1]
    assert abs(drawn[3] / drawn[1] - 3) < 0.02


def test_the_memory_is_a_line_unless_the_bars_would_vanish_beside_it() -> None:
    assert 'class="zero"' in bars(PHASES, memory=8 * GIB)
    assert 'class="zero"' not in bars(PHASES, memory=80 * GIB)


def test_the_picture_is_well_formed() -> None:
    ElementTree.fromstring(bars(PHASES, memory=8 * GIB))


def test_a_plan_without_dimensions_draws_nothing() -> None:
    assert planned_bars({"plan": {"known": False}}) == ""
    assert planned_bars({"plan": None}) == ""


def test_the_caption_names_the_device() -> None:
    plan = {"known": True, "phases": PHASES, "device": "cuda", "devices": 1, "memory_bytes": 8 * GIB}
    assert "Bytes in the GPU" in planned_bars({"plan": plan})
    assert "8.0 GiB" in planned_bars({"plan": plan})
