import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from finetune.html.lengths import length_picture
from finetune.report.answers import last_request
from finetune.report.curves import loss_picture, memory_picture, series
from finetune.report.intervals import agreement_picture, artifact_picture, change_picture


@pytest.mark.parametrize(
    "picture",
    [
        loss_picture(
            [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0}, {"step": 2, "eval/loss": 1.5}],
            unit="nats per token",
        ),
        loss_picture([{"step": 1, "train/loss": 2.0}], unit="nats per token"),
        loss_picture([{"step": step, "train/loss": 5.0 - step / 100} for step in range(300)], unit="nats per token"),
        memory_picture(
            [{"time": t, "stage": "train", "rss_bytes": 10**9 + t, "device_bytes": 10**8} for t in range(1000)]
        ),
        artifact_picture({"base": {"metrics": {"f": {"value": 1.5, "low": 1.0, "high": 2.0}}}}, "f"),
        artifact_picture({"base": {"metrics": {"f": {"value": 0.0, "low": 0.0, "high": 0.0}}}}, "f"),
        change_picture({"tuning": {"f": {"difference": 0.0, "low": 0.0, "high": 0.0}}}, "f", share=True),
        length_picture({"edges": [0, 10, 20], "rows": [3, 1]}, limit=16),
        length_picture({"edges": [0, 10, 20], "rows": [3, 1]}, limit=1),
        agreement_picture([{"name": "a", "kl": 0.0}, {"name": "b", "kl": 0.3}], "a"),
        agreement_picture([{"name": "a", "kl": 0.0}, {"name": "b", "kl": 0.0}], "a"),
    ],
)
def test_pictures_are_well_formed_and_stay_inside_their_box(picture: str) -> None:
    svg = next(ElementTree.fromstring(picture).iter("svg"))
    width, height = float(svg.attrib["width"]), float(svg.attrib["height"])
    for element in svg.iter():
        for key, bound in (("x", width), ("cx", width), ("x1", width), ("x2", width), ("y", height), ("cy", height)):
            if key in element.attrib:
                assert -1 <= float(element.attrib[key]) <= bound + 1, ElementTree.tostring(element)


@pytest.mark.parametrize("last", [1, 2, 3, 7])
def test_the_axis_of_a_short_training_counts_whole_steps(last: int) -> None:
    drawn = loss_picture([{"step": step, "train/loss": 5.0 - step} for step in range(1, last + 1)], unit="nats")
    labels = re.findall(r'text-anchor="middle">([\d,]+)<', drawn)
    assert labels == [str(step) for step in range(last + 1)]


@pytest.mark.parametrize(
    "picture",
    [
        loss_picture([], unit="nats per token"),
        memory_picture([]),
        length_picture({}, limit=None),
        artifact_picture({}, "f"),
        agreement_picture([], "a"),
    ],
)
def test_nothing_measured_is_no_picture(picture: str) -> None:
    assert picture == ""


def test_of_a_step_that_was_repeated_the_later_value_counts() -> None:
    lines: list[dict[str, Any]] = [
        {"step": 1, "train/loss": 3.0},
        {"step": 2, "train/loss": 9.0},
        {"step": 2, "train/loss": 2.0},
    ]
    assert series([*lines, {"step": 3, "train/loss": float("nan")}], "train/loss") == [(1, 3.0), (2, 2.0)]


def test_time_between_a_stop_and_its_resumption_is_cut_out() -> None:
    day = 86_400
    memory = [{"time": time, "stage": "train", "rss_bytes": 1} for time in (0, 10, day, day + 10)]
    assert "0.5" not in memory_picture(memory)
    assert "seconds of work" in memory_picture(memory)


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nDial Felix.<|im_end|>\n<|im_start|>assistant\n",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nDial Felix.<|eot_id|>",
        "<s>[INST] Dial Felix. [/INST]",
        "<bos><start_of_turn>user\nDial Felix.<end_of_turn>\n<start_of_turn>model\n",
        "<|user|>\nDial Felix.<|end|>\n<|assistant|>\n",
        "Dial Felix.",
    ],
)
def test_the_request_is_found_in_the_prompt_of_any_template(prompt: str) -> None:
    assert last_request(prompt) == "Dial Felix."
