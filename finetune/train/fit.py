"""The verb of training: from a prepared model and data to an adapter on disk."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cache import file_sha256
from finetune.console import human_bytes, say
from finetune.errors import TrainError
from finetune.optim import OptimConfig, state_bytes
from finetune.train.config import TrainConfig, TrainedAdapter
from finetune.train.counts import Counts

if TYPE_CHECKING:
    from finetune.data import PreparedData
    from finetune.hardware import Placement
    from finetune.lora import LoraConfig
    from finetune.model import Base
    from finetune.speed import Quick, SpeedConfig
    from finetune.tracking import Trackers

CURVE_POINTS = 500
"""Points of the loss curve that the manifest keeps; metrics.jsonl has them all."""


def fit(
    config: TrainConfig,
    *,
    folder: Path,
    adapted: Any,
    tokenizer: Any,
    data: PreparedData,
    base: Base,
    quantization: dict[str, Any],
    lora: LoraConfig,
    optim: OptimConfig,
    placement: Placement,
    upcast: str,
    packing: bool,
    quick: Quick,
    speed: SpeedConfig,
    seed: int,
    trackers: Trackers,
) -> TrainedAdapter:
    """Trains the adapter and writes it, going on from the last checkpoint in ``folder`` where there is one.

    Args:
        config: The train group.
        folder: Receives adapter/, checkpoints/ and metrics.jsonl.
        adapted: The adapted model, from `lora.attach`.
        tokenizer: Only its pad token is used.
        data: Rows ready for the model.
        base: What was adapted; with ``quantization`` it decides whether a finished training still holds.
        quantization: Its specification.
        lora: The adapter's numbers.
        optim: Optimizer and schedule.
        placement: Device, numbers and the optimizer that is used.
        upcast: ``model.upcast``.
        packing: Whether documents may share a row without padding.
        quick: How steps are computed.
        speed: Its settings; with the base they decide whether a finished training still holds.
        seed: Order of the rows and dropout.
        trackers: Receive every logged figure.

    Raises:
        TrainError: Nothing to train on, or loss or gradients are no numbers any more.
        Interrupted: A signal came; a checkpoint was written.
    """
    from finetune.train.trainer import make_trainer

    if not data.train_rows:
        raise TrainError("data: no row is left to train on; `finetune data` shows where they went")
    checkpoint = last_checkpoint(folder / "checkpoints")
    resumed_from = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    counts = counts_at(folder / "metrics.jsonl", step=resumed_from)
    trainer = make_trainer(
        config, folder=folder, model=adapted, tokenizer=tokenizer, data=data, lora=lora, optim=optim, placement=placement, upcast=upcast,
        packing=packing, quick=quick, seed=seed, trackers=trackers, counts=counts,
    )  # fmt: skip
    if checkpoint:
        say("train", f"goes on from step {resumed_from}: {checkpoint}")
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    counts.seconds += time.monotonic() - started
    adapted.save_pretrained(folder / "adapter")
    optimizer = {"asked": optim.name, "used": placement.optimizer, "why": placement.optimizer_why}
    product = TrainedAdapter(
        folder=folder,
        steps=trainer.state.global_step,
        optimizer={**optimizer, "state_bytes": state_bytes(trainer.optimizer)},
        trainable_parameters=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        adapter_sha256=file_sha256(folder / "adapter" / "adapter_model.safetensors"),
        adapter_dtype=lora.dtype,
        resumed_from=resumed_from,
        **figures(counts, read_curve(folder / "metrics.jsonl")),
    )
    say_result(product)
    return product


def figures(counts: Counts, curve: list[dict[str, float]]) -> dict[str, Any]:
    """Speed and losses of a finished training, as `TrainedAdapter` names them."""
    losses = [line["train/loss"] for line in curve if "train/loss" in line]
    return {
        "seconds": round(counts.seconds, 3),
        "tokens": counts.tokens,
        "trained_tokens": counts.trained,
        "tokens_per_second": round(counts.tokens / counts.seconds, 1),
        "trained_tokens_per_second": round(counts.trained / counts.seconds, 1),
        "first_loss": losses[0],
        "final_loss": mean_of_last_tenth(losses),
        "curve": curve[:: max(1, math.ceil(len(curve) / CURVE_POINTS))],
    }


def say_result(product: TrainedAdapter) -> None:
    """One line: what the training did and at what speed."""
    say(
        "train",
        f"{product.steps} steps in {product.seconds:.0f} s: loss {product.first_loss:.3f} -> {product.final_loss:.3f}, "
        f"{product.tokens_per_second:.0f} tokens/s of which {product.trained_tokens_per_second:.0f} trained, "
        f"optimizer state {human_bytes(product.optimizer['state_bytes'])}",
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end: the trainer's state is the last file of one."""
    complete = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def counts_at(file: Path, *, step: int) -> Counts:
    """What had gone through training at a step; zeros at the start."""
    lines = read_curve(file) if step else []
    line = next((line for line in reversed(lines) if line["step"] <= step and "train/tokens" in line), None)
    if line is None:
        return Counts()
    return Counts(tokens=int(line["train/tokens"]), trained=int(line["train/trained_tokens"]), seconds=line["train/seconds"])


def read_curve(file: Path) -> list[dict[str, float]]:
    """What metrics.jsonl says of each step: where a resumed run repeats a step, the later line holds."""
    steps: dict[int, dict[str, float]] = {}
    for text in file.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        steps[line["step"]] = steps.get(line["step"], {}) | line
    return [steps[step] for step in sorted(steps)]


def mean_of_last_tenth(losses: list[float]) -> float:
    """A final loss that does not hang on the luck of the last batch."""
    tail = losses[-max(1, len(losses) // 10) :]
    return round(sum(tail) / len(tail), 5)
