"""What the training rows decide about the quantized base, before it is loaded.

::

    spec = with_quantized_base(ModelSpec.resolve(config, placement), folder, data, seed=1)
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from finetune.hardware.backends import CALIBRATED
from finetune.quantization import choose_skip_modules
from finetune.quantization.rounded import RoundedBase, round_base
from finetune.quantization.sensitivity import SkippedLayers

if TYPE_CHECKING:
    from finetune.model import ModelSpec
    from finetune.products import PreparedData
    from finetune.run import RunFolder


def with_quantized_base(spec: ModelSpec, folder: RunFolder, data: PreparedData, *, seed: int) -> ModelSpec:
    """Returns the spec with what the training rows decide: a base that is calibrated on them, or layers to exempt."""
    if spec.quantization.method in CALIBRATED:
        rounded = folder.stage(
            "quantization",
            RoundedBase,
            lambda out: round_base(spec, folder=out, data=data, seed=seed),
            key=spec.key() | {"data.sha256": data.fingerprint, "run.seed": seed},
        )
        return rounded.apply_to(spec)
    if not spec.quantization.skip_modules_mib:
        return spec
    kept = folder.stage(
        "quantization",
        SkippedLayers,
        lambda out: choose_skip_modules(spec, folder=out, data=data),
        key=spec.key() | {"quantization": spec.quantization, "data.sha256": data.fingerprint},
    )
    return dataclasses.replace(spec, quantization=kept.apply_to(spec.quantization))
