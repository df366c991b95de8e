"""Recognises bases whose weights are stored quantized, from their config.json alone: no torch, no weights.

stored = read_format(folder)  # None for a dense base
print(stored.title, stored.bits, stored.group_size)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import ModelError

GPTQ_BITS, PACKED_BITS = (2, 3, 4, 8), (4, 8)
CONFIG, OLD_GPTQ_CONFIG = "config.json", "quantize_config.json"
READ = (
    "gptq (2, 3, 4 and 8 bits; checkpoint_format gptq and gptq_v2), awq (4 bits, version gemm), compressed-tensors "
    "(pack-quantized and int-quantized with 4 or 8 bits, float-quantized and naive-quantized in FP8), fp8 and "
    "bitsandbytes"
)
"""The formats that can be read, for messages."""

SCALE_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class CheckpointFormat:
    """How a base's linear layers are stored.

    Attributes:
        method: ``quant_method`` of its config.json.
        packing: ``gptq``, ``awq``, ``packed``, ``int``, ``float`` or ``bitsandbytes``: how codes become weights.
        bits: Per weight.
        group_size: Inputs that share a scale; 0 for one scale per output row, or per tensor.
        block: Rows and columns of a block with one scale, where blocks are two-dimensional; empty otherwise.
        zero_offset: Added to a stored zero point: 1 in GPTQ's first format.
        zero_bytes: Bytes of one zero point; 0 without any.
        second_level: Whether bitsandbytes quantizes the constants too.
        skipped: Layers that are not quantized: parts of names, or ``re:`` and an expression.
        activations: Whether servers also quantize the activations, which training does not.
    """

    method: str
    packing: str
    bits: int
    group_size: int
    block: tuple[int, ...] = ()
    zero_offset: int = 0
    zero_bytes: float = 0.0
    second_level: bool = False
    skipped: tuple[str, ...] = ()
    activations: bool = False

    @property
    def title(self) -> str:
        """Returns the name for people: ``gptq, 4 bits in groups of 128``."""
        blocks = f"blocks of {' x '.join(map(str, self.block))}"
        groups = f"groups of {self.group_size}" if self.group_size else "one scale per row"
        return f"{self.method}, {self.bits} bits in {blocks if self.block else groups}"

    @property
    def group_bytes(self) -> float:
        """Returns the bytes of the constants of one group."""
        if self.packing == "bitsandbytes":
            return 1 + 4 / 256 if self.second_level else 4
        return (4 if self.block else SCALE_BYTES) + self.zero_bytes

    @property
    def group_elements(self) -> int:
        """Returns the weights that share a scale; 0 for whole rows."""
        return self.block[0] * self.block[1] if self.block else self.group_size

    @property
    def is_int8(self) -> bool:
        """Returns whether bitsandbytes computes the layers as LLM.int8."""
        return self.packing == "bitsandbytes" and self.bits == 8

    def skips(self, name: str) -> bool:
        """Returns whether a layer is named among those that are not quantized."""
        return any(
            re.match(entry.removeprefix("re:"), name) if entry.startswith("re:") else entry in name
            for entry in self.skipped
        )


def read_format(folder: Path) -> CheckpointFormat | None:
    """Reads how a base is stored; returns None for dense weights.

    Raises:
        ModelError: It is quantized in a way that cannot be read.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    settings = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    if not settings:
        if (folder / OLD_GPTQ_CONFIG).is_file():
            raise ModelError(
                f"model.name: {folder} has a {OLD_GPTQ_CONFIG}, and its {CONFIG} no quantization_config; copy the "
                'content there under that name, with "quant_method": "gptq"'
            )
        return None
    return parse(settings, where=folder / CONFIG)


def parse(settings: Any, *, where: Path) -> CheckpointFormat:
    """Reads a ``quantization_config``.

    Args:
        settings: Its content.
        where: The file, for messages.

    Raises:
        ModelError: It describes nothing that can be read.
    """
    try:
        method = _method(settings)
        problems = list(_PROBLEMS[method](settings)) if method in _PROBLEMS else [f"quant_method={method}"]
        if not problems:
            return _READERS[method](settings)
    except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
        problems = [f"{type(error).__name__}: {error}"]
    raise ModelError(
        f"model.name: the weights are stored quantized (quantization_config: {'; '.join(problems)} in {where}), which "
        f"cannot be read; these can: {READ}. Give one of these, or the unquantized base that it was made from"
    )


def _method(settings: Any) -> str:
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    return str(settings.get("quant_method", "unknown"))


def _unless(allowed: bool, setting: str, value: Any) -> Iterator[str]:
    if not allowed:
        yield f"{setting}={value}"


def _gptq_problems(settings: Any) -> Iterator[str]:
    form = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    yield from _unless(settings["bits"] in GPTQ_BITS, "bits", settings["bits"])
    yield from _unless(form in ("gptq", "gptq_v2"), "checkpoint_format", form)
    yield from _unless(not settings.get("is_marlin_format"), "is_marlin_format", True)
    yield from _unless(settings.get("pack_dtype", "int32") == "int32", "pack_dtype", settings.get("pack_dtype"))
    yield from _unless(not settings.get("lm_head"), "lm_head", True)
    yield from _unless(not settings.get("dynamic"), "dynamic", settings.get("dynamic"))
    yield from _group_problems(settings["group_size"])


def _group_problems(size: Any) -> Iterator[str]:
    yield from _unless(size == -1 or size > 0, "group_size", size)


def _gptq(settings: Any) -> CheckpointFormat:
    bits, form = int(settings["bits"]), settings.get("checkpoint_format") or settings.get("format")
    return CheckpointFormat(
        method="gptq",
        packing="gptq",
        bits=bits,
        group_size=max(0, settings["group_size"]),
        zero_offset=0 if form == "gptq_v2" else 1,
        zero_bytes=bits / 8,
    )


def _awq_problems(settings: Any) -> Iterator[str]:
    bits, version = settings.get("bits", settings.get("w_bit")), str(settings.get("version", "gemm")).lower()
    yield from _unless(bits == 4, "bits", bits)
    yield from _unless(version == "gemm", "version", version)
    yield from _group_problems(settings.get("group_size", settings.get("q_group_size")))


def _awq(settings: Any) -> CheckpointFormat:
    return CheckpointFormat(
        method="awq",
        packing="awq",
        bits=4,
        group_size=max(0, settings.get("group_size", settings.get("q_group_size"))),
        zero_bytes=1 / 2,
        skipped=tuple(settings.get("modules_to_not_convert") or ()),
    )


def _weights(settings: Any) -> list[Any]:
    return [group["weights"] for group in settings["config_groups"].values()]


COMPRESSED = {
    "pack-quantized": "packed",
    "int-quantized": "int",
    "float-quantized": "float",
    "naive-quantized": "float",
}


def _compressed_problems(settings: Any) -> Iterator[str]:
    weights, form = _weights(settings), settings["format"]
    first, groups = weights[0], settings["config_groups"].values()
    kind, bits = first["type"], first["num_bits"]
    forms = {form, *(group.get("format") or form for group in groups)}
    yield from _unless(forms <= set(COMPRESSED) and len(forms) == 1, "format", ", ".join(sorted(forms)))
    yield from _unless(all(other == first for other in weights), "config_groups", "with different weights")
    for targets in (group["targets"] for group in groups):
        yield from _unless(targets == ["Linear"], "targets", targets)
    expected = ("float", (8,)) if COMPRESSED.get(form) == "float" else ("int", PACKED_BITS)
    yield from _unless(kind == expected[0] and bits in expected[1], "weights", f"{kind} with {bits} bits")
    strategies = ("tensor", "channel", "group", "block")
    yield from _unless(first["strategy"] in strategies, "strategy", first["strategy"])
    status = settings.get("quantization_status", "compressed")
    yield from _unless(status == "compressed", "quantization_status", status)
    for name in ("kv_cache_scheme", "transform_config"):
        yield from _unless(not settings.get(name), name, settings.get(name))
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    yield from _unless(sparsity == "dense", "sparsity_config.format", sparsity)


def _compressed(settings: Any) -> CheckpointFormat:
    weights, bits = _weights(settings)[0], _weights(settings)[0]["num_bits"]
    return CheckpointFormat(
        method="compressed-tensors",
        packing=COMPRESSED[settings["format"]],
        bits=bits,
        group_size=(weights.get("group_size") or 0) if weights["strategy"] == "group" else 0,
        block=tuple(weights["block_structure"]) if weights["strategy"] == "block" else (),
        zero_bytes=0 if weights.get("symmetric", True) else bits / 8,
        skipped=tuple(settings.get("ignore") or ()),
        activations=any(group.get("input_activations") for group in settings["config_groups"].values()),
    )


def _fp8_problems(settings: Any) -> Iterator[str]:
    form, block = settings.get("fmt", "e4m3"), settings.get("weight_block_size")
    yield from _unless(form in ("e4m3", "float8_e4m3fn"), "fmt", form)
    yield from _unless(bool(block) and len(block) == 2, "weight_block_size", block)
    scales = settings.get("scale_fmt", "float")
    yield from _unless(scales in ("float", None), "scale_fmt", scales)


def _fp8(settings: Any) -> CheckpointFormat:
    return CheckpointFormat(
        method="fp8",
        packing="float",
        bits=8,
        group_size=0,
        block=tuple(settings["weight_block_size"]),
        skipped=tuple(settings.get("modules_to_not_convert") or ()),
        activations=settings.get("activation_scheme") is not None,
    )


def _bitsandbytes_problems(settings: Any) -> Iterator[str]:
    if settings.get("load_in_4bit"):
        kind = settings.get("bnb_4bit_quant_type", "fp4")
        yield from _unless(kind in ("nf4", "fp4"), "bnb_4bit_quant_type", kind)
    else:
        yield from _unless(bool(settings.get("load_in_8bit")), "load_in_8bit", settings.get("load_in_8bit"))


def _bitsandbytes(settings: Any) -> CheckpointFormat:
    four = bool(settings.get("load_in_4bit"))
    return CheckpointFormat(
        method="bitsandbytes",
        packing="bitsandbytes",
        bits=4 if four else 8,
        group_size=64 if four else 0,
        second_level=four and bool(settings.get("bnb_4bit_use_double_quant")),
        skipped=tuple(settings.get("llm_int8_skip_modules") or ()),
    )


_PROBLEMS = {
    "gptq": _gptq_problems,
    "awq": _awq_problems,
    "compressed-tensors": _compressed_problems,
    "fp8": _fp8_problems,
    "bitsandbytes": _bitsandbytes_problems,
}
_READERS = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "bitsandbytes": _bitsandbytes,
}
