"""The plan group."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """How the plan is made."""

    fit: bool = False
    """Also proposes the settings that fit the hardware and train fastest, as overrides to paste."""

    exact: bool = False
    """Also counts a step of the real modelling code tensor by tensor, on tensors without contents; takes half a minute."""

    def problems(self) -> Iterator[str]:
        return iter(())


def with_own(config: PlanConfig, own: Mapping[str, str]) -> PlanConfig:
    """``finetune plan fit=true exact=true``: the verb's own settings in the group's place."""
    return replace(config, **{name: value == "true" for name, value in own.items()})
