"""The planned memory as bars."""

import re
import xml.etree.ElementTree as ElementTree

from finetune.report.planned import bars, planned_figure, planned_text

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


def test_training_as_planned_is_compared_with_training_as_measured() -> None:
    plan = {"known": True, "device": "cpu", "phases": {**PHASES, "eval": {"weights": 90 * GIB}}, "seconds": {}}
    stages = {
        "preflight": {"peak_rss_bytes": 80 * GIB, "peak_device_bytes": None, "seconds": 5.0},
        "train": {"peak_rss_bytes": 9 * GIB, "peak_device_bytes": None, "seconds": 60.0},
    }
    text = planned_text({"plan": plan, "stages": stages})
    assert "6.0 GiB" in text
    assert "9.0 GiB" in text
    assert "(+50%)" in text
    assert "Time" not in text


def test_a_planned_time_is_compared_with_the_time_it_took() -> None:
    plan = {"known": True, "device": "cuda", "phases": PHASES, "seconds": {"train": 90.0, "eval": 1.0}}
    stages = {"train": {"peak_rss_bytes": 1, "peak_device_bytes": 3 * GIB, "seconds": 60.0}}
    text = planned_text({"plan": {**plan, "speed_source": "2 earlier runs of this model here"}, "stages": stages})
    assert "(-50%)" in text
    assert "planned from 2 earlier runs of this model here" in text
