"""The training section of objectives that compare answers shows what the loss does not: margin and likelihood."""

from pathlib import Path
from typing import Any

import pytest

from finetune.report.run_data import RunData
from finetune.report.training_section import training_section


def section(objective: str) -> dict[str, Any]:
    lines: list[dict[str, Any]] = [
        {"step": step, f"{part}/loss": 0.5 - 0.1 * step, f"{part}/reward_margin": 0.2 * step, f"{part}/kl": 0.0,
         f"{part}/reward_accuracy": 0.5 + 0.1 * step, f"{part}/reward_margin_low": 0.1 * step,
         f"{part}/reward_margin_high": 0.3 * step, f"{part}/reward_accuracy_low": 0.6,
         f"{part}/reward_accuracy_high": 0.8, f"{part}/chosen_logprob_per_token": -2.0 - step}
        for step in (1, 2)
        for part in ("train", "eval")
    ]  # fmt: skip
    data = RunData(
        run=Path("run"),
        config={"train": {"objective": objective}},
        command="",
        environment={},
        manifests={},
        metrics=lines,
        memory=[],
        samples=[],
    )
    return training_section({"train": {"first_loss": 0.5, "final_loss": 0.3}}, data)


@pytest.mark.parametrize(("objective", "unit"), [("orpo", "nats per pair"), ("kto", "0.3 per answer")])
def test_comparisons_are_in_the_text_and_drawn(objective: str, unit: str) -> None:
    shown = section(objective)
    assert unit in shown["text"]
    assert "right comparisons was 0.700 [0.600, 0.800]; the reward margin was 0.400 [0.200, 0.600]" in shown["text"]
    assert "went from -3 to -4 per token" in shown["text"]
    drawn = "".join(str(figure.picture) for figure in shown["small"])
    assert "Log-probability of good answers" in drawn
    assert "Reference point" not in drawn  # always 0, so there is no curve to draw
    assert "less likely" in shown["loss"].caption


def test_supervised_training_draws_none_of_it() -> None:
    shown = section("sft")
    assert "nats per token" in shown["text"]
    assert "Log-probability" not in "".join(str(figure.picture) for figure in shown["small"])
