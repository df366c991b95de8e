"""Makes the quantized base of ``quantization=gptq`` and ``awq`` from a dense one, for the run and for later ones.

rounded = round_base(spec, folder=Path("outputs/mine/quantization"), data=data, seed=1)
spec = rounded.apply_to(spec)  # from here on, a base that is stored quantized
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cache import cache_folder, exclusive
from finetune.console import log
from finetune.errors import ModelError
from finetune.files import link_or_copy, require_disk
from finetune.quantization.autoround import Rounding, round_model
from finetune.quantization.calibration import Calibration, calibration_sequences
from finetune.quantization.config import PREQUANTIZED, QuantizationConfig
from finetune.quantization.config import spec as settings_of
from finetune.run import write_json

if TYPE_CHECKING:
    from finetune.model import ModelSpec
    from finetune.products import PreparedData

RECORD = "record.json"
WEIGHTS = (".safetensors", ".index.json")


@dataclass(frozen=True, kw_only=True)
class RoundedBase:
    """The quantized base of a run.

    Attributes:
        folder: Of the stage; the base is in the folder ``name`` in it.
        name: Of the dense base, and the method.
        sha256: Over its weight files.
        method: ``gptq`` or ``awq``.
        layers: Layers that are packed.
        sequences, tokens: Calibration sequences, and tokens of each.
        seed: Of their order.
        seconds: That the rounding took, in this run or in the one that made it.
        version: Of auto-round.
        is_cached: Whether another run had made it.
    """

    folder: Path
    name: str
    sha256: str
    method: str
    layers: int
    sequences: int
    tokens: int
    seed: int
    seconds: float
    version: str
    is_cached: bool

    def apply_to(self, spec: ModelSpec) -> ModelSpec:
        """Returns the same model on the quantized base."""
        place = self.folder / self.name
        base = dataclasses.replace(
            spec.base, folder=place, name=str(place), revision=None, sha256=self.sha256, source="folder"
        )
        return dataclasses.replace(spec, base=base, quantization=QuantizationConfig(method=PREQUANTIZED))


def round_base(spec: ModelSpec, *, folder: Path, data: PreparedData, seed: int) -> RoundedBase:
    """Rounds a dense base on the run's own training rows, or takes what an earlier run made of the same.

    Args:
        spec: The dense base, and ``gptq`` or ``awq``.
        folder: Of the stage.
        data: Its training rows are in ``data.folder/train``.
        seed: Of the run.

    Raises:
        ModelError: The rows are too few, or auto-round cannot round this model.
    """
    from finetune.model.base import weights_sha256

    config = spec.quantization
    rows, tokens = config.calibration_rows, config.calibration_tokens
    calibration = calibration_sequences(data.folder / "train", rows=rows, tokens=tokens, seed=seed)
    if calibration.shortage:
        raise ModelError(f"quantization={config.method}: {calibration.shortage}")
    rounding = Rounding(method=config.method, group_size=config.group_size, steps=config.steps, seed=seed)
    root, key = cache_folder("rounded"), _key(spec, rounding, calibration)
    entry = root / f"{config.method}-{key}"
    with exclusive(root, entry.name, what="this quantized base"):
        is_cached = _is_complete(entry)
        if not is_cached:
            count = len(calibration.sequences)
            log("quantization", f"{config.method}: rounding on {count} sequences of {tokens} training tokens")
            _make(spec, rounding, calibration, entry=entry)
    name = f"{Path(spec.base.public_name).name}-{config.method}"
    _link(entry, folder / name)
    record: dict[str, Any] = json.loads((entry / RECORD).read_text(encoding="utf-8"))
    rounded = RoundedBase(
        folder=folder,
        name=name,
        sha256=weights_sha256(folder / name),
        method=config.method,
        layers=record["layers"],
        sequences=len(calibration.sequences),
        tokens=tokens,
        seed=seed,
        seconds=record["seconds"],
        version=record["version"],
        is_cached=is_cached,
    )
    made = f"read from {entry}, made" if is_cached else "made"
    log("quantization", f"{rounded.layers} layers in 4 bits, {made} by auto-round {rounded.version} in "
        f"{rounded.seconds:.0f} s: {folder / name}")  # fmt: skip
    return rounded


def _key(spec: ModelSpec, rounding: Rounding, calibration: Calibration) -> str:
    code = [(Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8") for name in ("autoround", "rewrite")]
    placement = spec.placement
    content = [
        spec.base.sha256,
        settings_of(spec.quantization),
        dataclasses.asdict(rounding),
        calibration.sequences,
        [placement.dtype, placement.device, version("auto-round"), version("torch")],
        code,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def _is_complete(entry: Path) -> bool:
    """Returns whether an entry was written and is undamaged; removes a damaged one."""
    from finetune.model.base import weights_sha256

    if not (entry / RECORD).is_file():
        return False
    record = json.loads((entry / RECORD).read_text(encoding="utf-8"))
    if weights_sha256(entry, reuse=False) == record["sha256"]:
        return True
    log("quantization", f"the quantized base {entry} is damaged; removed, and made again")
    shutil.rmtree(entry)
    return False


def _make(spec: ModelSpec, rounding: Rounding, calibration: Calibration, *, entry: Path) -> None:
    """Makes an entry under a temporary name and renames it."""
    from finetune.model.base import weights_sha256

    source, partial = spec.base.folder, entry.with_name(f".{entry.name}.{os.getpid()}")
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    require_disk(entry.parent, size, f"quantization={rounding.method}", remedy="free some space", error=ModelError)
    shutil.rmtree(entry, ignore_errors=True)
    partial.mkdir()
    try:
        for file in source.iterdir():
            if file.is_file() and not file.name.endswith(WEIGHTS):
                shutil.copyfile(file, partial / file.name)
        made = round_model(
            source,
            partial,
            rounding,
            sequences=calibration.sequences,
            device=spec.placement.device,
            dtype=spec.placement.dtype,
            threads=spec.placement.threads,
            trust_remote_code=spec.config.trust_remote_code,
        )
        write_json(partial / RECORD, {**dataclasses.asdict(made), "sha256": weights_sha256(partial)})
        os.replace(partial, entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _link(entry: Path, target: Path) -> None:
    """Puts an entry's files into the run, which keeps them when the cache is emptied."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for file in entry.iterdir():
        link_or_copy(file, target / file.name)
