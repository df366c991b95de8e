"""The whole configuration: one field per group; composed by Hydra, checked at once, made real as dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from finetune.data import DataConfig
from finetune.errors import ConfigError
from finetune.eval import EvalConfig
from finetune.export import ExportConfig
from finetune.export.needs import conflicts as export_conflicts
from finetune.hardware import HardwareConfig
from finetune.kernels import KernelsConfig
from finetune.launch import LaunchConfig
from finetune.launch.config import SHARDABLE
from finetune.lora import LoraConfig
from finetune.merge import MergeConfig
from finetune.model import ModelConfig
from finetune.optim import OptimConfig
from finetune.overrides import explain, misplaced, opened, unknown_additions
from finetune.paths import CONF, SHIPPED
from finetune.plan import PlanConfig
from finetune.preflight import PreflightConfig
from finetune.quantization import QuantizationConfig
from finetune.run import RunSettings
from finetune.sweep import SweepConfig
from finetune.tracking import TrackerConfig
from finetune.train import TrainConfig


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One field per group; the rules of a group are in its room, the rules that span rooms are here."""

    run: RunSettings
    model: ModelConfig
    quantization: QuantizationConfig
    lora: LoraConfig
    data: DataConfig
    plan: PlanConfig = field(default_factory=PlanConfig)
    preflight: PreflightConfig
    train: TrainConfig
    optim: OptimConfig
    kernels: KernelsConfig
    merge: MergeConfig
    eval: EvalConfig
    export: dict[str, ExportConfig] = field(default_factory=dict)
    tracking: dict[str, TrackerConfig] = field(default_factory=dict)
    hardware: HardwareConfig
    launch: LaunchConfig
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def problems(self) -> Iterator[str]:
        for group in dataclasses.fields(self):
            value = getattr(self, group.name)
            for part in value.values() if isinstance(value, dict) else [value]:
                yield from part.problems()
        shipped = str(SHIPPED)
        if (
            self.data.path
            and (self.data.heldout_path or "").startswith(shipped)
            and not self.data.path.startswith(shipped)
        ):
            yield (
                f"data.path={self.data.path} would be measured on the quickstart's held-out rows; "
                "choose data=custom, or set data.heldout_path"
            )
        yield from export_conflicts(self.export, lora=self.lora, rows=self.eval.rows, loss_rows=self.eval.loss_rows)
        yield from self.lora.conflicts(quantization=self.quantization.method, weight_decay=self.optim.weight_decay)
        yield from self.train.conflicts(rows=self.data.objective, variant=self.lora.variant, dropout=self.lora.dropout)
        method = self.quantization.method
        if method in ("torchao_int8", "hqq") and self.model.upcast != "none":
            yield (
                f"model.upcast={self.model.upcast} gives float32 inputs, which layers of quantization.method={method} do not take: "
                "set model.upcast=none"
            )
        if self.launch.strategy in ("fsdp", "deepspeed") and method not in SHARDABLE:
            yield (
                f"quantization.method={method} cannot be cut into shards: launch={self.launch.strategy} needs "
                "quantization=nf4_double, or choose launch=ddp"
            )
        if (
            self.quantization.method == "none"
            and self.optim.name.startswith("paged_")
            and self.model.dtype == "float16"
        ):
            yield "model.dtype=float16 without quantization trains unstably; use bfloat16 or float32"


def register() -> None:
    """Makes the schema and the ``shipped:`` resolver known to Hydra."""
    ConfigStore.instance().store(group="schema", name="run", node=RunConfig, package="_global_")
    OmegaConf.register_new_resolver("shipped", lambda name: str(SHIPPED / name), replace=True)


def load(overrides: Sequence[str]) -> RunConfig:
    """Composes, checks and types a configuration.

    Args:
        overrides: Hydra's overrides, e.g. ``["+experiment=llama7b_qlora", "lora.rank=8"]``.

    Raises:
        ConfigError: With every problem found, not only the first.
    """
    return make(compose_config(overrides))


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Hydra's composition, every error said in our form."""
    register()
    overrides = opened(overrides, RunConfig)
    found = misplaced(overrides)
    if found:
        raise ConfigError(*found)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            config = compose("config", overrides=list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(*_every_problem(overrides, error)) from error
        except YAMLError as error:
            raise ConfigError(f"a file of the configuration is no YAML: {' '.join(str(error).split())}") from error
    unknown = unknown_additions(config, RunConfig)
    if unknown:
        raise ConfigError(*unknown)
    return config


def make(config: DictConfig) -> RunConfig:
    """The typed configuration, after all checks."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(*[f"{key} has no value and no default; set it, e.g. {key}=..." for key in missing])
    try:
        made = OmegaConf.to_object(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, None, RunConfig, CONF)) from error
    assert isinstance(made, RunConfig)
    problems = list(made.problems())
    if problems:
        raise ConfigError(*problems)
    return made


def _every_problem(overrides: Sequence[str], first: Exception) -> list[str]:
    """Hydra stops at the first problem, so each override is tried alone on top of the group choices that work."""
    problems: list[str] = []
    groups = [override for override in overrides if "." not in override.split("=")[0]]
    values = [override for override in overrides if override not in groups]
    working: list[str] = []
    for override in [*groups, *values]:
        try:
            compose("config", overrides=[*working, override])
        except (HydraException, OmegaConfBaseException) as error:
            problems.append(explain(error, override, RunConfig, CONF))
        else:
            if override in groups:
                working.append(override)
    return problems or [explain(first, None, RunConfig, CONF)]


def explain_all(error: Exception) -> list[str]:
    """An error that composing alone does not show, in our form."""
    return [explain(error, None, RunConfig, CONF)]


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as the run folder keeps it."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain values, for trackers and manifests."""
    return OmegaConf.to_container(OmegaConf.structured(config), resolve=True)  # type: ignore[return-value]
