"""Every rule of the train group, and the order that one of its settings makes."""

import pytest

from finetune.config import load
from finetune.errors import ConfigError
from finetune.train.sampler import StepBatchSampler


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.patience=0", "train.patience must be at least 1, or null for never; got 0"),
        ("train.save_steps=0", "train.save_steps must be at least 1; got 0"),
        ("train.select=first", "train.select must be one of last, best; got 'first'"),
        ("train.non_finite_steps=0", "train.non_finite_steps must be at least 1; got 0"),
        ("train.neftune_alpha=-1", "train.neftune_alpha must be positive, or null for no noise; got -1.0"),
        ("train.micro_batch=0", "train.micro_batch must be a whole number of at least 1, or auto; got 0"),
        ("train.micro_batch=1.5", "train.micro_batch must be a whole number of at least 1, or auto; got 1.5"),
        ("train.micro_batch=many", "train.micro_batch must be a whole number of at least 1, or auto; got many"),
        (
            "train.checkpointing=some",
            "train.checkpointing must be one of auto, none, selective, full, offloaded; got 'some'",
        ),
    ],
)
def test_setting_outside_its_rule_is_named(override: str, problem: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(["+experiment=quickstart", override])
    assert list(refusal.value.problems) == [problem]


@pytest.mark.parametrize("override", ["train.patience=2", "train.select=best"])
def test_settings_that_need_the_heldout_loss_need_evaluations(override: str) -> None:
    with pytest.raises(ConfigError, match=r"needs the held-out loss, which train\.evaluations=0 never computes"):
        load(["+experiment=quickstart", "train.evaluations=0", override])


def test_an_interval_takes_the_place_of_its_number() -> None:
    config = load(["+experiment=quickstart", "train.evaluations=0", "train.eval_steps=5", "train.patience=2"]).train
    assert (config.evaluates, config.key()["eval_steps"], "evaluations" in config.key()) == (True, 5, False)
    assert "eval_steps" not in load(["+experiment=quickstart"]).train.key()


def test_grouping_by_length_moves_no_row_to_another_step() -> None:
    lengths = [7, 3, 9, 1, 5, 8, 2, 6, 4, 10]
    grouped, plain = (
        [row for [row] in StepBatchSampler(10, rows_per_step=4, micro_batch=1, seed=3, lengths=sort_by)]
        for sort_by in (lengths, None)
    )
    assert grouped != plain
    for start in (0, 4, 8):
        step = grouped[start : start + 4]
        assert sorted(step) == sorted(plain[start : start + 4])
        assert [lengths[row] for row in step] == sorted((lengths[row] for row in step), reverse=True)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def rows(seed: int, epoch: int) -> list[int]:
        order = StepBatchSampler(50, rows_per_step=5, micro_batch=1, seed=seed)
        order.set_epoch(epoch)
        return [row for [row] in order]

    assert rows(1, 2) == rows(1, 2)
    assert rows(1, 2) != rows(1, 3)


@pytest.mark.parametrize(
    ("objective", "changed", "counts"),
    [
        ("sft", "train.preference.beta=0.7", False),
        ("sft", "train.checkpoints=9", False),
        ("sft", "train.save_steps=9", False),
        ("sft", "train.evaluations=3", True),
        ("sft", "train.eval_steps=3", True),
        ("dpo", "train.preference.beta=0.7", True),
        ("dpo", "train.preference.loss=ipo", True),
    ],
)
def test_key_holds_the_settings_that_the_objective_reads(objective: str, changed: str, counts: bool) -> None:
    settings = ["model=smollm2_135m", "data.path=rows.jsonl"]
    settings += ["train=dpo", "data.objective=preference"] if objective == "dpo" else []
    before, after = (load([*settings, *extra]).train.key() for extra in ([], [changed]))
    assert (before != after) is counts
    assert not any(name.startswith("grpo") for name in before)


def test_epochs_are_not_in_the_key_of_a_run_that_counts_steps() -> None:
    settings = ["model=smollm2_135m", "data.path=rows.jsonl", "train.steps=3"]
    one, two = (load([*settings, f"train.epochs={epochs}"]) for epochs in (1, 2))
    assert one.train.key() == two.train.key()
