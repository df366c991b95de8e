"""Checkpoints: sealed when they are complete, verified before they are used, and pruned.

transformers writes ``checkpoint-N`` in place, file by file. Here a checkpoint is complete when it has ``seal.json``,
which is written last and atomically. It holds the hash of every file, the training's fingerprint and its progress. A
folder without a seal was being written when the process was killed.

Resuming executes no pickle: ``optimizer.pt``, ``scheduler.pt``, ``scaler.pt`` and ``rng_state.pth`` are loaded with
``torch.load(weights_only=True)`` (read in transformers 5.23, ``Trainer._load_optimizer_and_scheduler``,
``_load_scaler`` and ``_load_rng_state``), the adapter with safetensors, and all of them only after their hashes match.
The hashes detect damage; they do not authenticate the writer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.console import log
from finetune.errors import TrainError
from finetune.jsonable import to_jsonable
from finetune.quantization.config import spec as quantization_spec
from finetune.train.progress import TrainingProgress

if TYPE_CHECKING:
    from finetune.launch.ranks import Ranks
    from finetune.trainable import TrainingJob

SEAL = "seal.json"
SCHEMA = 2
NOT_IN_FINGERPRINT = ("evaluations", "eval_steps", "evaluation_rows", "patience", "select")
"""Settings that change the resulting adapter, but no step: they may change when a run is resumed."""

TrainingFingerprint = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete and undamaged checkpoint.

    Attributes:
        folder: ``checkpoint-N``.
        step: N, optimizer steps taken.
        progress: The state of the run at that step.
    """

    folder: Path
    step: int
    progress: TrainingProgress


def fingerprint_training(job: TrainingJob) -> TrainingFingerprint:
    """Returns everything that decides what the next step does to the adapter, by the setting's name.

    Of ``kernels`` it holds the choice, not the setting: ``auto`` may choose otherwise on the next start.
    """
    trainable, spec = job.trainable, job.trainable.spec
    fusion, placement = trainable.fusion, spec.placement
    train = {name: value for name, value in job.config.key().items() if name not in NOT_IN_FINGERPRINT}
    entries = {
        "data.fingerprint": job.data.fingerprint,
        "model.sha256": spec.base.sha256,
        "model.upcast": spec.config.upcast,
        **_prefixed("quantization", quantization_spec(spec.quantization)),
        **_prefixed("lora", to_jsonable(trainable.lora)),
        **_prefixed("optim", to_jsonable(job.optim)),
        **_prefixed("kernels", {name: fusion.enabled and chosen for name, chosen in fusion.choice.rounding().items()}),
        **_prefixed("train", train),
        **_prefixed("placement", placement.key()),
        "packing": trainable.packing,
        "run.seed": job.seed,
    }
    fingerprint: TrainingFingerprint = json.loads(json.dumps(entries))
    return fingerprint


def _prefixed(group: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {f"{group}.{name}": value for name, value in settings.items()}


def commit(folder: Path, fingerprint: TrainingFingerprint, *, progress: TrainingProgress) -> None:
    """Declares a written checkpoint complete.

    Args:
        folder: ``checkpoint-N`` with all its files.
        fingerprint: From `fingerprint_training`.
        progress: The state of the run.
    """
    files = {}
    for file in _files(folder):
        _sync(file)
        files[str(file.relative_to(folder))] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    content = {
        "schema": SCHEMA,
        "step": step_of(folder),
        "identity": fingerprint,
        "progress": dataclasses.asdict(progress),
        "files": files,
    }
    partial = folder / f"{SEAL}.partial"
    partial.write_text(json.dumps({**content, "sha256": _digest(content)}, indent=1), encoding="utf-8")
    _sync(partial)
    os.replace(partial, folder / SEAL)
    _sync(folder)
    _sync(folder.parent)


def choose(folder: Path, fingerprint: TrainingFingerprint) -> Checkpoint | None:
    """Returns the newest complete and undamaged checkpoint; deletes and logs those that are not.

    Args:
        folder: Holds ``checkpoint-N`` folders, or does not exist yet.
        fingerprint: Of the run that would continue.

    Returns:
        None where there is nothing to continue from.

    Raises:
        TrainError: The checkpoint was made with other data, another base or other settings; lists every difference.
    """
    paths = sorted((path for path in folder.glob("checkpoint-*") if path.is_dir()), key=step_of, reverse=True)
    for number, path in enumerate(paths):
        damage = find_damage(path)
        if damage is None:
            content = _read(path)
            _refuse_another_run(path, content["identity"], fingerprint)
            return Checkpoint(folder=path, step=step_of(path), progress=TrainingProgress(**content["progress"]))
        following = "training starts from the beginning"
        if number + 1 < len(paths):
            following = f"{paths[number + 1].name} is tried"
        log("train", f"{path.name} {damage}; it is deleted and {following}")
        remove(path)
    return None


def choose_on_all_ranks(folder: Path, fingerprint: TrainingFingerprint, *, ranks: Ranks) -> Checkpoint | None:
    """Returns rank 0's choice in every process; only rank 0 reads and deletes checkpoints."""
    checkpoint = choose(folder, fingerprint) if ranks.is_main else None
    content = ranks.broadcast(to_jsonable(checkpoint))
    if content is None:
        return None
    progress = TrainingProgress(**content["progress"])
    return Checkpoint(folder=Path(content["folder"]), step=content["step"], progress=progress)


def require_same_config_on_all_ranks(fingerprint: TrainingFingerprint, *, ranks: Ranks) -> None:
    """Refuses processes that would train differently, e.g. with another base: their gradients cannot be summed."""
    for rank, other in enumerate(ranks.all_gather(fingerprint)):
        differences = "; ".join(
            f"{name} is {value!r} and {other.get(name)!r} there"
            for name, value in fingerprint.items()
            if value != other.get(name)
        )
        if differences:
            raise TrainError(
                f"process {rank} of the launch would train differently from this one: {differences}. "
                "Use the same data, base and settings on all machines"
            )


def prune(folder: Path, *, keep: int, best_step: int) -> None:
    """Deletes all complete checkpoints but the newest ``keep`` and that of ``best_step`` (0 for none)."""
    complete = sorted((path for path in folder.glob("checkpoint-*") if is_complete(path)), key=step_of)
    for path in complete[:-keep]:
        if step_of(path) != best_step:
            remove(path)


def remove(path: Path) -> None:
    """Deletes a checkpoint, its seal first, so that a partly deleted folder does not look complete."""
    (path / SEAL).unlink(missing_ok=True)
    shutil.rmtree(path)


def path_of(folder: Path, step: int) -> Path:
    """Returns where transformers writes the checkpoint of a step."""
    return folder / f"checkpoint-{step}"


def step_of(path: Path) -> int:
    """Returns the N of ``checkpoint-N``; -1 for other names, so that such a folder is tried last."""
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def forget_lost_best(progress: TrainingProgress, folder: Path) -> None:
    """Resets the best evaluation if its checkpoint was deleted.

    That happens when a resumed run continues from before a better evaluation: the better checkpoint is gone, and the
    earlier best was deleted when the better one came.
    """
    if progress.best_step and not is_complete(path_of(folder, progress.best_step)):
        log(
            "train",
            f"the checkpoint of the best step so far, {progress.best_step}, is missing; "
            "the best step is selected from here on",
        )
        progress.best_step, progress.best_loss, progress.waited = 0, None, 0


def is_complete(path: Path) -> bool:
    """Returns whether a checkpoint has its seal, which is written last."""
    return (path / SEAL).is_file()


def find_damage(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint, as the end of a sentence; None where every hash matches."""
    if not is_complete(path):
        return "is incomplete"
    try:
        content = json.loads((path / SEAL).read_text(encoding="utf-8"))
        sha256 = content.pop("sha256")
    except (ValueError, KeyError, AttributeError):
        return f"is damaged: {SEAL} cannot be read"
    if sha256 != _digest(content):
        return f"is damaged: {SEAL} should have sha256 {sha256[:16]}... and has {_digest(content)[:16]}..."
    for name, facts in content["files"].items():
        file = path / name
        if not file.is_file():
            return f"is damaged: {name} is missing"
        sha256 = _sha256(file)
        if sha256 != facts["sha256"]:
            return f"is damaged: {name} should have sha256 {facts['sha256'][:16]}... and has {sha256[:16]}..."
    return None


def _read(path: Path) -> dict[str, Any]:
    content = json.loads((path / SEAL).read_text(encoding="utf-8"))
    if content["schema"] != SCHEMA:
        raise TrainError(
            f"{path} was written by another version of finetune (schema {content['schema']}, this one reads {SCHEMA}); "
            "continue with that version, or set run.if_exists=overwrite to start again"
        )
    return content


def _refuse_another_run(path: Path, was: TrainingFingerprint, now: TrainingFingerprint) -> None:
    names = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
    if names:
        differences = "; ".join(f"{name} was {was.get(name)!r} and is {now.get(name)!r}" for name in names)
        raise TrainError(
            f"{path} was made with other inputs or settings: {differences}. A run continues only with those that it "
            "began with: restore them, choose another run.name, or set run.if_exists=overwrite to start again"
        )


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in (SEAL, f"{SEAL}.partial"))


def _sha256(file: Path) -> str:
    """Hashes the content; `cache.file_sha256` trusts the modification time, which a damaged disk does not change."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk: a seal must not be written before its files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
