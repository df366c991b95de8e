"""The train stage: from a trainable model and prepared rows to an adapter on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cache import file_sha256
from finetune.console import human_bytes, log
from finetune.errors import TrainError
from finetune.files import atomic_write_text
from finetune.launch.shards import shard_base_model
from finetune.optim import state_bytes
from finetune.products import TrainedAdapter
from finetune.train.checkpoints import (
    choose_on_all_ranks,
    find_damage,
    fingerprint_training,
    path_of,
    require_same_config_on_all_ranks,
)
from finetune.train.progress import TrainingProgress

if TYPE_CHECKING:
    from peft import PeftModel

    from finetune.launch.ranks import Ranks
    from finetune.tracking import Trackers
    from finetune.train.config import TrainConfig
    from finetune.train.sft_trainer import Trainer
    from finetune.trainable import TrainingJob

CURVE_POINTS = 500
"""Most points of the loss curve that the manifest holds; metrics.jsonl has all of them."""


def train_adapter(job: TrainingJob, *, folder: Path, trackers: Trackers, ranks: Ranks) -> TrainedAdapter:
    """Trains the adapter and writes it, continuing from the newest complete checkpoint in ``folder``.

    Args:
        job: Model, rows and settings.
        folder: Receives adapter/, checkpoints/ and metrics.jsonl.
        trackers: Receive every logged metric.
        ranks: This process, rank 0, and the others, which call `join_training`; they have left when this returns.

    Raises:
        TrainError: There is nothing to train on, the checkpoint was made with other data, another base or other
            settings, the loss or the gradients stay NaN or infinite, a single row does not fit in memory, or the
            adapter changes nothing.
        Interrupted: A signal came; a checkpoint was written.
    """
    trainer, resumed_from = _train(job, folder=folder, trackers=trackers, ranks=ranks)
    ranks.shutdown()
    progress, model, placement = trainer.progress, job.trainable.model, job.trainable.spec.placement
    selected_step = select_weights(job.config, trainer=trainer, folder=folder / "checkpoints")
    require_trained(model)
    model.save_pretrained(str(folder / "adapter"))
    optimizer = {"asked": job.optim.name, "used": placement.optimizer, "why": placement.optimizer_reason}
    product = TrainedAdapter(
        folder=folder,
        steps=trainer.state.global_step,
        optimizer={**optimizer, "state_bytes": state_bytes(trainer.optimizer)},
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        adapter_sha256=file_sha256(folder / "adapter" / "adapter_model.safetensors"),
        adapter_dtype=job.trainable.lora.dtype,
        resumed_from=resumed_from,
        kept_step=selected_step,
        micro_batch=trainer.args.per_device_train_batch_size,
        **speed_and_losses(progress, read_curve(folder / "metrics.jsonl")),
    )
    _log_result(product)
    return product


def join_training(job: TrainingJob, *, ranks: Ranks) -> None:
    """Trains in the other processes of a launch while rank 0 is in `train_adapter`.

    They write nothing but the states of their random generators.
    """
    from finetune.tracking import Trackers

    _train(job, folder=Path(), trackers=Trackers([]), ranks=ranks)
    ranks.shutdown()


def _train(job: TrainingJob, *, folder: Path, trackers: Trackers, ranks: Ranks) -> tuple[Trainer, int]:
    """Returns the trainer after its last step, and the step that it continued from; runs in every process."""
    from finetune.train.oom_retry import train_with_oom_retry
    from finetune.train.session import TrainingSession

    check_job(job)
    folder = Path(ranks.broadcast(str(folder)))
    fingerprint = fingerprint_training(job)
    require_same_config_on_all_ranks(fingerprint, ranks=ranks)
    start = choose_on_all_ranks(folder / "checkpoints", fingerprint, ranks=ranks)
    resumed_from = start.step if start else 0
    progress, patience = start.progress.copy() if start else TrainingProgress(), job.config.patience
    progress.stopped_early = progress.stopped_early and patience is not None and progress.waited >= patience
    if ranks.is_main:
        for name in ("metrics.jsonl", "samples.jsonl"):
            rewind(folder / name, step=resumed_from)
    placement = job.trainable.spec.placement
    ranks.init_process_group(placement.device)
    if ranks.shards:
        shard_base_model(job.trainable.model, processes=ranks.count, device=placement.device, offload=ranks.offload)
    if start:
        log("train", f"continues from step {start.step}: {start.folder}")
    session = TrainingSession(
        job=job, folder=folder, fingerprint=fingerprint, progress=progress, trackers=trackers, ranks=ranks
    )
    return train_with_oom_retry(session, start), resumed_from


def check_job(job: TrainingJob) -> None:
    """Refuses a job that cannot work, before anything is read.

    Raises:
        TrainError: No rows, no held-out rows for what needs them, or offloading without a GPU.
    """
    config, data = job.config, job.data
    if not data.train_rows:
        raise TrainError("data: no row is left to train on; `finetune data` shows where they went")
    if not data.heldout_rows and (config.select == "best" or config.patience is not None):
        raise TrainError(
            f"train.select={config.select} and train.patience={config.patience} use the held-out loss, and there are "
            "no held-out rows; set data.heldout_path or data.heldout_share, or train.select=last train.patience=null"
        )
    if config.checkpointing == "offloaded" and job.trainable.spec.placement.device == "cpu":
        raise TrainError(
            "train.checkpointing=offloaded moves activations from a GPU to host memory, and this runs on a CPU; "
            "use full"
        )


def require_trained(model: PeftModel) -> None:
    """Refuses an adapter that changes nothing, or that makes the model's answers NaN.

    Raises:
        TrainError: A trained tensor is not finite, or every B is 0.
    """
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    broken = [name for name, tensor in trained.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise TrainError(
            f"train: {len(broken)} of {len(trained)} trained tensors are not finite (the first is {broken[0]}); "
            "nothing is saved. Train again with a lower optim.learning_rate, or a smaller optim.max_grad_norm"
        )
    ups = [tensor for name, tensor in trained.items() if "lora_B" in name or "lora_embedding_B" in name]
    if ups and not any(bool(tensor.any()) for tensor in ups):
        raise TrainError(
            "train: every B of the adapter is 0, so the model is still its base and nothing is saved; train for more "
            "steps (train.steps, train.epochs), or with a higher optim.learning_rate"
        )


def select_weights(config: TrainConfig, *, trainer: Trainer, folder: Path) -> int:
    """Puts the weights that ``train.select`` asks for into the model; returns their step."""
    last, progress = int(trainer.state.global_step), trainer.progress
    if config.select == "last" or progress.best_loss is None:
        return last
    reason = f"its held-out loss {progress.best_loss:.4f} is the lowest of {progress.evaluations}"
    if progress.best_step == last:
        log("train", f"selects the last step, {last}: {reason}")
        return last
    best = path_of(folder, progress.best_step)
    damage = find_damage(best)
    if damage is not None:
        raise TrainError(
            f"train.select=best: {best} {damage}, so the best weights are lost; "
            "use the last ones with train.select=last run.if_exists=resume"
        )
    trainer._load_from_checkpoint(str(best))
    log("train", f"selects step {progress.best_step} of {last}: {reason}")
    return progress.best_step


def speed_and_losses(progress: TrainingProgress, curve: list[dict[str, float]]) -> dict[str, Any]:
    """Returns the fields of `TrainedAdapter` that follow from the progress and the loss curve."""
    losses = [point["train/loss"] for point in curve if "train/loss" in point]
    if not losses:
        raise TrainError(
            f"train: each of the {progress.skipped} steps had a non-finite loss or gradient; nothing was trained"
        )
    return {
        "seconds": round(progress.seconds, 3),
        "tokens": progress.tokens,
        "trained_tokens": progress.trained,
        "tokens_per_second": round(progress.tokens / progress.seconds, 1),
        "trained_tokens_per_second": round(progress.trained / progress.seconds, 1),
        "first_loss": losses[0],
        "final_loss": mean_of_last_tenth(losses),
        "best_heldout_loss": progress.best_loss,
        "stopped_early": progress.stopped_early,
        "skipped_steps": progress.skipped,
        "curve": curve[:: max(1, math.ceil(len(curve) / CURVE_POINTS))],
    }


def _log_result(product: TrainedAdapter) -> None:
    rewards = [point["train/reward"] for point in product.curve if "train/reward" in point]
    name, first, final = "loss", product.first_loss, product.final_loss
    if rewards:  # the loss of sampled answers is near 0 whatever is learned
        name, first, final = "reward", rewards[0], mean_of_last_tenth(rewards)
    log(
        "train",
        f"{product.steps} steps in {product.seconds:.0f} s: {name} {first:.3f} -> {final:.3f}, "
        f"{product.tokens_per_second:.0f} tokens/s of which {product.trained_tokens_per_second:.0f} carry loss, "
        f"optimizer state {human_bytes(product.optimizer['state_bytes'])}",
    )


def rewind(file: Path, *, step: int) -> None:
    """Removes the lines of metrics.jsonl that a killed process wrote after its last checkpoint, and a partial line."""
    if not file.is_file():
        return
    lines = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    atomic_write_text(file, "".join(line for line in lines if json.loads(line)["step"] <= step))


def read_curve(file: Path) -> list[dict[str, float]]:
    """Reads the metrics of each step; where a resumed run repeats a step, the later line counts."""
    steps: dict[int, dict[str, float]] = {}
    for text in file.read_text(encoding="utf-8").splitlines():
        point = json.loads(text)
        steps[point["step"]] = steps.get(point["step"], {}) | point
    return [steps[step] for step in sorted(steps)]


def mean_of_last_tenth(losses: list[float]) -> float:
    """Returns the mean of the last tenth of the losses, which depends less on the last batch."""
    tail = losses[-max(1, len(losses) // 10) :]
    return round(sum(tail) / len(tail), 5)
