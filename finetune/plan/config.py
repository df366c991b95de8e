"""The plan group."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """How the plan is made."""

    fit: bool = False
    """Also proposes the settings that fit the hardware and train fastest, as overrides to paste."""

    def problems(self) -> Iterator[str]:
        return iter(())
