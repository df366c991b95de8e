"""The plan group, and the conversion of a composed configuration to `PlanInputs`, ``auto`` resolved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.architecture import ArchitectureConfig
from finetune.errors import ModelError
from finetune.hardware.backends import CALIBRATED
from finetune.hardware.place import choose_dtype, used_gpus
from finetune.kernels.choose import KernelFacts, choose
from finetune.kernels.forms import DOCUMENT_FAMILIES, FUSED_FAMILIES
from finetune.model import hub
from finetune.model.base import dimensions, files_here, is_gguf
from finetune.objectives import OBJECTIVES
from finetune.parameters import linear_layers, linear_parameters
from finetune.plan.fit import fit_step
from finetune.plan.inputs import KernelChoice, PlanInputs, TrainerMemoryModel
from finetune.quantization.autoround import BITS
from finetune.quantization.checkpoint_format import SCALE_BYTES
from finetune.quantization.config import PREQUANTIZED
from finetune.quantization.packed_checkpoint import required_format

if TYPE_CHECKING:
    from finetune.config import RunConfig
    from finetune.hardware import Machine

MIB = 1024**2
DEQUANTIZED_AT_USE = ("nf4", "fp4", PREQUANTIZED)
"""Methods whose layers `finetune.kernels` fuses: they multiply by the dense weight."""

MIXING_FAMILIES = ("granitemoehybrid",)
"""Families whose attention mask ignores where a document begins, in transformers 5.23."""

CAPPED_FAMILIES = ("gemma4_text", "gemma4_unified_text")
"""Families that change their logits in a way that `finetune.kernels` does not compute; TRL computes head and loss."""


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """Selects what the plan shows besides memory and time."""

    fit: bool = False
    """Also proposes the settings that fit the hardware and train fastest, as overrides to paste."""

    exact: bool = False
    """Also counts a step of the real modelling code tensor by tensor, on tensors without contents; takes half a
    minute."""

    def problems(self) -> Iterator[str]:
        """Yields nothing: every combination is valid."""
        return iter(())


def from_config(config: RunConfig, machine: Machine) -> PlanInputs:
    """Converts a composed configuration; ``auto`` becomes what fits the machine and trains fastest.

    Raises:
        ModelError: ``model.architecture`` is null, and the model's own config.json cannot be had or read.
    """
    architecture = dimensions(config.model)
    device = planned_device(config, machine)
    dtype = planned_dtype(config, machine)
    kernels = predict_kernels(config, machine, architecture=architecture, device=device, dtype=dtype)
    objective = OBJECTIVES[config.train.objective]
    quantization = planned_quantization(config, architecture)
    packed_tokens = config.data.pack_tokens if config.data.packing and not objective.compares else None
    sampled = config.train.grpo if objective.samples else None
    tokens = packed_tokens or config.data.max_tokens + (sampled.max_new_tokens if sampled else 0)
    element = 4 if dtype == "float32" else 2
    autocast = not (kernels.fused and kernels.loss_on_trained_tokens) and (
        config.lora.dtype != "bfloat16" or config.model.upcast != "none"
    )
    train = config.train
    inputs = PlanInputs(
        architecture=architecture,
        method=quantization.method,
        double=config.quantization.double,
        keep=quantization.keep,
        keep_bytes=int(config.quantization.skip_modules_mib * MIB),
        bits=quantization.bits,
        group_size=quantization.group_size,
        group_bytes=quantization.group_bytes,
        rank=config.lora.width,
        targets=tuple(config.lora.targets),
        experts=config.lora.experts,
        routers=config.lora.routers,
        adapter_bytes=4 if config.lora.dtype == "float32" else 2,
        dropout=config.lora.dropout > 0,
        compute_bytes=element,
        stored_bytes=element,
        upcast=config.model.upcast,
        rows=1 if "micro_batch" in train.automatic else train.micro_batch_rows,
        documents=2 if objective.pairs else 1,
        extra_passes=objective.passes_without_gradient(config.train.preference.loss),
        tokens=tokens,
        step_rows=(train.rows_per_step or max(1, (train.tokens_per_step or tokens) // tokens))
        * (sampled.group if sampled else 1),
        checkpointing=train.recomputes or "checkpointing" in train.automatic,
        offload_activations=train.checkpointing == "offloaded",
        attention="eager" if config.model.attention == "eager" else "fused",
        optimizer=config.optim.name,
        strategy="zero3" if config.launch.strategy == "deepspeed" else config.launch.strategy,
        processes=config.launch.processes,
        offload=config.launch.offload,
        device=device,
        sampled_rows=min(sampled.batch_rows, (train.rows_per_step or 1) * sampled.group) if sampled else 0,
        sampled_tokens=sampled.max_new_tokens if sampled else 0,
        answers=config.eval.rows,
        answer_rows=config.eval.fixed_rows or 0,
        answer_tokens=config.eval.max_new_tokens,
        prompt_tokens=config.data.max_tokens,
        measured_rows=config.eval.loss_rows,
        measured_tokens=max(config.eval.batch_tokens, config.merge.batch_tokens),
        needs_base=not config.eval.may_leave_out_base,
        kernels=kernels,
        trainer=TrainerMemoryModel(reduced_input_copies=autocast),
    )
    return fit_step(inputs, machine, choose=train.automatic) if train.automatic else inputs


@dataclass(frozen=True, kw_only=True)
class PlannedQuantization:
    """How the linear layers are stored; the attributes are those of `PlanInputs`."""

    method: str
    bits: int
    group_size: int
    group_bytes: float = 0
    keep: tuple[str, ...]


def planned_quantization(config: RunConfig, architecture: ArchitectureConfig) -> PlannedQuantization:
    """Returns how the base will be stored: as the configuration names it, or as a prequantized base's config.json does.

    Raises:
        ModelError: The base is not stored quantized, its config.json cannot be had, or its form cannot be read.
    """
    settings = config.quantization
    if settings.method in CALIBRATED:
        zeros = BITS / 8  # one a group, stored also where it is always the middle
        return PlannedQuantization(
            method=PREQUANTIZED,
            bits=BITS,
            group_size=settings.group_size,
            group_bytes=SCALE_BYTES + zeros,
            keep=(),
        )
    if settings.method != PREQUANTIZED:
        return PlannedQuantization(
            method=settings.method,
            bits=settings.bits,
            group_size=settings.group_size,
            keep=tuple(settings.skip_modules),
        )
    if is_gguf(config.model.name):
        raise ModelError(
            "quantization=prequantized: a GGUF file is converted to dense weights; choose quantization=nf4_double"
        )
    stored = required_format(files_here(config.model) or hub.fetch_config(config.model))
    names = [
        f"model.layers.{layer}.{linear.parent}.{linear.name}"
        for linear in linear_layers(architecture)
        for layer in linear.layers
    ]
    return PlannedQuantization(
        method="int8" if stored.is_int8 else PREQUANTIZED,
        bits=stored.bits,
        group_size=stored.group_elements,
        group_bytes=stored.group_bytes,
        keep=tuple(name for name in names if stored.skips(name)),
    )


def predict_kernels(
    config: RunConfig, machine: Machine, *, architecture: ArchitectureConfig, device: str, dtype: str
) -> KernelChoice:
    """Chooses as `finetune.kernels` does, from what the configuration tells; tests compare the two.

    Raises:
        HardwareError: A setting of ``kernels`` other than ``auto`` is not possible.
    """
    lora, family = config.lora, architecture.family
    method = PREQUANTIZED if config.quantization.method in CALIBRATED else config.quantization.method
    upcast = "none" if dtype == "float32" else config.model.upcast
    reasons = {
        "float16 needs loss scaling": dtype == "float16",
        f"layers of {family} cannot be fused": family not in FUSED_FAMILIES,
        "only peft computes lora.variant=dora": lora.variant == "dora",
        f"{method} layers have their own kernels": method not in ("none", *DEQUANTIZED_AT_USE),
        f"model.upcast={upcast} keeps norms in float32": upcast != "none",
        f"launch.strategy={config.launch.strategy} shards the weights": config.launch.strategy not in ("single", "ddp"),
    }
    head_reasons = {
        "float16 needs loss scaling": dtype == "float16",
        f"{family} changes its logits after the head": family in CAPPED_FAMILIES,
        f"model.upcast={upcast} keeps the head in float32": upcast == "all",
        "its routers are trained, with a loss of their own": lora.routers,
    }
    native_reasons = {
        f"they are for a CPU and this run is on {device}": device != "cpu",
        f"they compute in bfloat16 and this run in {dtype}": dtype != "bfloat16",
    }
    document_reasons = {
        f"model.attention={config.model.attention} has its own way": config.model.attention not in ("auto", "sdpa"),
        f"{family} may need more than a window and a scale": family not in DOCUMENT_FAMILIES,
    }
    # All documents lie in one row, packed or not, unless preflight finds that the layers mix them.
    flat = not set(architecture.letters) & set("lc") and family not in MIXING_FAMILIES
    facts = KernelFacts(
        fusion_obstacle=_first_true(reasons),
        quantized=method in DEQUANTIZED_AT_USE,
        dense_bytes=linear_parameters(architecture) * (4 if dtype == "float32" else 2),
        free_bytes=machine.ram_bytes,  # how much will be free then is not known; only a CPU keeps copies
        head_split_obstacle=_first_true(head_reasons),
        native_obstacle=_first_true(native_reasons),
        tiles="amx_bf16" in machine.features and architecture.head_dim % 32 == 0,
        documents_obstacle=_first_true(document_reasons),
    )
    choice = choose(config.kernels, facts, device=device)
    return KernelChoice(
        fused=choice.fused,
        loss_on_trained_tokens=choice.loss_on_trained_tokens,
        native=choice.native,
        tiles=choice.tiles,
        cached=choice.cached and facts.quantized,
        documents=choice.documents and flat,
        flat=flat,
        selective=config.train.checkpointing == "selective",
    )


def _first_true(reasons: dict[str, bool]) -> str | None:
    return next((reason for reason, holds in reasons.items() if holds), None)


def planned_dtype(config: RunConfig, machine: Machine) -> str:
    """Returns the dtype that the run will compute in."""
    device = planned_device(config, machine)
    return choose_dtype(machine, device, config.model.dtype, gpus=used_gpus(machine, config))[0]


def planned_device(config: RunConfig, machine: Machine) -> str:
    """Returns ``cuda`` or ``cpu``; an Apple GPU shares the CPU's memory and is planned as one."""
    if config.hardware.device in ("cpu", "cuda"):
        return config.hardware.device
    return "cuda" if machine.gpus else "cpu"
