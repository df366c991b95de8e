"""The training section of a training on rewards shows rewards with intervals and answers, and not the loss."""

from pathlib import Path
from typing import Any

from finetune.report.run_data import RunData
from finetune.report.training_section import data_section, training_section


def answer(step: int, row: int, number: int, reward: float) -> dict[str, Any]:
    return {
        "step": step,
        "row": row,
        "number": number,
        "answer": f"answer {step}/{row}/{number}",
        "tokens": 5,
        "ended": True,
        "scores": {"json_valid": reward, "json_fields": reward / 2},
        "reward": reward,
        "advantage": 0.0,
    }


def test_rewards_have_intervals_and_answers_stand_next_to_each_other() -> None:
    answers = [
        answer(step, row, number, float(number < step // 2))
        for step in range(1, 9)
        for row in (1, 2)
        for number in range(4)
    ]
    metrics: list[dict[str, Any]] = [
        {"step": step, "train/loss": 1e-9, "train/reward": step / 8, "train/reward_errors": 3.0}
        | ({"train/kl": step / 100} if step in (1, 4, 8) else {})
        for step in range(1, 9)
    ]
    data = RunData(
        run=Path("run"),
        config={"train": {"objective": "grpo"}},
        command="",
        environment={},
        manifests={},
        metrics=[*metrics, {"step": 8, "eval/reward": 0.75, "eval/reward_low": 0.5, "eval/reward_high": 1.0}],
        memory=[],
        samples=[],
        answers=answers,
    )
    shown = training_section({"train": {"first_loss": 1e-9, "final_loss": 1e-9}}, data)
    assert "loss went" not in shown["text"]
    assert "The mean reward was 0.125 [0.000, 0.250] in steps 1 to 2 and 0.875" in shown["text"]
    assert "KL divergence to the base ended at 0.08 nats per token" in shown["text"]
    assert "held-out prompts ended at 0.750 [0.500, 1.000]" in shown["text"]
    assert "3 of 8 steps measured it" in shown["text"]
    assert "3 rewards failed" in shown["text"]
    assert "Reward over the training steps" in str(shown["loss"].picture)
    assert "held-out reward 0.75" in str(shown["loss"].picture)
    assert "KL divergence" in "".join(str(figure.picture) for figure in shown["small"])
    intervals, groups = shown["tables"]
    assert intervals.header == ["Reward", "Steps 1 to 2", "Steps 7 to 8"]
    assert [row[0] for row in intervals.rows] == ["Valid JSON", "Fields right", "Reward, weighted sum"]
    assert intervals.rows[1][1].startswith("0.062 [")
    last = [row for row in groups.rows if row[0] == "8"]
    assert len(groups.rows) == 4
    assert len(last) == 2
    assert [row[3] for row in groups.rows if row[0] == "1"] == ["0 and 0"] * 2
    counts = {"tokens": 900, "trained_tokens": 300, "train_rows": 20, "heldout_rows": 4, "packed_rows": 20}
    rows = data_section({"data": {**counts, "rows": {}}}, data)
    assert rows is not None
    assert rows["note"] == "prompts to sample from"
    assert "computed on sampled answers" in rows["text"]
