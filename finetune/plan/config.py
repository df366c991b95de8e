"""The plan group."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from finetune.errors import ConfigError

SAID = {"true": True, "false": False}


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
    """``finetune plan fit=true exact=true``: the verb's own settings in the group's place.

    Raises:
        ConfigError: A value is neither true nor false.
    """
    wrong = [f"{name} must be true or false; got {value!r}: write {name}=true" for name, value in own.items() if value.lower() not in SAID]
    if wrong:
        raise ConfigError(*wrong)
    return replace(config, **{name: SAID[value.lower()] for name, value in own.items()})
