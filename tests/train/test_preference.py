"""DPO on a tiny 4-bit model: the loss is TRL's, training starts at the reference, and resuming changes nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from finetune.config import load as load_config
from finetune.errors import ConfigError, Interrupted, TrainError
from finetune.train.pair_losses import answer_scores, figures, named, pair_losses, rewards
from finetune.train.preference import (
    PairCollator,
    answer_logprobs,
    answer_start,
    chosen,
    held_out_pairs,
    obstacle,
    rejected,
    token_losses,
    training_pairs,
)
from finetune.train.preference_config import PreferenceConfig
from tests.fixtures.pairs import COMPOSED
from tests.fixtures.preference_training import BETA, Collected, train
from tests.fixtures.trl_oracle import compared

PAIR = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "rejected_input_ids": [5, 8], "rejected_labels": [-100, 8]}


@pytest.mark.parametrize("objective", ["sigmoid", "ipo", "hinge", "aot"])
def test_loss_gradient_and_figures_are_those_of_trl(
    objective: str, tiny_base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """In float32, equal but for rounding. TRL's ``aot`` of one pair is the smoothed loss that its ``sigmoid`` lacks."""
    from peft import LoraConfig
    from transformers import LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    smoothing = 0.2 if objective == "aot" else 0.0
    rows = [
        {"prompt": "Wake me at seven.", "chosen": '{"time":7}', "rejected": "no table for two people"},
        {"prompt": "Book a table.", "chosen": "for two people tomorrow", "rejected": "Paris"},
    ]
    rows = rows[: 1 if objective == "aot" else 2]
    trainer = DPOTrainer(
        model=LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(tmp_path),
            beta=BETA,
            loss_type=objective,
            label_smoothing=smoothing,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_length=None,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    adapter = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    examples = list(trainer.train_dataset)
    theirs = trainer.compute_loss(trainer.model.train(), trainer.data_collator(examples))
    their_gradients = torch.autograd.grad(theirs, adapter)

    config = PreferenceConfig(beta=BETA, loss="sigmoid" if objective == "aot" else objective, label_smoothing=smoothing)
    rows = [prepared(example) for example in examples]
    inputs = PairCollator(flat=False, pad_token_id=0)(rows)
    tokens = inputs.pop("answer_tokens")
    inputs.pop("padding")
    plain: Any = SimpleNamespace(loss_on_trained_tokens=False)
    with torch.no_grad(), trainer.model.disable_adapter():
        reference = answer_logprobs(token_losses(trainer.model, None, inputs, plain), tokens)
    policy = answer_logprobs(token_losses(trainer.model, None, inputs, plain), tokens)
    ours = pair_losses(answer_scores("dpo", policy, reference, tokens), tokens, config).mean()

    assert theirs.item() == pytest.approx(ours.item(), rel=1e-5)
    gradients = torch.autograd.grad(ours, adapter)
    compared(f"dpo {objective}", theirs, ours, their_gradients, gradients)
    for expected, gradient in zip(their_gradients, gradients, strict=True):
        assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-6 * float(expected.abs().max()) + 1e-9)
    shown = named(figures(policy, rewards("dpo", policy, reference, tokens, config), tokens), prefix="train")
    names = {
        "rewards/margins": "reward_margin",
        "rewards/accuracies": "reward_accuracy",
        "logps/chosen": "chosen_logprob",
    }
    for name, figure in names.items():
        assert shown[f"train/{figure}"] == pytest.approx(trainer._metrics["train"][name][0], rel=1e-4)
    assert shown["train/rejected_logprob"] == pytest.approx(trainer._metrics["train"]["logps/rejected"][0], rel=1e-4)


def prepared(example: dict[str, Any]) -> dict[str, Any]:
    """Converts TRL's columns to this project's."""
    prompt = example["prompt_ids"]
    row = {}
    for ours, theirs in (("", "chosen_ids"), ("rejected_", "rejected_ids")):
        row[f"{ours}input_ids"] = prompt + example[theirs]
        row[f"{ours}labels"] = [-100] * len(prompt) + example[theirs]
    return row


def test_first_step_is_at_the_reference_to_the_bit(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    trackers = Collected()
    train(
        tmp_path,
        tiny_base=tiny_base,
        tokenizer=tokenizer,
        trackers=trackers,
        overrides=["train.steps=1", "train.evaluations=0"],
    )
    assert trackers.series("train/reward_margin") == [0.0]
    assert trackers.series("train/loss") == [pytest.approx(0.693147, abs=1e-6)]


@pytest.mark.parametrize("kernels", ["default", "plain"])
def test_training_prefers_the_chosen_answers(kernels: str, tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    trackers = Collected()
    trained = train(
        tmp_path, tiny_base=tiny_base, tokenizer=tokenizer, trackers=trackers, overrides=[f"kernels={kernels}"]
    )
    margins = trackers.series("train/reward_margin")
    assert margins[-1] > 1.0 > abs(margins[0])
    assert trackers.series("train/reward_accuracy")[-1] == 1.0
    assert [trackers.series(f"eval/reward_accuracy{end}")[-1] for end in ("", "_low", "_high")] == [1.0] * 3
    margin, low, high = (trackers.series(f"eval/reward_margin{end}")[-1] for end in ("", "_low", "_high"))
    assert 1.0 < low < margin < high
    assert trackers.series("eval/loss")[-1] < 0.5 < trackers.series("train/loss")[0]
    assert trained.final_loss < trained.first_loss
    assert {path.name for path in trained.adapter.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_fused_and_plain_steps_agree(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    losses = []
    for kernels in ("default", "plain"):
        trackers = Collected()
        train(
            tmp_path / kernels,
            tiny_base=tiny_base,
            tokenizer=tokenizer,
            trackers=trackers,
            overrides=[f"kernels={kernels}"],
        )
        losses.append(trackers.series("train/loss"))
    assert losses[0] == pytest.approx(losses[1], abs=0.05)  # bfloat16, two orders of rounding, eight steps


def test_a_step_is_the_same_however_its_pairs_are_laid_out(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    """Four pairs in one micro-batch or in four, packed or padded: the mean is over the pairs of the step."""
    norms = []
    for micro, packing in ((4, True), (4, False), (1, True)):
        trackers = Collected()
        overrides = ["train.steps=1", f"train.micro_batch={micro}", "train.evaluations=0", "kernels=plain"]
        folder = tmp_path / f"{micro}{packing}"
        train(folder, tiny_base=tiny_base, tokenizer=tokenizer, trackers=trackers, packing=packing, overrides=overrides)
        norms.append(trackers.series("train/grad_norm")[0])
    assert norms[1:] == [pytest.approx(norms[0], rel=0.03)] * 2  # bfloat16


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointed_activations_give_the_same_adapter_figures(
    checkpointing: str, tmp_path: Path, tiny_base: Path, tokenizer: Any
) -> None:
    losses = []
    for kind in ("none", checkpointing):
        trackers = Collected()
        overrides = ["train.steps=3", "train.evaluations=0", f"train.checkpointing={kind}"]
        train(tmp_path / kind, tiny_base=tiny_base, tokenizer=tokenizer, trackers=trackers, overrides=overrides)
        losses.append(trackers.series("train/loss"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_interrupted_and_resumed_ends_as_if_it_had_not_been(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    whole = train(tmp_path / "a", tiny_base=tiny_base, tokenizer=tokenizer, trackers=Collected())
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        train(tmp_path / "b", tiny_base=tiny_base, tokenizer=tokenizer, trackers=Collected(stop_at=3))
    resumed = train(tmp_path / "b", tiny_base=tiny_base, tokenizer=tokenizer, trackers=Collected())
    assert resumed.resumed_from > 0
    assert resumed.adapter_sha256 == whole.adapter_sha256
    assert (resumed.tokens, resumed.trained_tokens) == (whole.tokens, whole.trained_tokens)


def test_evaluations_during_training_do_not_change_it(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    runs = [
        train(
            tmp_path / count,
            tiny_base=tiny_base,
            tokenizer=tokenizer,
            trackers=Collected(),
            overrides=[f"train.evaluations={count}"],
        )
        for count in "02"
    ]
    assert runs[0].adapter_sha256 == runs[1].adapter_sha256


def test_rows_that_are_not_pairs_are_left_out_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    lonely = {**PAIR, "rejected_input_ids": [], "rejected_labels": []}
    same = {**PAIR, "rejected_input_ids": PAIR["input_ids"], "rejected_labels": PAIR["labels"]}
    rows = Dataset.from_list(
        [PAIR, lonely, {**PAIR, "rejected_input_ids": [4, 8]}, {**PAIR, "labels": [-100] * 3}, same]
    )
    pairs, tokens = training_pairs(rows)
    assert (list(pairs), tokens) == ([PAIR], 5.0)
    output = capsys.readouterr()
    assert "leaves out 4 of 5 training rows" in output.out + output.err
    assert "no rejected answer: 1" in output.out + output.err
    with pytest.raises(TrainError, match="none of the 1 training rows is a pair"):
        training_pairs(rows.select([1]))
    assert held_out_pairs([PAIR, lonely]) == [PAIR]
    assert held_out_pairs([]) == []
    with pytest.raises(TrainError, match=r"none of the first 1 held-out rows is a pair \(no rejected answer\)"):
        held_out_pairs([lonely])


@pytest.mark.parametrize(
    ("labels", "start"),
    [([-100, 3, -100, 5, 6], 3), ([-100, 5, -100], 1), ([5, 6], 1), ([-100, -100], 2), ([5], 1), ([], 0)],
)
def test_an_answer_is_the_last_trained_span(labels: list[int], start: int) -> None:
    assert answer_start(labels) == start


def test_earlier_turns_are_prompt_for_both_answers() -> None:
    row = {
        "input_ids": [1, 2, 3, 4],
        "labels": [-100, 2, -100, 4],
        "rejected_input_ids": [1, 2, 3, 9],
        "rejected_labels": [-100, 2, -100, 9],
    }
    assert obstacle(row) is None
    assert chosen(row)["labels"] == [-100, -100, -100, 4]
    assert rejected(row)["labels"] == [-100, -100, -100, 9]


def test_batch_has_all_chosen_answers_before_the_rejected_ones() -> None:
    batch = PairCollator(flat=True, pad_token_id=0)([PAIR, PAIR])
    assert batch["input_ids"][0, :10].tolist() == [5, 6, 7, 5, 6, 7, 5, 8, 5, 8]
    assert batch["labels"][0, 10:].unique().tolist() == [-100]
    assert batch["answer_tokens"].tolist() == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["data.objective=supervised"], "train.objective=dpo trains on data.objective=preference; got supervised"),
        (["train=default"], "train.objective=sft trains on data.objective=supervised; got preference"),
        (["lora.dropout=0.1"], "lora.dropout adds noise to the log-probabilities"),
        (["train.neftune_alpha=5"], "train.neftune_alpha would put other noise on the policy"),
        (["lora=loftq"], "lora.variant=loftq starts with an adapter that changes the base"),
        (["train.objective=ppo"], "train.objective must be one of sft, dpo, orpo, simpo, cpo, kto, grpo; got 'ppo'"),
        (["train.preference.beta=0"], "train.preference.beta must be positive"),
        (
            ["train.preference.loss=kto"],
            "train.preference.loss must be one of sigmoid, ipo, hinge for train.objective=dpo; got 'kto'",
        ),
        (
            ["train.preference.loss=ipo", "train.preference.label_smoothing=0.1"],
            "has an effect with loss=sigmoid only, not with loss=ipo",
        ),
        (["train.preference.label_smoothing=0.5"], "at least 0 and below 0.5"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_starts(overrides: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem.replace(".", r"\.")):
        load_config([*COMPOSED, *overrides])
