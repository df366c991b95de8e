"""Warmup in three forms, four schedules, and two groups that learn at their own rates under every optimizer."""

import types
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import lora
from finetune.errors import TrainError
from finetune.optim import (
    OPTIMIZERS,
    SCHEDULES,
    OptimConfig,
    make_optimizer,
    parameter_groups,
    schedule_arguments,
    start_above_zero,
    state_bytes,
    warmup_steps,
)
from tests.fixtures.models import load


def config(**changes: Any) -> OptimConfig:
    settings = {
        "name": "adamw_torch",
        "learning_rate": 0.01,
        "schedule": "constant",
        "warmup": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "beta1": 0.9,
        "beta2": 0.999,
        **changes,
    }
    return OptimConfig(**settings)


def adapt(base: Path, variant: str = "lora") -> Any:
    settings = lora.LoraConfig(variant=variant, rank=4, alpha=8.0, dropout=0.0, targets=["all-linear"], dtype="float32")
    return lora.attach(load(base, "nf4", double=True), settings, upcast="none", checkpointing=False, seed=1)


def arguments(folder: Path, optim: OptimConfig, **changes: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        optim=optim.name,
        learning_rate=optim.learning_rate,
        weight_decay=optim.weight_decay,
        use_cpu=True,
        report_to="none",
        **changes,
    )


def step(model: Any, optimizer: Any, *, steps: int = 1) -> None:
    model.train()
    for seed in range(steps):
        ids = torch.randint(3, 500, (2, 16), generator=torch.Generator().manual_seed(seed))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"warmup": 0.03}, 3),
        ({"warmup": 0.0}, 0),
        ({"warmup": None, "warmup_steps": 7}, 7),
        ({"warmup": None, "warmup_steps": 0}, 0),
        ({"warmup": 0.999}, 99),
        ({"warmup": None, "warmup_tokens": 1000}, 4),
        ({"warmup": None, "warmup_tokens": 768}, 3),
    ],
)
def test_warmup_is_steps_whichever_form_says_it(changes: dict[str, Any], expected: int) -> None:
    assert warmup_steps(config(**changes), steps=100, tokens_per_step=256) == expected


@pytest.mark.parametrize("form", [{"warmup_steps": 100}, {"warmup_tokens": 25_600}])
def test_run_that_is_all_warmup_is_refused(form: dict[str, int]) -> None:
    with pytest.raises(TrainError, match=r"are 100 steps, and the run has 100: .* never reach optim.learning_rate"):
        warmup_steps(config(warmup=None, **form), steps=100, tokens_per_step=256)


@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 3, 40])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_has_a_rate_above_zero_and_some_have_the_peak(schedule: str, steps: int, warmup: float) -> None:
    found = rates(schedule, steps=steps, warmup=warmup)[:steps]
    assert min(found) > 0
    assert max(found) == 1.0


def rates(schedule: str, *, steps: int, **changes: Any) -> list[float]:
    from transformers import get_scheduler

    told = schedule_arguments(config(schedule=schedule, **changes), steps=steps, tokens_per_step=100)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        told["lr_scheduler_type"],
        optimizer,
        num_warmup_steps=told["warmup_steps"],
        num_training_steps=steps,
        scheduler_specific_kwargs=told.get("lr_scheduler_kwargs"),
    )
    start_above_zero(scheduler, rising=told["warmup_steps"])
    found = []
    for _ in range(steps + 1):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_wsd_rises_stays_and_falls_to_zero() -> None:
    found = rates("wsd", steps=20, warmup=0.1, decay=0.25)
    assert found[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert found[2:16] == [1.0] * 14
    assert found[16:] == pytest.approx([1 - (share / 5) ** 0.5 for share in range(1, 6)])


def test_wsd_on_few_steps_leaves_the_decay_what_warmup_does_not_take() -> None:
    told = schedule_arguments(
        config(schedule="wsd", warmup=None, warmup_steps=9, decay=0.5), steps=10, tokens_per_step=1
    )
    assert told["warmup_steps"] == 9
    assert told["lr_scheduler_kwargs"] == {"num_decay_steps": 1, "decay_type": "1-sqrt"}


@pytest.mark.parametrize(
    ("schedule", "half", "end"), [("constant", 1.0, 1.0), ("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("wsd", 1.0, 0.0)]
)
def test_schedule_is_where_its_name_says_at_half_and_end(schedule: str, half: float, end: float) -> None:
    found = rates(schedule, steps=20)
    assert (found[10], found[20]) == (pytest.approx(half, abs=1e-9), pytest.approx(end, abs=1e-9))


def test_every_schedule_is_one_that_a_trainer_takes(tmp_path: Path) -> None:
    for schedule in SCHEDULES:
        told = schedule_arguments(config(schedule=schedule, warmup=0.1), steps=10, tokens_per_step=1)
        assert arguments(tmp_path, config(), max_steps=10, **told).get_warmup_steps(10) == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore")
def test_b_learns_faster_under_every_optimizer(tiny_base: Path, tmp_path: Path, name: str) -> None:
    optim = config(name=name, lora_plus_ratio=8.0)
    model = adapt(tiny_base)
    optimizer = make_optimizer(model, optim, arguments(tmp_path, optim))
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.08]
    before = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    step(model, optimizer, steps=2)
    moved = {key: (p - before[key]).abs().max().item() for key, p in model.named_parameters() if p.requires_grad}
    a, b = (max(size for key, size in moved.items() if part in key) for part in ("lora_A", "lora_B"))
    assert 0 < a < 0.03
    assert b > 0.1
    assert state_bytes(optimizer) > 0


def test_the_rate_that_a_trainer_logs_is_that_of_a(tiny_base: Path) -> None:
    groups = parameter_groups(adapt(tiny_base), config(lora_plus_ratio=16.0))
    assert groups[0]["lr"] == 0.01
    assert groups[1]["lr"] == 0.16


def test_every_trained_parameter_is_in_one_group(tiny_base: Path) -> None:
    model = adapt(tiny_base, "dora")
    for ratio in (None, 4.0):
        grouped = [id(p) for group in parameter_groups(model, config(lora_plus_ratio=ratio)) for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_without_a_ratio_the_order_is_the_models(tiny_base: Path) -> None:
    """A checkpoint's optimizer state is read back by position."""
    model = adapt(tiny_base)
    (group,) = parameter_groups(model, config())
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters() if p.requires_grad]


def test_lengths_of_dora_do_not_decay(tiny_base: Path) -> None:
    model = adapt(tiny_base, "dora")
    names = {id(p): name for name, p in model.named_parameters()}
    decays = {
        names[id(p)]: group["weight_decay"]
        for group in parameter_groups(model, config(weight_decay=0.1))
        for p in group["params"]
    }
    assert {decay for name, decay in decays.items() if "magnitude" in name} == {0.0}
    assert {decay for name, decay in decays.items() if "magnitude" not in name} == {0.1}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore")
def test_no_optimizer_moves_the_start_that_pissa_takes_off(tiny_base: Path, tmp_path: Path, name: str) -> None:
    model = adapt(tiny_base, "pissa")
    starts = {
        key: (p[4:] if "lora_A" in key else p[:, 4:]).detach().clone()
        for key, p in model.named_parameters()
        if p.requires_grad
    }
    optimizer = make_optimizer(model, config(name=name), arguments(tmp_path, config(name=name)))
    step(model, optimizer, steps=4)
    for key, p in model.named_parameters():
        if p.requires_grad:
            kept, moved = (p[4:], p[:4]) if "lora_A" in key else (p[:, 4:], p[:, :4])
            assert torch.equal(kept, starts[key]), key
            assert not torch.equal(moved, starts[key] if "lora_A" in key else -starts[key]), key


def test_trainer_takes_our_groups_through_create_optimizer(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import Trainer

    optim = config(name="adamw_8bit", lora_plus_ratio=4.0, schedule="wsd", warmup=0.25)

    class Ours(Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            if self.optimizer is None:
                self.optimizer = make_optimizer(self.model if model is None else model, optim, self.args)
            return self.optimizer

    rows = [{"input_ids": list(range(3, 19)), "labels": list(range(3, 19))}] * 8
    told = schedule_arguments(optim, steps=4, tokens_per_step=16)
    settings = arguments(
        tmp_path,
        optim,
        max_steps=4,
        per_device_train_batch_size=1,
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
        **told,
    )
    trainer = Ours(model=adapt(tiny_base), args=settings, train_dataset=rows)
    trainer.train()
    logged = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert logged == pytest.approx([0.0, 0.01, 0.01, 0.01])
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [0.01, 0.04]
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([0.0, 0.0])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"warmup_steps": 3}, "give exactly one; got warmup=0.0 and warmup_steps=3: set optim.warmup=null"),
        ({"warmup": None}, "give exactly one; got none: set optim.warmup=0"),
        ({"warmup": 1.0}, "optim.warmup is a share of the steps, at least 0 and below 1; got 1.0"),
        ({"warmup": None, "warmup_tokens": -1}, "optim.warmup_tokens must be 0 or more; got -1"),
        ({"schedule": "wsd", "warmup": 0.5, "decay": 0.6}, "together at most 1; got 0.5 and 0.6"),
        ({"decay": 0.0}, "optim.decay is a share of the steps, above 0 and at most 1; got 0.0"),
        ({"schedule": "step"}, "optim.schedule must be one of constant, linear, cosine, wsd; got 'step'"),
        ({"lora_plus_ratio": 0.0}, "optim.lora_plus_ratio must be positive (16 is usual), or null for none; got 0.0"),
        ({"weight_decay": -0.1}, "optim.weight_decay must not be negative"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], problem: str) -> None:
    found = list(config(**changes).problems())
    assert len(found) == 1
    assert problem in found[0]


def test_states_are_counted_through_a_wrapper() -> None:
    weight = torch.nn.Parameter(torch.ones(8))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    assert state_bytes(types.SimpleNamespace(optimizer=optimizer)) == 32
