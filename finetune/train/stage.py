"""The verb of training: from a prepared model and data to an adapter on disk."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cache import file_sha256
from finetune.console import human_bytes, log
from finetune.errors import TrainError
from finetune.launch.ranks import Ranks
from finetune.launch.shards import shard
from finetune.optim import OptimConfig, state_bytes
from finetune.train.checkpoints import (
    Checkpoint,
    Identity,
    choose_together,
    find_damage,
    forget_lost_best,
    identify,
    path_of,
    require_same_config_on_all_ranks,
)
from finetune.train.config import TrainConfig, TrainedAdapter
from finetune.train.progress import Counts

if TYPE_CHECKING:
    from finetune.data import PreparedData
    from finetune.hardware import Placement
    from finetune.kernels import Fusion, KernelsConfig
    from finetune.lora import LoraConfig
    from finetune.model import Base
    from finetune.tracking import Trackers

ROUNDING = ("fused", "loss_on_trained_tokens", "native", "tiles")
"""Choices of `kernels` that round otherwise than their alternatives, so a run that goes on must choose them again."""

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
    quick: Fusion,
    kernels: KernelsConfig,
    seed: int,
    trackers: Trackers,
    ranks: Ranks,
) -> TrainedAdapter:
    """Trains the adapter and writes it, going on from the last good checkpoint in ``folder`` where there is one.

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
        kernels: Its settings; with the base they decide whether a finished training still holds.
        seed: Order of the rows and dropout.
        trackers: Receive every logged figure.
        ranks: This process, the first of its launch, and the others, which call `assist`; it is alone afterwards.

    Raises:
        TrainError: Nothing to train on, other data, base or settings than the checkpoint's, loss or gradients that stay
            no numbers, or no memory for a single row.
        Interrupted: A signal came; a checkpoint was written.
    """
    trainer, counts, resumed_from = learn(
        config, folder=folder, adapted=adapted, tokenizer=tokenizer, data=data, base=base, quantization=quantization, lora=lora,
        optim=optim, placement=placement, upcast=upcast, packing=packing, quick=quick, seed=seed, trackers=trackers, ranks=ranks,
    )  # fmt: skip
    ranks.shutdown()
    kept_step = keep(config, trainer=trainer, folder=folder / "checkpoints", counts=counts)
    adapted.save_pretrained(folder / "adapter")
    optimizer = {"asked": optim.name, "used": placement.optimizer, "why": placement.optimizer_reason}
    product = TrainedAdapter(
        folder=folder,
        steps=trainer.state.global_step,
        optimizer={**optimizer, "state_bytes": state_bytes(trainer.optimizer)},
        trainable_parameters=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        adapter_sha256=file_sha256(folder / "adapter" / "adapter_model.safetensors"),
        adapter_dtype=lora.dtype,
        resumed_from=resumed_from,
        kept_step=kept_step,
        micro_batch=trainer.args.per_device_train_batch_size,
        **figures(counts, read_curve(folder / "metrics.jsonl")),
    )
    say_result(product)
    return product


def assist(*, ranks: Ranks, **inputs: Any) -> None:
    """What the other processes of a launch do while the first one is in `fit`, with the same inputs; they write nothing
    but their states of random numbers."""
    from finetune.tracking import Trackers

    learn(folder=Path(), trackers=Trackers([]), ranks=ranks, **inputs)
    ranks.shutdown()


def learn(
    config: TrainConfig, *, folder: Path, adapted: Any, tokenizer: Any, data: PreparedData, base: Base, quantization: dict[str, Any],
    lora: LoraConfig, optim: OptimConfig, placement: Placement, upcast: str, packing: bool, quick: Fusion, seed: int, trackers: Trackers,
    ranks: Ranks,
) -> tuple[Any, Counts, int]:  # fmt: skip
    """The trainer after its last step, the figures, and the step that it went on from; called by every process."""
    refuse(config, data=data, placement=placement)
    folder = Path(ranks.broadcast(str(folder)))
    identity = identify(
        config, data=data, base=base, quantization=quantization, lora=lora, optim=optim, placement=placement, upcast=upcast,
        packing=packing, choice={name: quick.switch.on and getattr(quick.choice, name) for name in ROUNDING}, seed=seed,
    )  # fmt: skip
    require_same_config_on_all_ranks(identity, ranks=ranks)
    start = choose_together(folder / "checkpoints", identity, ranks=ranks)
    resumed_from = start.step if start else 0
    counts = start.counts.copy() if start else Counts()
    counts.stopped_early = counts.stopped_early and config.patience is not None and counts.waited >= config.patience
    if ranks.is_main:
        rewind(folder / "metrics.jsonl", step=resumed_from)
    ranks.join(placement.device)
    if ranks.shards:
        shard(adapted, processes=ranks.count, device=placement.device, offload=ranks.offload)
    made = {
        "model": adapted,
        "tokenizer": tokenizer,
        "data": data,
        "lora": lora,
        "optim": optim,
        "placement": placement,
    }
    trainer = train(
        config, folder=folder, identity=identity, counts=counts, start=start, trackers=trackers, ranks=ranks,
        settings={**made, "upcast": upcast, "packing": packing, "quick": quick, "seed": seed},
    )  # fmt: skip
    return trainer, counts, resumed_from


def refuse(config: TrainConfig, *, data: PreparedData, placement: Placement) -> None:
    """Says what cannot work before anything is read."""
    if not data.train_rows:
        raise TrainError("data: no row is left to train on; `finetune data` shows where they went")
    if not data.heldout_rows and (config.keep == "best" or config.patience is not None):
        raise TrainError(
            f"train.keep={config.keep} and train.patience={config.patience} go by the held-out loss, and the data have no held-out rows; "
            "set data.heldout_path or data.heldout_share, or train.keep=last train.patience=null"
        )
    if config.offload and placement.device == "cpu":
        raise TrainError(
            "train.offload=true moves activations from a GPU's memory to the machine's, and this runs on a CPU; set it to false"
        )


def train(
    config: TrainConfig,
    *,
    folder: Path,
    identity: Identity,
    counts: Counts,
    start: Checkpoint | None,
    trackers: Trackers,
    ranks: Ranks,
    settings: dict[str, Any],
) -> Any:
    """The trainer after its last step, whatever it took to get there.

    Args:
        config: The train group.
        folder: The stage's folder.
        identity: From `checkpoints.identify`.
        counts: The live figures.
        start: Where to go on from.
        trackers: Receive every logged figure.
        ranks: This process and the others.
        settings: Whatever else `make_trainer` needs.
    """
    from finetune.train.callbacks import Keeper, Patience, Progress, Record, SaveOnSignal
    from finetune.train.guard import Guard
    from finetune.train.oom_retry import Attempt, LastCompleteStep, train_with_oom_retry

    keep_best = config.keep == "best"
    stop = SaveOnSignal(ranks)

    def attempt(narrowed: TrainConfig) -> Attempt:
        from finetune.train.trainer import make_trainer  # takes seconds, in which a signal must be heard already

        if keep_best:
            forget_lost_best(counts, folder / "checkpoints")
        whole = LastCompleteStep(counts)
        keeper = Keeper(counts, identity=identity, keep=config.keep_checkpoints, keep_best=keep_best, ranks=ranks)
        callbacks = [Patience(counts, patience=config.patience, keep_best=keep_best), whole, keeper, stop]
        if ranks.is_main:
            callbacks = [
                Record(folder / "metrics.jsonl", counts=counts, trackers=trackers),
                *callbacks[:-1],
                Progress(counts),
                stop,
            ]
        guard = Guard(counts, limit=config.non_finite_steps)
        trainer = make_trainer(
            narrowed, folder=folder, counts=counts, guard=guard, callbacks=callbacks, ranks=ranks, **settings
        )

        def save() -> None:
            trainer._save_checkpoint(trainer.model, trial=None)
            keeper.on_save(trainer.args, trainer.state, trainer.control)

        return Attempt(trainer=trainer, whole=whole, save=save)

    if start:
        log("train", f"goes on from step {start.step}: {start.folder}")
    with stop:
        return train_with_oom_retry(
            config, attempt=attempt, folder=folder / "checkpoints", identity=identity, counts=counts, start=start
        )


def keep(config: TrainConfig, *, trainer: Any, folder: Path, counts: Counts) -> int:
    """Puts the weights that ``train.keep`` asks for into the model; returns their step."""
    last = int(trainer.state.global_step)
    if config.keep == "last" or counts.best_loss is None:
        return last
    why = f"its held-out loss {counts.best_loss:.4f} is the lowest of {counts.evaluations}"
    if counts.best_step == last:
        log("train", f"keeps the last step, {last}: {why}")
        return last
    best = path_of(folder, counts.best_step)
    trouble = find_damage(best)
    if trouble is not None:
        raise TrainError(
            f"train.keep=best: {best} {trouble}, so the best weights are gone; take the last ones with train.keep=last run.if_exists=resume"
        )
    trainer._load_from_checkpoint(str(best))
    log("train", f"keeps step {counts.best_step} of {last}: {why}")
    return counts.best_step


def figures(counts: Counts, curve: list[dict[str, float]]) -> dict[str, Any]:
    """Speed and losses of a finished training, as `TrainedAdapter` names them."""
    losses = [line["train/loss"] for line in curve if "train/loss" in line]
    if not losses:
        raise TrainError(
            f"train: each of the {counts.skipped} steps had a loss or gradient that is no number, so nothing was learnt"
        )
    return {
        "seconds": round(counts.seconds, 3),
        "tokens": counts.tokens,
        "trained_tokens": counts.trained,
        "tokens_per_second": round(counts.tokens / counts.seconds, 1),
        "trained_tokens_per_second": round(counts.trained / counts.seconds, 1),
        "first_loss": losses[0],
        "final_loss": mean_of_last_tenth(losses),
        "best_heldout_loss": counts.best_loss,
        "stopped_early": counts.stopped_early,
        "skipped_steps": counts.skipped,
        "curve": curve[:: max(1, math.ceil(len(curve) / CURVE_POINTS))],
    }


def say_result(product: TrainedAdapter) -> None:
    """One line: what the training did and at what speed."""
    log(
        "train",
        f"{product.steps} steps in {product.seconds:.0f} s: loss {product.first_loss:.3f} -> {product.final_loss:.3f}, "
        f"{product.tokens_per_second:.0f} tokens/s of which {product.trained_tokens_per_second:.0f} trained, "
        f"optimizer state {human_bytes(product.optimizer['state_bytes'])}",
    )


def rewind(file: Path, *, step: int) -> None:
    """Takes out of metrics.jsonl what a killed process wrote after its last checkpoint, half a line at the end included."""
    if not file.is_file():
        return
    kept = [text for text in file.read_text(encoding="utf-8").splitlines(keepends=True) if text.endswith("\n")]
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text("".join(text for text in kept if json.loads(text)["step"] <= step), encoding="utf-8")
    os.replace(partial, file)


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
