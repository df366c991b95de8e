"""What a quantized layer holds, in one form for every library."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Size, Tensor


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A quantized layer's weight.

    Attributes:
        shape: Of the dense weight, (outputs, inputs).
        codes: The packed integers.
        constants: Scales and zero points, by name.
        books: What is the same for every layer: the levels that the codes stand for.
        facts: What else decides how the codes are read.
    """

    shape: Size
    codes: Tensor
    constants: dict[str, Tensor]
    books: dict[str, Tensor] = field(default_factory=dict)
    facts: str = ""
