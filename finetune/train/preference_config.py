"""Settings of the objectives that compare answers, and what they exclude."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from finetune.objectives import OBJECTIVES


@dataclass(kw_only=True, slots=True)
class PreferenceConfig:
    """Form and strength of the loss of an objective that compares answers."""

    beta: float = 0.1
    """Cost of leaving the reference; with a small one the model moves far from it. Without a reference: scale of the
    compared log-probabilities (``cpo``, ``simpo``), weight of the odds ratio (``orpo``). With ``ipo``, 1 / (2 beta) is
    the target margin. Source of the 0.1: arXiv 2305.18290, appendix B."""

    loss: str = "sigmoid"
    """``sigmoid`` (DPO), ``hinge`` (SLiC: no gradient once the margin is 1) or ``ipo`` (squared distance from a margin
    per token; overfits less where every pair is easy to separate). ``cpo`` has sigmoid and hinge. ``kto``: ``kto``, or
    ``apo_zero``, which compares with the reference alone: for answers better than the model's own."""

    label_smoothing: float = 0.0
    """``sigmoid`` only: assumed share of pairs whose answers are swapped, at least 0 and below 0.5."""

    margin: float = 0.0
    """``simpo``: by how much the chosen answer's reward should exceed the other's; 0 or more."""

    likelihood: float = 0.0
    """``orpo``, ``cpo``, ``simpo``: weight of the chosen answers' loss per token, which keeps their likelihood from
    falling; 0 or more."""

    desirable_weight: float = 1.0
    """``kto``: weight of the desirable answers. Times their number, it should be 1 to 4/3 times the same of the
    undesirable ones. Source: arXiv 2402.01306, equation 8."""

    undesirable_weight: float = 1.0
    """``kto``: weight of the undesirable answers."""

    def problems(self, name: str) -> Iterator[str]:
        """Yields what is wrong for ``train.objective=name``."""
        where, objective = "train.preference", OBJECTIVES.get(name)
        if self.beta <= 0:
            yield f"{where}.beta must be positive, otherwise no answer is preferred; got {self.beta}"
        if not 0 <= self.label_smoothing < 0.5:
            yield f"{where}.label_smoothing must be at least 0 and below 0.5; got {self.label_smoothing}"
        for key in ("margin", "likelihood"):
            if getattr(self, key) < 0:
                yield f"{where}.{key} must be 0 or more; got {getattr(self, key)}"
        for key in ("desirable_weight", "undesirable_weight"):
            if getattr(self, key) <= 0:
                yield f"{where}.{key} must be positive, or its answers would train nothing; got {getattr(self, key)}"
        if objective is None or not objective.compares or objective.samples:
            return
        if self.loss not in objective.losses:
            allowed = ", ".join(objective.losses)
            yield f"{where}.loss must be one of {allowed} for train.objective={name}; got {self.loss!r}"
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in (*objective.settings, "loss") and value != field.default:
                yield (
                    f"{where}.{field.name} has no effect with train.objective={name}; got {value}: "
                    f"set it to {field.default}"
                )
        if self.label_smoothing and self.loss in ("ipo", "hinge"):
            yield (
                f"{where}.label_smoothing has an effect with loss=sigmoid only, not with loss={self.loss}; "
                f"got {self.label_smoothing}: set it to 0"
            )
        if name == "orpo" and not self.likelihood:
            yield f"{where}.likelihood=0 leaves ORPO without its main term: choose train=orpo, or set it to 1"

    def unused_by(self, name: str) -> Iterator[tuple[str, str]]:
        """Yields the fields that ``train.objective=name`` does not use, each with the reason."""
        objective = OBJECTIVES[name]
        if not objective.compares or objective.samples:
            yield "preference", f"train.objective={name} compares no given answers"
            return
        for field in fields(self):
            if field.name not in objective.settings:
                yield f"preference.{field.name}", f"train.objective={name} does not use it"
            elif field.name == "label_smoothing" and self.loss != "sigmoid":
                yield "preference.label_smoothing", "only train.preference.loss=sigmoid smooths labels"


def conflicts(name: str, *, variant: str, dropout: float, neftune_alpha: float | None, launch: str) -> Iterator[str]:
    """Yields problems of an objective with other groups: shards, and where it has a reference, noise on the policy."""
    if launch in ("fsdp", "deepspeed") and not OBJECTIVES[name].shardable:
        yield (
            f"launch.strategy={launch} shards the weights, and train.objective={name} computes outside the steps that "
            "processes with shards take together: choose launch=ddp or launch=single"
        )
    if not OBJECTIVES[name].reference:
        return
    if variant == "loftq":
        yield (
            "lora.variant=loftq starts with an adapter that changes the base, and the base is the reference of "
            f"train.objective={name}: the first step would already differ from it; choose lora=default"
        )
    if dropout:
        yield (
            f"lora.dropout adds noise to the log-probabilities that train.objective={name} compares with those of the "
            f"reference; got {dropout}: set lora.dropout=0"
        )
    if neftune_alpha is not None:
        yield (
            "train.neftune_alpha would put other noise on the policy than on the reference that "
            f"train.objective={name} compares it with; got {neftune_alpha}: set it to null"
        )
