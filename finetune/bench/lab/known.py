"""What is published of the methods, held against what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.bench.lab.compare import Measured

HALF_THOUSANDTH = 0.0005


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim.

    Attributes:
        text: What is published.
        source: Where.
        seen: Both figures, as measured here.
        holds: Whether they agree with it.
    """

    text: str
    source: str
    seen: str
    holds: bool


CASE = "Dettmers and Zettlemoyer 2022, The case for 4-bit precision"
NEARER = (
    ("int8", "nf4", "8 bits lose less than 4 in the same model", CASE),
    ("torchao_int8", "nf4", "8 bits lose less than 4 in the same model", CASE),
    ("nf4", "fp4", "NF4 loses less than FP4", "Dettmers et al. 2023, QLoRA, table 2"),
)
"""The first is nearer to full precision than the second."""

BITS = (
    ("nf4", 4.5, "4 bits and a float32 for 64"),
    ("nf4_double", 4 + 8 / 64 + 32 / (64 * 256), "8 bits for 64, a float32 for 256 of those"),
)
"""Source: QLoRA, section 3."""


def claims(found: list[Measured]) -> list[Claim]:
    """Those whose methods were measured."""
    rows = {one.backend: one for one in found if one.status == "measured"}
    lines = [
        Claim(
            text=text,
            source=source,
            seen=f"KL {_kl(rows[near]):.4f} ({near}), {_kl(rows[far]):.4f} ({far})",
            holds=_kl(rows[near]) < _kl(rows[far]),
        )
        for near, far, text, source in NEARER
        if near in rows and far in rows
    ]
    lines += [
        Claim(
            text=f"{name} takes {bits:.3f} bits a weight: {text}", source="QLoRA, section 3", seen=f"{rows[name].bits_per_parameter}",
            holds=abs((rows[name].bits_per_parameter or 0.0) - bits) <= HALF_THOUSANDTH,
        )
        for name, bits, text in BITS
        if name in rows
    ]  # fmt: skip
    if {"nf4", "nf4_double"} <= rows.keys():
        saved = (rows["nf4"].bits_per_parameter or 0.0) - (rows["nf4_double"].bits_per_parameter or 0.0)
        text = "double quantization saves 0.373 bits a weight"
        lines.append(
            Claim(
                text=text,
                source="QLoRA, section 3",
                seen=f"{saved:.3f}",
                holds=abs(saved - 0.373) <= 2 * HALF_THOUSANDTH,
            )
        )
    return lines


def _kl(one: Measured) -> float:
    return one.kl if one.kl is not None else float("inf")
