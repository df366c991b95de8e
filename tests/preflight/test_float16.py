"""Checks in float16: the loss is scaled, and a step that overflows while the scale is searched for is not counted."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune import lora
from finetune.kernels import apply_fusion
from finetune.preflight import context as context_module
from finetune.preflight.gradient_checks import relative_difference
from finetune.preflight.trial import GradientRecorder, StopWhenRecorded
from tests.fixtures.models import PLACEMENT, load
from tests.fixtures.preflight import KERNELS, Scene


def in_float16(scene: Scene) -> None:
    """The scene's model in float16, as a T4 computes it."""
    placement = dataclasses.replace(PLACEMENT, dtype="float16")
    trainable = scene.job.trainable
    base = trainable.spec.base.folder
    model = lora.attach(load(base, "none", dtype="float16"), trainable.lora, upcast="none", checkpointing=False, seed=1)
    trainable.model, trainable.spec = model, dataclasses.replace(trainable.spec, placement=placement)
    trainable.fusion = apply_fusion(model, KERNELS, placement=placement, checkpointing="none")


def test_a_scaled_loss_keeps_gradients_that_float16_loses(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    in_float16(scene)
    context = scene.context()

    def gradients(scale: float) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(context_module, "LOSS_SCALE", scale)
        with context.with_noisy_lora_b():
            return context.gradients()

    expected = gradients(2.0**14)
    scaled, unscaled = (relative_difference(gradients(scale), expected) for scale in (1024.0, 1.0))
    assert scaled < unscaled / 4
    assert scaled < 0.01


class Scaler:
    """A loss scaler that is still searching."""

    scale = 65536.0

    def get_scale(self) -> float:
        return self.scale


@pytest.mark.parametrize("gradient", [torch.inf, 1.0])
def test_a_step_that_overflows_while_the_scale_is_searched_for_is_not_counted(gradient: float) -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.full_like(model.weight, gradient)
    accelerator = SimpleNamespace(unscale_gradients=lambda: None, unwrap_model=lambda same: same, scaler=Scaler())
    recorder, control = GradientRecorder(keeps_gradients=True), SimpleNamespace(should_training_stop=False)
    recorder.record_loss(torch.tensor(3.0), rows=[], inputs={})
    trainer: Any = SimpleNamespace(accelerator=accelerator)
    recorder.clip_gradients(trainer, model, max_norm=1.0)
    StopWhenRecorded(recorder).on_step_end(None, None, control)
    finite = gradient == 1.0
    assert recorder.losses == ([3.0] if finite else [])
    assert bool(recorder.gradients) is finite
    assert control.should_training_stop is finite
