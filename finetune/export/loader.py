"""``finetune.load``: rebuilds exactly the model that was trained, or the merged model, and refuses any mismatch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.console import log
from finetune.errors import ModelError
from finetune.export.manifest import FILE, SCHEMA, folder_sha256, settings_sha256, template_sha256, version
from finetune.files import read_json
from finetune.hardware import Placement
from finetune.inference.chat import Chat
from finetune.model import Base, ModelConfig, ModelSpec
from finetune.quantization import QuantizationConfig
from finetune.quantization.config import PREQUANTIZED

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Model = PreTrainedModel | PeftModel

PLACES = ("", "export/adapter", "adapter", "export/safetensors", "safetensors")
"""Folders that may hold the record, relative to the named folder."""


def load(
    run_or_folder: str | Path, *, device: str | None = None, base: str | Path | None = None
) -> tuple[Model, PreTrainedTokenizerBase]:
    """Loads a run or one of its exports in the form in which it was trained.

    Args:
        run_or_folder: A run folder, its ``export`` folder, or an exported adapter or merged model.
        device: ``cpu``, ``cuda`` or ``mps``; None takes a GPU if there is one.
        base: Folder of the base, where it is neither on the hub nor where the run found it; its weights must be the
            same.

    Returns:
        Model (in evaluation mode, without gradients) and tokenizer.

    Raises:
        ModelError: There is no record, or base, weights, settings, template or tokens have changed.
    """
    return rebuild(*check(Path(run_or_folder)), device=device, base=base)


def rebuild(
    folder: Path, record: dict[str, Any], *, device: str | None = None, base: str | Path | None = None
) -> tuple[Model, PreTrainedTokenizerBase]:
    """Loads what `check` has checked; see `load`."""
    tokenizer = load_tokenizer(folder, record)
    placement = _placement(record, device=device)
    config = ModelConfig(**_known(ModelConfig, record["model"], folder), architecture=None)
    if record["kind"] == "merged":
        log("load", f"the merged model in {folder}")
        return _merged(folder, config, placement=placement, record=record), tokenizer
    from finetune.inference.adapted import load_adapted_model

    quantization = QuantizationConfig(**_known(QuantizationConfig, record["quantization"]["settings"], folder))
    spec = ModelSpec(
        base=find_base(folder, record, base=base), config=config, quantization=quantization, placement=placement
    )
    return load_adapted_model(spec, folder), tokenizer


def find_base(folder: Path, record: dict[str, Any], *, base: str | Path | None = None) -> Base:
    """Returns the base of an adapter that `check` has checked, with the weights of the training; see `load`."""
    config = ModelConfig(**_known(ModelConfig, record["model"], folder), architecture=None)
    return _base(config, record, where=base or _folder_of_the_run(folder, record))


def check(run_or_folder: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the folder that holds the record, and the record, after comparing hashes of settings and weights.

    Raises:
        ModelError: There is no record, or a file has changed.
    """
    folder = find(run_or_folder)
    record = _record(folder / FILE)
    _check_files(folder, record)
    return folder, record


def check_gguf(file: Path) -> bool:
    """Compares a GGUF export with the hash in its stage's manifest; returns whether there is one.

    Raises:
        ModelError: The file has changed.
    """
    manifest = file.resolve().parents[1] / "manifest.json"
    if not manifest.is_file():
        return False
    exports = read_json(manifest, dict).get("product", {}).get("exports", [])
    recorded = {Path(export["path"]).name: export["sha256"] for export in exports}.get(file.resolve().parent.name)
    if recorded is None:
        return False
    digest = folder_sha256(file.resolve().parent)
    if digest != recorded:
        raise ModelError(
            f"{file}: its weights are not those that were exported (hash {digest[:12]}, recorded {recorded[:12]})"
        )
    return True


def find(folder: Path) -> Path:
    """Returns the folder that holds the record.

    Raises:
        ModelError: There is none.
    """
    for place in PLACES:
        if (folder / place / FILE).is_file():
            return folder / place
    raise ModelError(
        f"{folder} holds no {FILE}; name a run folder whose export stage wrote adapter or safetensors, or one of these "
        "exports. "
        "A bare peft folder does not say which base it was trained on: open it with PeftModel.from_pretrained"
    )


def _record(file: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is damaged ({error}); export again") from error
    if record.get("schema") != SCHEMA:
        raise ModelError(
            f"{file} was written by another version of finetune (schema {record.get('schema')}, this one reads "
            f"{SCHEMA}); export again"
        )
    versions = {name: (then, version(name)) for name, then in record["versions"].items()}
    changed = [f"{name} {then} (here {now})" for name, (then, now) in versions.items() if then != now]
    if changed:
        log("load", f"{file.parent} was made with {', '.join(changed)}: figures may differ by rounding")
    return record


def _known(config: type[Any], settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the settings of a record.

    Raises:
        ModelError: This version has other settings.
    """
    fields = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(config)}
    needed = {name for name, is_needed in fields.items() if is_needed and name != "architecture"}
    other = sorted((settings.keys() - fields.keys()) | (needed - settings.keys()))
    if other:
        raise ModelError(
            f"{folder / FILE} was written by another version of finetune, which differs in the settings "
            f"{', '.join(other)}; export again"
        )
    return settings


def _check_files(folder: Path, record: dict[str, Any]) -> None:
    from finetune.model.base import weights_sha256

    settings, recorded = settings_sha256(folder), record["settings_sha256"]
    changed = sorted(name for name in recorded if settings.get(name) != recorded[name])
    if changed:
        raise ModelError(
            f"{folder}: {' and '.join(changed)} changed or missing since the export; restore what was exported"
        )
    digest, exported = weights_sha256(folder, reuse=False), record["weights_sha256"]
    if digest != exported:
        raise ModelError(
            f"{folder}: its weights are not those that were exported (hash {digest[:12]}, recorded {exported[:12]})"
        )


def load_tokenizer(folder: Path, record: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of an export that `check` has checked.

    Raises:
        ModelError: Its template or special tokens are not those of the training.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    recorded = record["tokenizer"]
    now = {"template_sha256": template_sha256(tokenizer), "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    then = {
        "template_sha256": recorded["template_sha256"],
        "eos": recorded["eos"]["id"],
        "pad": recorded["pad"]["id"],
    }
    changed = [name for name in now if now[name] != then[name]]
    if changed:
        raise ModelError(
            f"{folder}: the tokenizer is not the one of the training, its {' and '.join(changed)} changed; "
            "restore the export"
        )
    return tokenizer


def chat_of(tokenizer: PreTrainedTokenizerBase, record: dict[str, Any]) -> Chat:
    """Returns how an export is asked: its tokenizer, and the end tokens and system message of its training."""
    facts = record["tokenizer"]
    return Chat(tokenizer=tokenizer, ends=facts["eos"]["ends_an_answer"], system=facts["system"])


def _folder_of_the_run(folder: Path, record: dict[str, Any]) -> str | None:
    """Returns the base's folder as the run that made the export recorded it; None for a base on the hub."""
    manifest = folder.resolve().parents[1] / "model" / "manifest.json"
    if record["base"]["source"] == "hub" or not manifest.is_file():
        return None
    place = json.loads(manifest.read_text(encoding="utf-8"))["product"].get("folder")
    return str(place) if place and Path(place).is_dir() else None


def _base(config: ModelConfig, record: dict[str, Any], *, where: str | Path | None) -> Base:
    from finetune.model import fetch

    if where is None and record["base"]["source"] != "hub" and not config.name.startswith("package:"):
        raise ModelError(
            f"the adapter's base is {config.name}, a folder of the machine that trained it (weights "
            f"{record['base']['sha256'][:12]}); say where it is: finetune.load(..., base=<folder>)"
        )
    base = fetch(config if where is None else dataclasses.replace(config, name=str(where), revision=None))
    if base.sha256 != record["base"]["sha256"]:
        raise ModelError(
            f"the base {config.name} is not the one that the adapter was trained on: its weights have hash "
            f"{base.sha256[:12]} and training used {record['base']['sha256'][:12]} "
            f"(revision {record['base']['revision']}); put that one in its place"
        )
    return base


def _placement(record: dict[str, Any], *, device: str | None) -> Placement:
    import torch

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    computation = record["computation"]
    return Placement(
        device=chosen,
        dtype=computation["dtype"],
        attention=computation["attention"],
        optimizer="none",
        optimizer_reason="nothing is trained",
        threads=torch.get_num_threads(),
        reasons=(f"device {chosen}", "dtype and attention as they were for training"),
    )


def _merged(folder: Path, config: ModelConfig, *, placement: Placement, record: dict[str, Any]) -> PreTrainedModel:
    base = Base(folder=folder, name=str(folder), revision=None, sha256=record["weights_sha256"], source="folder")
    is_packed = record["quantization"]["settings"]["method"] == PREQUANTIZED
    quantization = QuantizationConfig(method=PREQUANTIZED if is_packed else "none")
    return ModelSpec(base=base, config=config, quantization=quantization, placement=placement).load()
