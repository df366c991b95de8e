"""Turns the tensors of a quantized checkpoint into dense weights, in plain torch.

    weight = dense_weight(parts, stored, shape=(outputs, inputs), dtype=torch.bfloat16)

A weight is ``(code - zero point) * scale``, computed in float32, where it is exact for integer codes and 16-bit scales,
and then rounded once to the dtype asked for. Sources of the layouts: AutoGPTQ 0.7 (qlinear_cuda_old.py), AutoAWQ 0.2
(modules/linear/gemm.py), compressed-tensors 0.20 (compressors/pack_quantized), transformers 5.23 (finegrained_fp8.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import torch
from torch import Tensor

from finetune.quantization.checkpoint_format import CheckpointFormat

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in a word, in units of four bits, of each of eight neighbouring outputs."""

WORD = 32
STEP_ELEMENTS = 2**22
"""Weights that are dequantized together: bounds the memory of integer and float32 copies."""

CODES = {"gptq": "qweight", "awq": "qweight", "packed": "weight_packed", "int": "weight", "float": "weight"}
"""The tensor that holds the codes, by packing."""

ORDERS = {"g_idx", "weight_g_idx"}
"""The group of each input, where the inputs of a group are not neighbours."""

SCALES = ("scales", "weight_scale", "weight_scale_inv")
PARTS = (
    *("qweight", "qzeros", "g_idx"),
    *("weight_packed", "weight_zero_point", "weight_shape", "weight_g_idx"),
    *("input_scale", "output_scale", "input_zero_point", "output_zero_point"),
    *SCALES,
)
"""Tensors of a quantized layer besides ``weight`` and ``bias``."""


def dense_weight(
    parts: Mapping[str, Tensor], stored: CheckpointFormat, *, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Returns a layer's weight, shape (outputs, inputs).

    Args:
        parts: Its tensors, by the last segment of their names.
        stored: How they are stored.
        shape: Of the weight.
        dtype: To round to.
    """
    outputs, inputs = shape
    weight = torch.empty(shape, dtype=dtype, device=parts[CODES[stored.packing]].device)
    block = stored.block[0] if stored.block else WORD
    step = max(1, STEP_ELEMENTS // (inputs * block)) * block
    for start in range(0, outputs, step):
        rows = slice(start, min(start + step, outputs))
        weight[rows] = _rows(parts, stored, rows, inputs=inputs)
    return weight


def without_plain_order(parts: Mapping[str, Tensor], stored: CheckpointFormat) -> dict[str, Tensor]:
    """Returns a layer's tensors without the list of groups, where the inputs of each group are neighbours.

    compressed-tensors writes -1 for a list that was never set.

    Raises:
        ValueError: It names a group that does not exist.
    """
    kept = dict(parts)
    for name in ORDERS & parts.keys():
        order = parts[name].long()
        size = stored.group_size or len(order)
        plain = torch.arange(len(order), device=order.device) // size
        if bool((order == -1).all()) or torch.equal(order, plain):
            del kept[name]
        elif int(order.min()) < 0 or int(order.max()) > int(plain[-1]):
            raise ValueError(f"{name} names group {int(order.max())} of {int(plain[-1]) + 1}")
    return kept


def _rows(parts: Mapping[str, Tensor], stored: CheckpointFormat, rows: slice, *, inputs: int) -> Tensor:
    """Returns some rows of the weight in float32; the first is a multiple of a word's."""
    if stored.packing == "float":
        return _float_rows(parts, stored, rows, inputs=inputs)
    codes, zeros, scales = _INTEGERS[stored.packing](parts, stored, rows, inputs)
    order = parts.get("g_idx", parts.get("weight_g_idx"))
    if order is not None:
        group = order.long()
        return (codes - (zeros if isinstance(zeros, int) else zeros[:, group])).float() * scales[:, group]
    grouped = codes.view(len(codes), scales.shape[1], -1)
    shifted = grouped - (zeros if isinstance(zeros, int) else zeros[..., None])
    return (shifted.float() * scales[..., None]).flatten(1)


Integers = tuple[Tensor, Tensor | int, Tensor]
"""Codes (rows, inputs), zero points (rows, groups) or one for all, and float32 scales (rows, groups)."""


def _gptq(parts: Mapping[str, Tensor], stored: CheckpointFormat, rows: slice, inputs: int) -> Integers:
    codes = unpack(parts["qweight"][:, rows], stored.bits, dim=0).t().contiguous()
    zeros = unpack(parts["qzeros"][:, _words(rows, stored.bits)], stored.bits, dim=1)[:, : len(codes)]
    zeros = (zeros + stored.zero_offset) & (2**stored.bits - 1)
    return codes, zeros.t(), parts["scales"][:, rows].t().float()


def _awq(parts: Mapping[str, Tensor], stored: CheckpointFormat, rows: slice, inputs: int) -> Integers:
    words = _words(rows, stored.bits)
    codes, zeros = (unpack(parts[name][:, words], 4, dim=1, order=AWQ_ORDER).t() for name in ("qweight", "qzeros"))
    return codes.contiguous(), zeros, parts["scales"][:, rows].t().float()


def _packed(parts: Mapping[str, Tensor], stored: CheckpointFormat, rows: slice, inputs: int) -> Integers:
    codes = unpack(parts["weight_packed"][rows], stored.bits, dim=1)[:, :inputs].contiguous()
    zeros: Tensor | int = 2 ** (stored.bits - 1)
    if "weight_zero_point" in parts:
        zeros = unpack(parts["weight_zero_point"][_words(rows, stored.bits)], stored.bits, dim=0)[: len(codes)]
    return codes, zeros, _per_row(parts["weight_scale"], rows).float()


def _int(parts: Mapping[str, Tensor], stored: CheckpointFormat, rows: slice, inputs: int) -> Integers:
    zeros: Tensor | int = 0
    if "weight_zero_point" in parts:
        zeros = _per_row(parts["weight_zero_point"], rows).int()
    return parts["weight"][rows].int(), zeros, _per_row(parts["weight_scale"], rows).float()


_INTEGERS = {"gptq": _gptq, "awq": _awq, "packed": _packed, "int": _int}


def _float_rows(parts: Mapping[str, Tensor], stored: CheckpointFormat, rows: slice, *, inputs: int) -> Tensor:
    weight = parts["weight"][rows].float()
    scales = next(parts[name] for name in SCALES if name in parts).float()
    if not stored.block:
        scales = _per_row(scales, rows)
        return (weight.view(len(weight), scales.shape[1], -1) * scales[..., None]).flatten(1)
    high, wide = stored.block
    scales = scales[rows.start // high : -(-rows.stop // high)]
    return weight * scales.repeat_interleave(high, 0)[: len(weight)].repeat_interleave(wide, 1)[:, :inputs]


def _per_row(constants: Tensor, rows: slice) -> Tensor:
    """Returns the constants of some rows, shape (rows, groups), or (1, 1) where the layer has one for all."""
    return constants.reshape(1, 1) if constants.numel() == 1 else constants.view(len(constants), -1)[rows]


def _words(rows: slice, bits: int) -> slice:
    """Returns the words that hold the values of some rows."""
    return slice(rows.start * bits // WORD, -(-rows.stop * bits // WORD))


def unpack(words: Tensor, bits: int, *, dim: int, order: Iterable[int] | None = None) -> Tensor:
    """Unpacks unsigned integers that lie one after the other, lowest bits first, in 32-bit words along a dimension.

    Args:
        words: int32, two-dimensional.
        bits: Of each value; a value of 3 bits may lie in two words.
        dim: 0 or 1, the packed dimension.
        order: Place of each value in its word; None for their own order.

    Returns:
        int32; the packed dimension is ``32 / bits`` times as long.
    """
    mask = 2**bits - 1
    if WORD % bits == 0:
        shifts = torch.tensor([bits * place for place in order or range(WORD // bits)], device=words.device)
        shifts = shifts.int().view([-1 if axis == dim + 1 else 1 for axis in range(3)])
        return ((words.unsqueeze(dim + 1) >> shifts) & mask).flatten(dim, dim + 1)
    missing = -words.shape[dim] % bits
    if missing:  # the last words of a row of zero points that is not a multiple of 32 long
        padding = words.new_zeros([missing if axis == dim else size for axis, size in enumerate(words.shape)])
        words = torch.cat([words, padding], dim)
    wide = words.long().bitwise_and(2**WORD - 1).unflatten(dim, (-1, bits))
    values = []
    for first in range(0, WORD * bits, bits):
        word, shift = divmod(first, WORD)
        low = wide.select(dim + 1, word) >> shift
        high = wide.select(dim + 1, min(word + 1, bits - 1)) << (WORD - shift)
        values.append((low | high) & mask)
    return torch.stack(values, dim + 1).flatten(dim, dim + 1).int()


def problem(shapes: Mapping[str, tuple[int, ...]], stored: CheckpointFormat, *, shape: tuple[int, int]) -> str:
    """Explains why a layer's tensors are not what the config describes; empty where they are.

    Args:
        shapes: Of its tensors, by the last segment of their names.
        stored: What the config describes.
        shape: Of the weight in the model.
    """
    inputs = shape[1]
    if stored.group_size and inputs % stored.group_size:
        return f"has {inputs} inputs, which group_size={stored.group_size} does not divide"
    for name, allowed in _expected(stored, shape).items():
        if name not in shapes:
            if name not in _OPTIONAL or (name == "weight_zero_point" and stored.zero_bytes):
                return f"has no {name}"
        elif shapes[name] not in allowed:
            return f"has {name} of shape {shapes[name]}; the config describes {' or '.join(map(str, allowed))}"
    if stored.packing in ("packed", "int") and "weight_zero_point" in shapes and not stored.zero_bytes:
        return "has zero points, and the config describes it as symmetric"
    room = weight_shape(shapes, stored)
    return "" if room == shape else f"holds {room} weights, and the model has {shape}"


_OPTIONAL = ("g_idx", "weight_g_idx", "weight_zero_point")


def _expected(stored: CheckpointFormat, shape: tuple[int, int]) -> dict[str, list[tuple[int, ...]]]:
    """Returns the shapes that each tensor of a layer may have."""
    outputs, inputs = shape
    groups = inputs // stored.group_size if stored.group_size else 1
    per_word = WORD / stored.bits
    words, row_words = -(-inputs * stored.bits // WORD), -(-outputs * stored.bits // WORD)
    if stored.packing == "gptq":
        return {
            "qweight": [(words, outputs)],
            "qzeros": [(groups, row_words)],
            "scales": [(groups, outputs)],
            "g_idx": [(inputs,)],
        }
    if stored.packing == "awq":
        return {
            "qweight": [(inputs, int(outputs / per_word))],
            "qzeros": [(groups, row_words)],
            "scales": [(groups, outputs)],
        }
    scales: list[tuple[int, ...]] = [(outputs, groups)]
    if stored.block:
        high, wide = stored.block
        scales = [(-(-outputs // high), -(-inputs // wide))]
    elif not stored.group_size:
        scales = [(outputs, 1), (outputs,), (1,), (1, 1), ()]
    scale = "weight_scale_inv" if stored.method == "fp8" else "weight_scale"
    if stored.packing == "float":
        return {"weight": [shape], scale: scales}
    if stored.packing == "int":
        return {"weight": [shape], scale: scales, "weight_zero_point": scales}
    return {
        "weight_packed": [(outputs, words)],
        scale: scales,
        "weight_zero_point": [(row_words, groups)],
        "weight_g_idx": [(inputs,)],
    }


def weight_shape(shapes: Mapping[str, tuple[int, ...]], stored: CheckpointFormat) -> tuple[int, int]:
    """Returns the shape (outputs, inputs) of the weight that a layer's tensors hold."""
    codes = shapes[CODES[stored.packing]]
    per_word = WORD / stored.bits
    if stored.packing == "gptq":
        return codes[1], int(codes[0] * per_word)
    if stored.packing == "awq":
        return int(codes[1] * per_word), codes[0]
    return (codes[0], int(codes[1] * per_word)) if stored.packing == "packed" else (codes[0], prod(codes[1:]))
