"""Rewards of sampled answers: what they score, how errors count, and settings or rows that cannot be trained on."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune import rewards as module
from finetune.config import load as load_config
from finetune.data import prepare
from finetune.errors import ConfigError, DataError, TrainError
from finetune.prompt_problems import prompt_problems
from finetune.rewards import SHIPPED, Rewards, available, column_of
from tests.fixtures.prompts import GRPO, SETTINGS, prompts_of, write_prompts

ROW = {"row": 3, "reference": '{"a": 1, "b": 2}', "tests": "assert double(2) == 4"}
GOOD = [*GRPO, "train.grpo.rewards={json_valid: 0.5, json_fields: 2}"]


def installed(monkeypatch: pytest.MonkeyPatch, reward: Callable[..., Any]) -> None:
    """A package with a reward ``own``."""

    def found(*, group: str, name: str | None = None) -> Any:
        assert group == "finetune.rewards"
        points = [SimpleNamespace(name="own", load=lambda: reward)] if name in (None, "own") else []
        return SimpleNamespace(names={point.name for point in points}) if name is None else points

    monkeypatch.setattr(module, "entry_points", found)


def test_rewards_are_the_metrics_by_name_and_weighted() -> None:
    rewards = Rewards(weights={"json_valid": 0.5, "json_fields": 2.0, "exact_match": 0.0})
    right, half, wrong = rewards.score([ROW["reference"], '{"a": 1}', "no"], [ROW] * 3, tokens=[1, 1, 1])
    assert right == {"json_valid": 1.0, "json_fields": 1.0, "exact_match": 1.0}
    assert half == {"json_valid": 1.0, "json_fields": 0.5, "exact_match": 0.0}
    assert [rewards.total(one) for one in (right, half, wrong)] == [2.5, 1.5, 0.0]


def test_length_falls_from_the_target_to_the_limit_and_format_matches_the_whole_answer() -> None:
    rewards = Rewards(weights={"length": 1, "format": 1}, pattern="<a>.*</a>", target_tokens=4, limit=8)
    scores = rewards.score(["<a>1\n2</a>", "x <a></a>", " <a></a> ", ""], [ROW] * 4, tokens=[4, 6, 8, 1])
    assert [one["length"] for one in scores] == [1.0, 0.5, 0.0, 1.0]
    assert [one["format"] for one in scores] == [1.0, 0.0, 1.0, 0.0]


def test_an_expression_that_takes_exponential_time_is_a_counted_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATTERN_SECONDS", 0.05)
    rewards = Rewards(weights={"format": 1.0}, pattern=r"(a|a|aa)+\d", error_value=-1.0)
    assert rewards.score(["a" * 60], [ROW], tokens=[1]) == [{"format": -1.0}]
    assert rewards.errors == {"format": 1}


def test_code_is_judged_by_its_tests_in_the_sandbox() -> None:
    rewards = Rewards(weights={"pass_at_1": 1.0})
    programs = ["def double(n):\n    return 2 * n", "def double(n):\n    return n", "import os\nos.fork()"]
    assert [one["pass_at_1"] for one in rewards.score(programs, [ROW] * 3, tokens=[1, 1, 1])] == [1.0, 0.0, 0.0]
    assert not rewards.errors


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda answer, row: row["solution"], "KeyError: 'solution'"),
        (lambda answer, row: float("inf"), "it returned inf"),
        (lambda answer, row: None, "TypeError"),
    ],
)
def test_an_error_of_ones_own_reward_is_counted_or_stops(
    reward: Callable[..., Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, reward)
    assert available() == [*SHIPPED, "own"]
    counted = Rewards(weights={"own": 1.0}, error_value=-0.5)
    assert counted.score(["x", "y"], [ROW, ROW], tokens=[1, 1]) == [{"own": -0.5}] * 2
    assert counted.errors == {"own": 2}
    assert message in counted.first_error["own"]
    assert "row 3" in counted.first_error["own"]
    with pytest.raises(TrainError, match=f"own fails: {message}.*on_error=value"):
        Rewards(weights={"own": 1.0}, stops=True).score(["x"], [ROW], tokens=[1])


def test_ones_own_reward_sees_answer_and_row(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, lambda answer, row: len(answer) + len(row["reference"]))
    assert Rewards(weights={"own": 1.0}).score(["ab"], [ROW], tokens=[1]) == [{"own": 2.0 + len(ROW["reference"])}]


def test_every_reward_names_the_column_that_it_reads() -> None:
    columns = {name: column_of(name) for name in SHIPPED}
    assert columns["json_fields"] == columns["exact_match"] == columns["number"] == columns["label"] == "reference"
    assert columns["pass_at_1"] == "tests"
    assert columns["json_valid"] == columns["length"] == columns["format"] == columns["code_valid"] == ""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.grpo.rewards.json_valid=0", "train.grpo.rewards.json_fields=0"], "has no weight other than 0"),
        (["train.grpo.group=1"], "group must be at least 2.*set it to 8"),
        (["train.grpo.temperature=0"], "temperature must be above 0"),
        (["train.grpo.top_p=0"], "top_p must be above 0"),
        (["train.grpo.max_new_tokens=0"], "max_new_tokens must be at least 1"),
        (["train.grpo.loss=ppo"], "loss must be one of grpo, dapo, dr_grpo, gspo, rloo; got 'ppo'"),
        (["+train.grpo.rewards.politeness=1"], "politeness is not known; use exact_match"),
        (["train.grpo.pattern=a"], "pattern and the reward format belong together"),
        (["+train.grpo.rewards.format=1"], "pattern and the reward format belong together"),
        (["+train.grpo.rewards.format=1", "train.grpo.pattern='('"], "is not a regular expression"),
        (["+train.grpo.rewards.length=1"], "target_tokens and the reward length belong together"),
        (["+train.grpo.rewards.length=1", "train.grpo.target_tokens=64"], "below train.grpo.max_new_tokens=64"),
        (["train.grpo.beta=0.1", "train.grpo.loss=rloo"], "beta has no effect with loss=rloo"),
        (["train.grpo.on_error=ignore"], "on_error must be one of value, stop"),
        (["train.rows_per_step=null", "train.tokens_per_step=512"], "rows_per_step=8, which counts prompts"),
        (["train.select=best"], "use the held-out loss"),
        (["lora.dropout=0.1"], "lora.dropout adds noise"),
        (["launch=fsdp"], "choose launch=ddp or launch=single"),
        (["data.objective=supervised", "data.format=messages"], "trains on data.objective=prompt; got supervised"),
        (["train=default"], "train.grpo has an effect with train.objective=grpo only|choose train=grpo"),
        (["data.format=preference"], "no prompt with one reference"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_that_cannot_work_are_one_clear_message(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([*GOOD, *overrides])


def test_rows_without_what_a_reward_reads_are_refused_before_training(tmp_path: Path, tokenizer: Any) -> None:
    data = prompts_of(tmp_path, tokenizer, composed=[*GRPO, *SETTINGS], reference=False)
    config = load_config([*GOOD, "eval.metrics=[json_exact]"])
    problems = list(prompt_problems(config, data, positions=512))
    assert len(problems) == 3
    assert (
        "train.grpo.rewards: json_fields reads the reference of a row, and 24 of 24 rows in train have none"
        in problems[0]
    )
    assert "6 of 6 rows in heldout" in problems[1]
    assert problems[2].startswith("eval.metrics: json_exact reads the reference")
    fine = load_config([*GRPO, "train.grpo.rewards={json_valid: 1, pass_at_1: 1}", "eval.metrics=[json_valid]"])
    assert not list(prompt_problems(fine, data, positions=512))


def test_answers_beyond_the_positions_are_refused_with_the_largest_limit(tmp_path: Path, tokenizer: Any) -> None:
    from datasets import load_from_disk

    data = prompts_of(tmp_path, tokenizer, composed=[*GRPO, *SETTINGS])
    splits = [load_from_disk(str(data.folder / split)) for split in ("train", "heldout")]
    longest = max(len(ids) for rows in splits for ids in rows["prompt_ids"])
    config = load_config([*GOOD, "train.grpo.max_new_tokens=64"])
    assert not list(prompt_problems(config, data, positions=longest + 64))
    (problem,) = prompt_problems(config, data, positions=longest + 63)
    assert f"the longest prompt has {longest} tokens" in problem
    assert "set it to at most 63" in problem


def test_prompts_keep_reference_and_tests_and_end_before_the_answer(tmp_path: Path, tokenizer: Any) -> None:
    from datasets import load_from_disk

    data = prompts_of(tmp_path, tokenizer, composed=[*GRPO, *SETTINGS])
    row = load_from_disk(str(data.folder / "train"))[0]
    prompt = tokenizer.decode(row["prompt_ids"])
    assert prompt.endswith("<|im_start|>assistant\n")
    assert row["reference"] == f'{{"time":{row["row"]}}}'
    assert row["input_ids"][: len(row["prompt_ids"])] == row["prompt_ids"]


def test_prompts_without_answers_are_refused_as_examples(tmp_path: Path, tokenizer: Any) -> None:
    file = write_prompts(tmp_path / "rows.jsonl", count=4, reference=False)
    config = load_config(["+experiment=quickstart", f"data.path={file}", "data.heldout_path=null", "data.format=auto"])
    with pytest.raises(DataError, match="whose rows may be without an answer"):
        prepare(config.data, folder=tmp_path / "data", tokenizer=tokenizer, seed=1)
