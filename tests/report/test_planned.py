"""The planned memory as bars."""

import re
import xml.etree.ElementTree as ElementTree

from finetune.report.planned import bars, planned_figure

GIB = 1024**3
PHASES = {
    "load": {"weights": 2 * GIB, "framework": GIB},
    "first_step": {"weights": 2 * GIB, "activations": 3 * GIB, "framework": GIB},
}


def widths(picture: str) -> list[float]:
    return [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', picture)]


def test_bars_are_as_long_as_their_bytes() -> None:
    drawn = widths(bars(PHASES, memory=0))
    assert len(drawn) == 5
    assert drawn[3] == sorted(drawn)[-1]
    assert abs(drawn[3] / drawn[1] - 3) < 0.02


def test_the_memory_is_a_line_unless_the_bars_would_vanish_next_to_it() -> None:
    assert 'class="zero"' in bars(PHASES, memory=8 * GIB)
    assert 'class="zero"' not in bars(PHASES, memory=80 * GIB)


def test_the_picture_is_well_formed() -> None:
    ElementTree.fromstring(bars(PHASES, memory=8 * GIB))


def test_a_plan_without_dimensions_draws_nothing() -> None:
    assert planned_figure({"plan": {"known": False}}) is None
    assert planned_figure({"plan": None}) is None


def test_the_caption_names_the_device() -> None:
    plan = {"known": True, "phases": PHASES, "device": "cuda", "devices": 1, "memory_bytes": 8 * GIB}
    shown = planned_figure({"plan": plan})
    assert shown is not None
    assert "Bytes in the GPU" in shown.caption
    assert "8.0 GiB" in shown.caption
