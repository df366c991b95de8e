"""Measures step 0 of a run in one form: ``python -m finetune.bench.conformance_worker``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.inference.fresh_process import serve_request

if TYPE_CHECKING:
    from finetune.preflight.context import CheckContext


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Computes codes; loss, gradients and merged weights of a noisy adapter; and one optimizer step of the run's.

    Args:
        request: ``overrides`` of the run, ``folder`` (a run folder, which keeps the prepared data for the next form),
            ``tensors`` (the file to write).

    Returns:
        ``loss`` in nats per trained token, ``codes`` (hashes by layer), ``form`` (device, dtype and kernels). The
        tensors have ``gradient.<name>``, ``step.<name>``, ``merged.<layer>`` and ``logits``.
    """
    from safetensors.torch import save_file

    from finetune.quantization.backends import quantized_layers

    context = make_context(request["overrides"], Path(request["folder"]))
    model, rows = context.model, context.rows.micro_batch
    with context.with_noisy_lora_b():
        loss, gradients = context.trainer.gradients(rows, micro_batch=len(rows))
        tensors = {f"merged.{name}": weight for name, weight in merged_weights(model).items()}
    tensors |= {f"gradient.{name}": gradient for name, gradient in gradients.items()} | after_one_step(context)
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, request["tensors"])
    placement = context.spec.placement
    return {
        "loss": loss,
        "codes": {name: codes_sha256(layer) for name, layer in quantized_layers(model).items()},
        "dtype": placement.dtype,
        "form": [f"{placement.device}, {placement.dtype}, {placement.attention}", *context.fusion.choice.reasons],
    }


def make_context(overrides: list[str], folder: Path) -> CheckContext:
    """Loads data, model and adapter as a run does, and returns what the preflight works on."""
    from finetune import hardware
    from finetune.config import load
    from finetune.data import prepare
    from finetune.hardware.place import bind_to_gpu, set_threads
    from finetune.model import ModelSpec
    from finetune.plan.step import resolve_auto
    from finetune.preflight import stage
    from finetune.products import PreparedData
    from finetune.run import RunFolder
    from finetune.train.trainer import make_trainer
    from finetune.trainable import TrainingJob, load_trainable_model

    config, run = load(overrides), RunFolder(folder)
    machine = hardware.probe(config.hardware)
    placement = hardware.place(machine, config)
    bind_to_gpu(machine, placement, local=0)
    set_threads(placement)
    config = resolve_auto(config, machine, run=folder)
    spec, seed = ModelSpec.resolve(config, placement), config.run.seed
    tokenizer = spec.load_tokenizer()
    data = run.stage(
        "data",
        PreparedData,
        lambda out: prepare(config.data, folder=out, tokenizer=tokenizer, seed=seed),
        key={"data": config.data.key()},
    )
    trainable = load_trainable_model(config, spec, tokenizer, data)
    job = TrainingJob(config=config.train, optim=config.optim, trainable=trainable, data=data, seed=seed)
    return stage.make_context(
        config.preflight, folder=folder, run=folder, job=job, make_trainer=make_trainer, until="train"
    )


def after_one_step(context: CheckContext) -> dict[str, Tensor]:
    """Takes one step of the run's own optimizer at its peak rate, and returns changes and logits, in host memory."""
    from finetune.preflight.trial import GradientRecorder

    class StartRecorder(GradientRecorder):
        """Keeps the adapter as the optimizer finds it: TRL rounds float32 adapters on a bfloat16 base."""

        def clip_gradients(self, trainer: Any, model: Any, *, max_norm: float) -> Tensor:
            named = trainer.accelerator.unwrap_model(model).named_parameters()
            self.start = {name: p.detach().to("cpu", copy=True) for name, p in named if p.requires_grad}
            return super().clip_gradients(trainer, model, max_norm=max_norm)

    model, rows = context.model, context.rows.micro_batch
    recorder = StartRecorder(keeps_gradients=False)
    with context.trainer.trained(rows, micro_batch=len(rows), steps=1, recorder=recorder):
        after = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
        changes = {f"step.{name}": tensor - recorder.start[name] for name, tensor in after.items()}
        return {**changes, "logits": context.logits(adapter=True).cpu()}


def merged_weights(model: Any) -> dict[str, Tensor]:
    """Returns the weights of the first and the last adapted linear layer with the adapter added, in host memory."""
    from finetune.quantization.backends import dense

    adapted = [
        (name, layer)
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight") and "default" in layer.lora_A
    ]
    chosen = dict((adapted[0], adapted[-1])) if adapted else {}
    return {
        name: (dense(layer.base_layer, torch.float32) + layer.get_delta_weight("default")).detach().cpu()
        for name, layer in chosen.items()
    }


def codes_sha256(layer: Any) -> str:
    """Hashes the codes of a quantized layer: two devices that quantize alike give the same."""
    from finetune.quantization.backends import packed_weight

    codes = packed_weight(layer).codes.detach().cpu().contiguous()
    return hashlib.sha256(codes.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    serve_request(measure)
