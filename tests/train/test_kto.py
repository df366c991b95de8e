"""KTO and APO-zero on a tiny NF4 model: TRL's loss, gradient and z0; a step that no layout changes; an exact resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from finetune.config import load as load_config
from finetune.errors import ConfigError, DataError, Interrupted
from finetune.inference.collate import Collator
from finetune.train.kto import answer_losses, choose_mismatched, figures, log_weights, mismatched, named, sums
from finetune.train.preference import token_losses
from finetune.train.preference_config import PreferenceConfig
from tests.fixtures.pairs import KTO, pairs_of
from tests.fixtures.preference_training import Collected, train
from tests.fixtures.trl_oracle import COMMON, PLAIN, compared, lora_config, moved_adapter, nf4_in_float32

ROWS = [
    {"prompt": "Wake me at seven.", "completion": '{"time":7}', "label": True},
    {"prompt": "Wake me at eight.", "completion": "no table for two people", "label": False},
    {"prompt": "Book a table.", "completion": "for two people tomorrow", "label": True},
    {"prompt": "What is the capital of France?", "completion": "Paris", "label": False},
]


def document(prompt: list[int], answer: list[int]) -> dict[str, Any]:
    ids = prompt + answer
    return {"input_ids": ids, "labels": [-100] * len(prompt) + answer, "seq_lengths": [len(ids)]}


def log_probabilities(model: Any, rows: list[dict[str, Any]], *, flat: bool) -> tuple[Any, Any]:
    inputs = Collator(flat=flat, pad_token_id=0)(rows)
    inputs.pop("padding")
    tokens = torch.tensor([sum(label != -100 for label in row["labels"]) for row in rows])
    return sums(token_losses(model, None, inputs, PLAIN), tokens), tokens


@pytest.mark.parametrize("loss", ["kto", "apo_zero"])
def test_loss_gradient_and_reference_point_are_those_of_trl(
    loss: str, tiny_base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    from trl import KTOConfig, KTOTrainer

    config = PreferenceConfig(beta=0.3, loss=loss, desirable_weight=1.2, undesirable_weight=0.8)
    assert not list(config.problems("kto"))
    trainer: Any = KTOTrainer(
        model=nf4_in_float32(tiny_base),
        args=KTOConfig(
            output_dir=str(tmp_path),
            beta=config.beta,
            loss_type="kto" if loss == "kto" else "apo_zero_unpaired",
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
            max_length=None,
            per_device_train_batch_size=4,
            train_sampling_strategy="sequential",
            **COMMON,
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        peft_config=lora_config(),
    )
    model, examples = trainer.model.train(), list(trainer.train_dataset)
    rows = [document(example["prompt_ids"], example["completion_ids"]) for example in examples]
    wrong = [mismatched(row, rows[number - 1]) for number, row in enumerate(rows)]
    desirable = torch.tensor([example["label"] for example in examples])
    for seed in range(60):  # until TRL's own z0 is well above 0, where a wrong sign or pairing would show
        adapter = moved_adapter(model, seed=seed, scale=0.15)
        theirs = trainer.compute_loss(model, trainer.data_collator(examples))
        their_point = trainer._metrics["train"]["kl"][-1]
        if loss == "apo_zero" or their_point > 0.2:
            break
    assert their_point > 0.2 or loss == "apo_zero"
    their_gradients = torch.autograd.grad(theirs, adapter)
    for flat in (False, True):
        with torch.no_grad():
            of_wrong, _ = log_probabilities(model, wrong, flat=flat)
            with model.disable_adapter():
                reference, _ = log_probabilities(model, rows, flat=flat)
                reference_of_wrong, _ = log_probabilities(model, wrong, flat=flat)
        point = float((of_wrong - reference_of_wrong).mean().clamp(min=0)) if loss == "kto" else 0.0
        policy, tokens = log_probabilities(model, rows, flat=flat)
        ours = answer_losses(policy - reference, desirable, point, config).mean()
        assert point == pytest.approx(their_point, rel=1e-4, abs=1e-6)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
        gradients = torch.autograd.grad(ours, adapter)
        assert compared(f"{loss} flat={flat}", theirs, ours, their_gradients, gradients) < 1e-5
    shown = named(figures(policy, policy - reference, desirable, tokens, point=point, beta=0.3), prefix="train")
    rewards = config.beta * (policy - reference).detach()
    assert shown["train/desirable_reward"] == pytest.approx(float(rewards[desirable].mean()), rel=1e-5)
    assert shown["train/undesirable_reward"] == pytest.approx(float(rewards[~desirable].mean()), rel=1e-5)
    assert shown["train/kl"] == pytest.approx(point)


def test_training_separates_desirable_from_undesirable_answers(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    trackers = Collected()
    train(
        tmp_path,
        tiny_base=tiny_base,
        tokenizer=tokenizer,
        trackers=trackers,
        composed=KTO,
        overrides=["train.steps=12"],
    )
    first, *_, last = [line for _, line in trackers.lines if "train/loss" in line]
    assert first["train/loss"] == pytest.approx(0.5, abs=1e-6)  # the policy is the reference
    assert first["train/kl"] == 0.0
    margin, low, high = (trackers.series(f"eval/reward_margin{end}")[-1] for end in ("", "_low", "_high"))
    assert 0.1 < low < margin < high
    accuracy, low, high = (trackers.series(f"eval/reward_accuracy{end}")[-1] for end in ("", "_low", "_high"))
    assert 0 <= low <= accuracy <= high <= 1
    assert {"eval/desirable_reward", "eval/kl", "eval/chosen_logprob_per_token"} <= set(
        next(line for _, line in reversed(trackers.lines) if "eval/loss" in line)
    )
    assert last["train/loss"] < first["train/loss"]


def test_a_step_is_the_same_however_its_answers_are_laid_out(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    """z0 is that of the whole step. Desirable answers weigh most here, so that it is above 0 after the first step."""
    found = []
    for micro, packing in ((4, True), (4, False), (1, True)):
        trackers = Collected()
        overrides = ["train.steps=2", f"train.micro_batch={micro}", "train.evaluations=0", "kernels=plain"]
        train(
            tmp_path / f"{micro}{packing}",
            tiny_base=tiny_base,
            tokenizer=tokenizer,
            trackers=trackers,
            packing=packing,
            overrides=[*overrides, "train.preference.undesirable_weight=0.05"],
            composed=KTO,
        )
        found.append([*trackers.series("train/grad_norm"), trackers.series("train/kl")[-1]])
    assert found[0][-1] > 0
    assert found[1:] == [pytest.approx(found[0], rel=0.05, abs=0.01)] * 2  # bfloat16


def test_interrupted_and_resumed_ends_as_if_it_had_not_been(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    whole = train(tmp_path / "a", tiny_base=tiny_base, tokenizer=tokenizer, trackers=Collected(), composed=KTO)
    with pytest.raises(Interrupted):
        train(tmp_path / "b", tiny_base=tiny_base, tokenizer=tokenizer, trackers=Collected(stop_at=3), composed=KTO)
    resumed = train(tmp_path / "b", tiny_base=tiny_base, tokenizer=tokenizer, trackers=Collected(), composed=KTO)
    assert resumed.resumed_from > 0
    assert resumed.adapter_sha256 == whole.adapter_sha256


def test_pairs_are_taken_apart_and_held_out_references_stay_good(tmp_path: Path, tokenizer: Any) -> None:
    from datasets import load_from_disk

    data = pairs_of(tmp_path, tokenizer, composed=KTO)
    rows = load_from_disk(str(data.folder / "train"))
    assert (data.packed_rows, data.train_rows, data.heldout_rows) == (48, 24, 8)
    assert rows["desirable"].count(1) == rows["desirable"].count(0) == 24
    held = {name: load_from_disk(str(data.folder / name)) for name in ("heldout", "heldout_undesirable")}
    assert set(held["heldout"]["desirable"]) == {1}
    assert set(held["heldout_undesirable"]["desirable"]) == {0}
    assert all('{"time"' in reference for reference in held["heldout"]["reference"])


def test_mismatched_answer_is_another_prompts_and_fits_the_longest_row() -> None:
    rows = [document([1, 2], [9]), document([1, 2], [8]), document([3], [7, 7, 7]), document([4, 4, 4], [6])]
    assert choose_mismatched(rows) == [3, 3, 1, 1]
    assert mismatched(rows[0], rows[3])["input_ids"] == [1, 2, 6]
    assert choose_mismatched(rows[:2]) == [-1, -1]


def test_answers_of_one_kind_are_refused_before_a_model_is_loaded(tmp_path: Path, tokenizer: Any) -> None:
    import json

    from finetune.data import prepare

    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({**row, "label": True}) for row in ROWS))
    files = [f"data.path={tmp_path}/rows.jsonl", "data.heldout_path=null", "data.format=unpaired"]
    with pytest.raises(DataError, match=r"all 4 training answers are desirable.*train=default"):
        prepare(load_config([*KTO, *files]).data, folder=tmp_path / "data", tokenizer=tokenizer, seed=1)


def test_pair_objectives_on_single_answers_name_kto(tmp_path: Path, tokenizer: Any) -> None:
    import json

    from finetune.data import prepare

    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    dpo = ["+experiment=quickstart", "train=dpo", "data.objective=preference", "data.format=auto"]
    files = [f"data.path={tmp_path}/rows.jsonl", "data.heldout_path=null"]
    with pytest.raises(DataError, match=r"single answers with a label are for data\.objective=unpaired train=kto"):
        prepare(load_config([*dpo, *files]).data, folder=tmp_path / "data", tokenizer=tokenizer, seed=1)


def test_weights_are_compared_with_the_authors_advice(capsys: pytest.CaptureFixture[str]) -> None:
    log_weights([1, 0, 0, 0], PreferenceConfig(loss="kto"))
    output = "".join(capsys.readouterr())
    assert "0.33 (advised: 1 to 1.33)" in output
    assert "train.preference.desirable_weight=3 makes it 1" in output


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["launch=fsdp", "launch.processes=2"], "launch.strategy=fsdp shards the weights, and train.objective=kto"),
        (["data.objective=preference"], 'for {"prompt", "chosen", "rejected"}, data=preference choose train=dpo'),
        (["train.preference.loss=sigmoid"], "loss must be one of kto, apo_zero for train.objective=kto"),
        (["train.preference.desirable_weight=0"], "desirable_weight must be positive"),
        (["lora.dropout=0.1"], "train.objective=kto compares with those of the reference"),
        (["data.too_long=split"], "would cut the answers that data.objective=unpaired compares"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([*KTO, *overrides])
    assert problem in str(caught.value)
