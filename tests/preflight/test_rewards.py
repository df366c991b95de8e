"""Faults of sampling, rewards and loss are planted before a training on rewards, and each check catches its own."""

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import lora
from finetune.config import load as load_config
from finetune.inference import generation, sampling
from finetune.kernels import apply_fusion
from finetune.preflight.checks import CHECKS, REWARD_CHECKS, checks_of
from finetune.preflight.stage import run_checks
from finetune.rewards import Rewards
from finetune.train import grpo_trainer, rollout
from finetune.trainable import TrainableModel, TrainingJob
from tests.fixtures.models import PLACEMENT, load, model_spec, quantization_config
from tests.fixtures.preflight import KERNELS, Scene, late_trainer
from tests.fixtures.prompts import GRPO, SETTINGS, prompts_of

Patch = pytest.MonkeyPatch
PLAIN = dataclasses.replace(PLACEMENT, dtype="float32")
ENDS = list(range(2, 130))
"""A random model ends an answer once in 500 tokens; with these, once in four."""


@pytest.fixture
def rewarded(tmp_path: Path, tiny_base: Path, tokenizer: Any, monkeypatch: Patch) -> Scene:
    """A training on rewards, in float32, that every check passes."""
    torch.set_num_threads(1)
    monkeypatch.setattr(grpo_trainer, "answer_ends", lambda job: ENDS)
    settings = [*GRPO, *SETTINGS, "train.grpo.max_new_tokens=8", "train.micro_batch=4", "preflight=quick"]
    data = prompts_of(tmp_path, tokenizer, composed=settings)
    config = load_config([*settings, "model=custom", f"model.name={tiny_base}", "lora.rank=4"])
    base = load(tiny_base, "nf4", double=True, dtype="float32")
    model = lora.attach(base, config.lora, upcast="none", checkpointing=False, seed=1)
    trainable = TrainableModel(
        model=model,
        tokenizer=tokenizer,
        spec=model_spec(tiny_base, quantization_config("nf4", double=True), placement=PLAIN),
        lora=config.lora,
        fusion=apply_fusion(model, KERNELS, placement=PLAIN, checkpointing="none"),
    )
    job = TrainingJob(config=config.train, optim=config.optim, trainable=trainable, data=data, seed=1)
    return Scene(run=tmp_path, job=job, make_trainer=late_trainer)


def with_trainer(scene: Scene, change: Callable[[Any], object]) -> None:
    """Changes the trainer that the scene makes."""
    make = scene.make_trainer

    def changed(*arguments: Any, **inputs: Any) -> Any:
        trainer = make(*arguments, **inputs)
        change(trainer)
        return trainer

    scene.make_trainer = changed


def with_grpo(scene: Scene, **changes: Any) -> None:
    grpo = dataclasses.replace(scene.job.config.grpo, **changes)
    scene.job = dataclasses.replace(scene.job, config=dataclasses.replace(scene.job.config, grpo=grpo))


def while_sampling(monkeypatch: Patch, context: Callable[[Any], Any]) -> None:
    original = sampling.evaluating

    @contextmanager
    def changed(model: Any) -> Iterator[None]:
        with original(model), context(model):
            yield

    monkeypatch.setattr(sampling, "evaluating", changed)


def dropout_in_training_and_sampling(scene: Scene, monkeypatch: Patch) -> None:
    for module in scene.model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    scene.trainable.fusion.enabled = False
    monkeypatch.setattr(sampling, "evaluating", lambda model: torch.no_grad())


def trainer_without_the_temperature(scene: Scene, _: Patch) -> None:
    with_grpo(scene, temperature=0.5)
    with_trainer(scene, lambda trainer: setattr(trainer, "temperature", 1.0))


def sampler_with_a_penalty(scene: Scene, monkeypatch: Patch) -> None:
    choose = sampling.SeededChoice.__call__

    def penalized(self: Any, input_ids: Any, scores: Any) -> Any:
        return choose(self, input_ids, scores.scatter(-1, input_ids, scores.gather(-1, input_ids) - 2))

    monkeypatch.setattr(sampling.SeededChoice, "__call__", penalized)


def padding_is_attended(scene: Scene, monkeypatch: Patch) -> None:
    zeros = torch.zeros
    monkeypatch.setattr(generation.torch, "zeros", lambda *size, **kind: zeros(*size, **kind) + 1)


def sampler_without_the_adapter(scene: Scene, monkeypatch: Patch) -> None:
    while_sampling(monkeypatch, lambda model: model.disable_adapter())


def adapter_counts_twice_in_sampling(scene: Scene, monkeypatch: Patch) -> None:
    @contextmanager
    def doubled(model: Any) -> Iterator[None]:
        matrices = [p for name, p in model.named_parameters() if "lora_B" in name]
        for p in matrices:
            p.data.mul_(2)
        yield
        for p in matrices:
            p.data.div_(2)

    while_sampling(monkeypatch, doubled)


def random_reward(scene: Scene, monkeypatch: Patch) -> None:
    with_reward(monkeypatch, lambda answer, row: random.random())


def constant_reward(scene: Scene, monkeypatch: Patch) -> None:
    with_reward(monkeypatch, lambda answer, row: 0.5)


def reward_that_raises(scene: Scene, monkeypatch: Patch) -> None:
    with_reward(monkeypatch, lambda answer, row: row["solution"])


def reward_that_is_not_finite(scene: Scene, monkeypatch: Patch) -> None:
    with_reward(monkeypatch, lambda answer, row: float("nan"))


def with_reward(monkeypatch: Patch, reward: Any) -> None:
    monkeypatch.setattr(Rewards, "_function", lambda self, name: reward)


def end_is_never_sampled(scene: Scene, monkeypatch: Patch) -> None:
    monkeypatch.setattr(grpo_trainer, "answer_ends", lambda job: [511])


def limit_of_one_token(scene: Scene, monkeypatch: Patch) -> None:
    with_grpo(scene, max_new_tokens=1, rewards={"format": 1.0}, target_tokens=None)
    monkeypatch.setattr(grpo_trainer, "answer_ends", lambda job: [2])


def adapter_is_off_zero(scene: Scene, _: Patch) -> None:
    for name, parameter in scene.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)


def seeds_from_the_global_state(scene: Scene, monkeypatch: Patch) -> None:
    def drawn(rows: Any, *, seed: int, step: int) -> list[int]:
        return [int(torch.randint(2**31, ())) for _ in rows]

    monkeypatch.setattr(rollout, "answer_seeds", drawn)


def one_seed_for_a_group(scene: Scene, monkeypatch: Patch) -> None:
    monkeypatch.setattr(rollout, "answer_seeds", lambda rows, *, seed, step: [row["row"] for row in rows])


def loss_with_the_wrong_sign(scene: Scene, monkeypatch: Patch) -> None:
    right = grpo_trainer.policy_losses
    monkeypatch.setattr(grpo_trainer, "policy_losses", lambda *a, **k: -right(*a, **k))


def loss_of_the_prompt(scene: Scene, monkeypatch: Patch) -> None:
    """The log-probabilities are right, and their gradient does not reach the adapter."""
    right = grpo_trainer.policy_losses
    monkeypatch.setattr(grpo_trainer, "policy_losses", lambda p, *a, **k: right(p.detach().requires_grad_(), *a, **k))


def loss_divided_by_the_micro_batch(scene: Scene, monkeypatch: Patch) -> None:
    def divided(trainer: Any) -> None:
        right = trainer.compute_loss

        def compute_loss(model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            return right(model, inputs, num_items_in_batch=len(inputs["answer_tokens"]))

        trainer.compute_loss = compute_loss

    with_trainer(scene, divided)


def prompts_are_cut(scene: Scene, _: Patch) -> None:
    rows = {**scene.job.data.rows, "truncated": scene.job.data.rows["in"] // 2}
    scene.job = dataclasses.replace(scene.job, data=dataclasses.replace(scene.job.data, rows=rows))


def prompts_are_dropped(scene: Scene, _: Patch) -> None:
    rows = {**scene.job.data.rows, "dropped": {"longer than max_tokens": scene.job.data.rows["in"] // 2}}
    scene.job = dataclasses.replace(scene.job, data=dataclasses.replace(scene.job.data, rows=rows))


@dataclass(frozen=True)
class Fault:
    plant: Callable[[Scene, Patch], None]
    caught_by: str
    said: str = ""


FAULTS = [
    Fault(dropout_in_training_and_sampling, "sampler_gap"),
    Fault(trainer_without_the_temperature, "sampler_gap"),
    Fault(sampler_with_a_penalty, "sampler_gap"),
    Fault(padding_is_attended, "sampler_gap"),
    Fault(sampler_without_the_adapter, "sampler_gap"),
    Fault(adapter_counts_twice_in_sampling, "sampler_gap"),
    Fault(random_reward, "reward_repeats"),
    Fault(constant_reward, "reward_variance", said="rewards are 0.5"),
    Fault(reward_that_raises, "reward_errors", said="KeyError: 'solution'"),
    Fault(reward_that_is_not_finite, "reward_errors"),
    Fault(end_is_never_sampled, "cut"),
    Fault(limit_of_one_token, "cut"),
    Fault(adapter_is_off_zero, "divergence"),
    Fault(seeds_from_the_global_state, "sampling"),
    Fault(one_seed_for_a_group, "sampling"),
    Fault(loss_with_the_wrong_sign, "gain"),
    Fault(loss_of_the_prompt, "gain"),
    Fault(loss_divided_by_the_micro_batch, "division"),
    Fault(prompts_are_cut, "prompts"),
    Fault(prompts_are_dropped, "prompts"),
]


def test_a_sound_training_on_rewards_passes_and_is_left_as_it_was(rewarded: Scene) -> None:
    before = {name: p.detach().clone() for name, p in rewarded.model.named_parameters() if p.requires_grad}
    records, skipped = run_checks(rewarded.context(), REWARD_CHECKS)
    assert not skipped
    assert [(record.name, record.figure) for record in records if not record.passed] == []
    after = dict(rewarded.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.plant.__name__)
def test_a_planted_fault_is_caught(fault: Fault, rewarded: Scene, monkeypatch: Patch) -> None:
    fault.plant(rewarded, monkeypatch)
    records, skipped = run_checks(
        rewarded.context(), [check for check in REWARD_CHECKS if check.name == fault.caught_by]
    )
    assert not skipped
    assert [(record.name, record.passed) for record in records] == [(fault.caught_by, False)], records
    assert fault.said in records[0].figure
    assert "Error" not in records[0].figure or fault.caught_by == "reward_errors", records[0].figure


def test_every_check_of_rewards_catches_a_fault() -> None:
    assert {fault.caught_by for fault in FAULTS} == {check.name for check in REWARD_CHECKS}
    assert {check.name for check in checks_of("grpo")} >= {check.name for check in REWARD_CHECKS}
    assert checks_of("dpo") == CHECKS
    of_given_answers = {"trained_text", "accumulation", "learning", "ending", "reload"}
    assert not {check.name for check in checks_of("grpo")} & of_given_answers
