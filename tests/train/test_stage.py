"""Training on a tiny model: the loss falls, a repetition is identical, and resuming changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import Interrupted, TrainError
from finetune.train.stage import mean_of_last_tenth, read_curve, rewind
from tests.fixtures.trainings import Collected, Stopping, train


def test_training_lowers_the_loss_and_writes_a_plain_peft_adapter(
    tmp_path: Path, tiny_base: Path, tokenizer: Any
) -> None:
    trackers = Collected()
    trained = train(tmp_path, tiny_base=tiny_base, tokenizer=tokenizer, trackers=trackers)
    assert trained.steps == 12
    assert trained.final_loss < trained.first_loss - 0.3
    assert sorted(path.name for path in trained.adapter.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert trained.optimizer["asked"] == "paged_adamw_8bit"
    assert trained.optimizer["state_bytes"] > 0
    assert {name for _, line in trackers.lines for name in line} >= {
        "train/loss",
        "eval/loss",
        "train/learning_rate",
        "train/grad_norm",
    }


def test_intervals_say_when_to_save_and_to_evaluate(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    trackers = Collected()
    train(
        tmp_path,
        tiny_base=tiny_base,
        tokenizer=tokenizer,
        trackers=trackers,
        steps=6,
        evaluations=0,
        eval_steps=2,
        save_steps=4,
    )
    assert [step for step, line in trackers.lines if "eval/loss" in line] == [2, 4, 6]
    saved = {folder.name for folder in (tmp_path / "train" / "checkpoints").iterdir()}
    assert "checkpoint-4" in saved
    assert not saved & {"checkpoint-2", "checkpoint-3"}


def test_adapter_is_saved_in_the_dtype_of_lora_dtype(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    from safetensors.torch import load_file

    trained = train(tmp_path, tiny_base=tiny_base, tokenizer=tokenizer, steps=2)
    assert {str(tensor.dtype) for tensor in load_file(trained.adapter / "adapter_model.safetensors").values()} == {
        "torch.float32"
    }


def test_plain_layers_compute_their_adapter_in_16_bit_with_the_fused_loss_too(
    tmp_path: Path, tiny_base: Path, tokenizer: Any
) -> None:
    """In float32, each branch would store a float32 copy of its input, which is twice of what the plan counts."""
    dtypes = set()

    def listen(adapted: Any) -> None:
        for name, module in adapted.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_hook(
                    lambda lora, _, out: dtypes.add(str(out.dtype)) if torch.is_grad_enabled() else None
                )

    train(tmp_path, tiny_base=tiny_base, tokenizer=tokenizer, steps=2, evaluations=0, layers="plain", touch=listen)
    assert dtypes == {"torch.bfloat16"}


def test_same_seed_gives_the_same_losses_and_the_same_file(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    first, second = (train(tmp_path / name, tiny_base=tiny_base, tokenizer=tokenizer) for name in "ab")
    assert [line.get("train/loss") for line in first.curve] == [line.get("train/loss") for line in second.curve]
    assert first.adapter_sha256 == second.adapter_sha256


def test_evaluations_during_training_do_not_change_it(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    with_evaluations = train(tmp_path / "a", tiny_base=tiny_base, tokenizer=tokenizer)
    without = train(tmp_path / "b", tiny_base=tiny_base, tokenizer=tokenizer, evaluations=0)
    assert with_evaluations.adapter_sha256 == without.adapter_sha256


def test_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    whole = train(tmp_path / "a", tiny_base=tiny_base, tokenizer=tokenizer)
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 6, which is saved"):
        train(tmp_path / "b", tiny_base=tiny_base, tokenizer=tokenizer, trackers=Stopping(5))
    resumed = train(tmp_path / "b", tiny_base=tiny_base, tokenizer=tokenizer)
    assert resumed.resumed_from == 6
    assert resumed.adapter_sha256 == whole.adapter_sha256
    assert (resumed.tokens, resumed.trained_tokens) == (whole.tokens, whole.trained_tokens)


def test_final_loss_is_a_mean_of_the_end() -> None:
    assert mean_of_last_tenth([9.0] * 18 + [1.0, 2.0]) == 1.5
    assert mean_of_last_tenth([4.0]) == 4.0


def test_metrics_file_holds_one_json_object_a_line(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    trained = train(tmp_path, tiny_base=tiny_base, tokenizer=tokenizer, steps=3)
    lines = [json.loads(line) for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3]


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 25, "tokens_per_step": 400},
        {"steps": 25, "tokens_per_step": 400, "neftune_alpha": 5.0},
        {"group_by_length": True, "micro_batch": 2},
        {"dropout": 0.0},
    ],
    ids=["dropout and several epochs", "noise on the embeddings", "rows grouped by length", "fused layers"],
)
def test_random_state_of_a_resumed_run_is_that_of_an_uninterrupted_one(
    tmp_path: Path, tiny_base: Path, tokenizer: Any, changes: dict[str, Any]
) -> None:
    whole = train(tmp_path / "a", tiny_base=tiny_base, tokenizer=tokenizer, **changes)
    with pytest.raises(Interrupted):
        train(tmp_path / "b", tiny_base=tiny_base, tokenizer=tokenizer, trackers=Stopping(8), **changes)
    resumed = train(tmp_path / "b", tiny_base=tiny_base, tokenizer=tokenizer, **changes)
    assert resumed.resumed_from == 9
    assert resumed.adapter_sha256 == whole.adapter_sha256


def test_run_killed_after_its_last_step_trains_no_further(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    whole = train(tmp_path, tiny_base=tiny_base, tokenizer=tokenizer)
    (tmp_path / "train" / "adapter" / "adapter_model.safetensors").unlink()
    again = train(tmp_path, tiny_base=tiny_base, tokenizer=tokenizer)
    assert (again.steps, again.resumed_from) == (12, 12)
    assert again.adapter_sha256 == whole.adapter_sha256
    assert again.optimizer == whole.optimizer


def test_damaged_checkpoint_is_logged_and_the_one_before_it_is_used(
    tmp_path: Path, tiny_base: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(tmp_path, tiny_base=tiny_base, tokenizer=tokenizer)
    file = tmp_path / "train" / "checkpoints" / "checkpoint-12" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again = train(tmp_path, tiny_base=tiny_base, tokenizer=tokenizer)
    logged = " ".join(capsys.readouterr().out.split())
    assert "checkpoint-12 is damaged: optimizer.pt should have sha256" in logged
    assert "it is deleted and checkpoint-8 is tried" in logged
    assert again.resumed_from == 8
    assert again.adapter_sha256 == whole.adapter_sha256


def test_run_continues_only_with_what_it_began_with(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    train(tmp_path, tiny_base=tiny_base, tokenizer=tokenizer, steps=2)
    with pytest.raises(TrainError) as refusal:
        train(tmp_path, tiny_base=tiny_base, tokenizer=tokenizer, steps=3, rank=4, fingerprint="other rows")
    assert "data.fingerprint was '' and is 'other rows'; lora.rank was 8 and is 4; train.steps was 2 and is 3" in str(
        refusal.value
    )


def test_settings_that_change_no_step_may_change_on_resuming(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    whole = train(tmp_path / "a", tiny_base=tiny_base, tokenizer=tokenizer)
    with pytest.raises(Interrupted):
        train(tmp_path / "b", tiny_base=tiny_base, tokenizer=tokenizer, trackers=Stopping(5))
    changes = {"checkpointing": "full", "evaluations": 0, "checkpoints": 0, "log_steps": 2}
    assert (
        train(tmp_path / "b", tiny_base=tiny_base, tokenizer=tokenizer, **changes).adapter_sha256
        == whole.adapter_sha256
    )


def test_metrics_after_the_checkpoint_and_a_partial_line_are_removed(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "train/loss": 3.0}\n{"step": 2, "train/loss": 2.0}\n{"step": 3, "train/lo')
    rewind(file, step=1)
    assert read_curve(file) == [{"step": 1, "train/loss": 3.0}]


def test_offloading_without_a_gpu_is_refused(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    with pytest.raises(TrainError, match="this runs on a CPU"):
        train(tmp_path, tiny_base=tiny_base, tokenizer=tokenizer, checkpointing="offloaded")
