"""The whole configuration as one dataclass: a field for each group."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

from finetune.data import DataConfig
from finetune.eval import EvalConfig
from finetune.export import ExportConfig
from finetune.export.needs import conflicts as export_conflicts
from finetune.hardware import HardwareConfig
from finetune.hardware.backends import CALIBRATED
from finetune.kernels import KernelsConfig
from finetune.launch import LaunchConfig
from finetune.launch.config import SHARDABLE
from finetune.lora import LoraConfig
from finetune.merge import MergeConfig
from finetune.model import ModelConfig
from finetune.optim import OptimConfig
from finetune.paths import SHIPPED
from finetune.plan import PlanConfig
from finetune.preflight import PreflightConfig
from finetune.quantization import QuantizationConfig
from finetune.quantization.config import DOUBLE, PREQUANTIZED, QAT
from finetune.run import RunSettings
from finetune.sweep import SweepConfig
from finetune.tracking import TrackerConfig
from finetune.train import TrainConfig


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """The configuration of a run. Rules of one group are in that group's package; rules across groups are here."""

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

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yields the settings that have no effect given those of other groups, each with the reason."""
        method = self.quantization.method
        quantizes_export = any(export.format == "bitsandbytes" for export in self.export.values())
        if method != "int8" and not quantizes_export:
            yield "quantization.threshold", f"it is LLM.int8's, and quantization.method={method}"
        if method not in DOUBLE and not quantizes_export:
            yield "quantization.double", f"it is for nf4, fp4 and qat, and quantization.method={method}"

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
        yield from self.train.conflicts(
            rows=self.data.objective,
            variant=self.lora.variant,
            dropout=self.lora.dropout,
            launch=self.launch.strategy,
        )
        method = self.quantization.method
        if method in (PREQUANTIZED, *CALIBRATED):
            yield from self._without_dense_base()
        if method == QAT:
            yield from self._qat_problems()
        if method in ("torchao_int8", "hqq") and self.model.upcast != "none":
            yield (
                f"model.upcast={self.model.upcast} gives float32 inputs, which layers of quantization.method={method} "
                "do not take: set model.upcast=none"
            )
        yield from self._mixture_problems()
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

    def _mixture_problems(self) -> Iterator[str]:
        """Yields what adapters of experts and trained routers do not go with."""
        lora, launch, architecture = self.lora, self.launch.strategy, self.model.architecture
        if architecture is not None:
            has_experts = architecture.experts > 0
            yield from lora.mixture_problems(name=self.model.name, family=architecture.family, has_experts=has_experts)
        if lora.experts == "each" and launch != "single":
            yield (
                "lora.experts=each leaves experts without a gradient that no token of a process reaches, which "
                f"launch={launch} waits for: choose launch=single, or lora.experts=none"
            )
        if lora.experts == "shared" and launch in ("fsdp", "deepspeed"):
            yield (
                f"lora.experts=shared adds layers that launch={launch} does not shard: choose launch=single or ddp, or "
                "lora.experts=none"
            )
        if not lora.routers:
            return
        if launch != "single":
            yield (
                "lora.routers=true balances the tokens of one process's micro-batch, which those of the others may "
                f"not be like; got launch={launch}: choose launch=single, or lora.routers=false"
            )
        if self.train.objective != "sft":
            yield (
                f"lora.routers=true adds its loss to that of train.objective=sft; got {self.train.objective}: set "
                "lora.routers=false"
            )
        if self.merge.adapters:
            yield (
                "merge.adapters adds up low-rank changes, and lora.routers=true trains whole weights: leave "
                "merge.adapters out, or set lora.routers=false"
            )

    def _qat_problems(self) -> Iterator[str]:
        """Yields what the rounded sum of base and adapter does not go with."""
        if self.lora.dropout:
            yield (
                "lora.dropout drops inputs of the adapter alone, and quantization=qat multiplies by one weight, the "
                f"rounded sum; got {self.lora.dropout}: set lora.dropout=0"
            )
        if self.model.upcast == "all":
            yield "model.upcast=all changes the weights that quantization=qat rounds: set model.upcast=norms or none"
        if self.merge.choose == "dequantized":
            yield "merge.choose=dequantized: quantization=qat keeps its base dense; use heldout_loss or original"

    def _without_dense_base(self) -> Iterator[str]:
        """Yields what needs the dense base, where only a quantized one is there or is trained on."""
        method = self.quantization.method
        if self.merge.choose == "original":
            yield f"merge.choose=original needs the unquantized base; with quantization={method}, use fidelity"
        for name, export in self.export.items():
            if export.format == "gguf_lora" or (export.format == "bitsandbytes" and export.dtype != "int8"):
                yield (
                    f"export.{name}: format {export.format} starts from the unquantized base, and "
                    f"quantization={method} has none: export the merged model (safetensors, gguf), or dtype=int8"
                )
