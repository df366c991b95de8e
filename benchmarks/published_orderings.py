"""Compares what is published about quantization methods with what was measured here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetune.bench.quantization_results import QuantizationResult

HALF_THOUSANDTH = 0.0005
CASE = "Dettmers and Zettlemoyer 2022, The case for 4-bit precision"
QLORA = "QLoRA, section 3"
ORDERINGS = (
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

SAVED_BITS = 0.373
"""By double quantization. Source: QLoRA, section 3."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published claim.

    Attributes:
        text: What is published.
        source: Where.
        measured: Both figures, as measured here.
        agrees: Whether they agree with it.
    """

    text: str
    source: str
    measured: str
    agrees: bool


def check_claims(results: list[QuantizationResult]) -> list[Claim]:
    """Checks the claims whose methods were measured."""
    kl = {r.backend: r.kl for r in results if r.status == "measured" and r.kl is not None}
    bits = {r.backend: r.bits_per_parameter or 0.0 for r in results if r.status == "measured"}
    return [*_orderings(kl), *_bits(bits)]


def _orderings(kl: dict[str, float]) -> Iterator[Claim]:
    for near, far, text, source in ORDERINGS:
        if near in kl and far in kl:
            measured = f"KL {kl[near]:.4f} ({near}), {kl[far]:.4f} ({far})"
            yield Claim(text=text, source=source, measured=measured, agrees=kl[near] < kl[far])


def _bits(bits: dict[str, float]) -> Iterator[Claim]:
    for name, expected, text in BITS:
        if name in bits:
            agrees = abs(bits[name] - expected) <= HALF_THOUSANDTH
            claim = f"{name} takes {expected:.3f} bits a weight: {text}"
            yield Claim(text=claim, source=QLORA, measured=f"{bits[name]}", agrees=agrees)
    if {"nf4", "nf4_double"} <= bits.keys():
        saved = bits["nf4"] - bits["nf4_double"]
        agrees = abs(saved - SAVED_BITS) <= 2 * HALF_THOUSANDTH
        claim = f"double quantization saves {SAVED_BITS} bits a weight"
        yield Claim(text=claim, source=QLORA, measured=f"{saved:.3f}", agrees=agrees)
