"""Converts published figures to inputs of the closed form, from stated and implied conditions of each row."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import other_trainers as trainers
from finetune.architecture import ArchitectureConfig
from finetune.parameters import parameters
from finetune.plan import phases, weights
from finetune.plan.inputs import ALL_LINEAR, PlanInputs, TrainerMemoryModel

UNITS = {"TB": 1e12, "GiB": 1024**3, "GB": 1e9, "MiB": 1024**2, "MB": 1e6}
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int4": 0.5}
"""Bytes per parameter, by the names that accelerate's tables use."""

TRAINABLE = re.compile(r"nf4|fp4|int4|int8|hqq|[2348]-?bit")
NOT_TRAINABLE = re.compile(r"gptq|awq|aqlm|fp8|float8")
"""Patterns of quantizations that can be trained on here, and of those that cannot."""

GIB = 1024**3
QLORA_RANK = 64
"""Rank where a source of QLoRA's authors states none, with every linear layer adapted: their script's defaults."""

CORRECTED_GPUS = ("T4", "A10G", "L4")
"""GPUs whose error correction takes a sixteenth of the memory: nvidia-smi lists 15,360 MiB on a T4 sold with
16 GB."""

SHORTEST_TOKENS = 512
"""Length where a source states none: half of what issue trackers call a short row; stated in the output as
unknown."""

ALIASES = {
    "llama-7b": "llama1_7b", "llama-13b": "llama1_13b", "llama-33b": "llama1_33b", "llama-65b": "llama1_65b",
    "guanaco-7b": "llama1_7b", "guanaco-13b": "llama1_13b", "guanaco-33b": "llama1_33b", "guanaco-65b": "llama1_65b",
    "phi-1.5": "phi15", "stablelm": "stablelm_alpha_3b", "tiny-llama": "tinyllama_11b", "phi-3-mini": "phi3_mini",
    "phi-2": "phi2",
}  # fmt: skip

TARGETS = {
    "query+value": ("q_proj", "v_proj"),
    "query+key+value+projection+mlp+head": (ALL_LINEAR, "head"),
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A published row and the closed form's figure.

    Attributes:
        row: Its id.
        source: Where it was published, without the commit.
        planned_bytes: The closed form's figure for what the source measured.
        reported_bytes: The published figure; None where the row is a verdict only.
        fits: The published verdict; None where there is none.
        planned_fits: The closed form's verdict on the same device.
        known: Whether the source states every condition.
        libraries: Of both figures, what a process with the libraries and nothing else takes: planned and measured.
    """

    row: int
    source: str
    planned_bytes: float
    reported_bytes: float | None
    fits: bool | None
    planned_fits: bool | None
    known: bool
    libraries: tuple[float, float] = (0.0, 0.0)

    @property
    def error(self) -> float | None:
        return None if not self.reported_bytes else abs(self.planned_bytes - self.reported_bytes) / self.reported_bytes

    @property
    def error_without_libraries(self) -> float | None:
        """Returns the error without the libraries, which hide the error of a small model."""
        if not self.reported_bytes or not self.libraries[1]:
            return None
        planned, reported = self.planned_bytes - self.libraries[0], self.reported_bytes - self.libraries[1]
        return abs(planned - reported) / reported


def unplanned(row: Mapping[str, Any]) -> str | None:
    """Explains why the closed form has no figure for a row; None where it has one."""
    missing = [key for key in ("id", "source", "model", "method", "kind", "reported", "unit") if key not in row]
    if missing:
        return f"{' and '.join(missing)} missing"
    if row["reported"] is not None and row["unit"] not in UNITS:
        return f"unit {row['unit']} is none of {', '.join(UNITS)}"
    quantisation = row.get("quantisation")
    if row["method"] == "load only":
        return (
            None
            if row.get("params_b") and quantisation in DTYPE_BYTES
            else f"a model of {row.get('params_b')} B in {quantisation}"
        )
    known = not quantisation or (
        TRAINABLE.search(quantisation.lower()) and not NOT_TRAINABLE.search(quantisation.lower())
    )
    return (
        None
        if known or row["method"].startswith("full")
        else f"quantisation {quantisation} is not one that trains here"
    )


def compare_run(row: Mapping[str, Any], inputs: PlanInputs) -> Comparison:
    """Compares a training measured here: its process's resident memory, which the plan predicts for a CPU."""
    return Comparison(
        row=row["id"],
        source=_source(row),
        planned_bytes=phases.step_peak(inputs),
        reported_bytes=row["reported"] * _unit(row),
        fits=None,
        planned_fits=None,
        known=not row["unknown_conditions"],
        libraries=(phases.framework_bytes(inputs), row["libraries"] * _unit(row)),
    )


def compare(row: Mapping[str, Any], architectures: Mapping[str, ArchitectureConfig]) -> Comparison:
    """Plans what the row describes and measures it as the row's source did."""
    planned = _planned(row, architectures)
    verdict = row["fits"] if row.get("fits") is not None and _device_bytes(row) else None
    is_figure = (
        row["reported"] is not None and row["kind"] not in ("fits", "OOM") and not row["kind"].startswith("max seq_len")
    )
    inputs = _inputs(row, architectures)
    needed = phases.step_peak(inputs) - phases.allocator_bytes(inputs)
    room = _device_bytes(row) * phases.USABLE_SHARE
    return Comparison(
        row=row["id"],
        source=_source(row),
        planned_bytes=planned,
        reported_bytes=row["reported"] * _unit(row) if is_figure else None,
        fits=verdict,
        planned_fits=needed <= room if verdict is not None else None,
        known=row.get("unknown_conditions") == [],
    )


def _planned(row: Mapping[str, Any], architectures: Mapping[str, ArchitectureConfig]) -> float:
    if row["method"] == "load only":
        return row["params_b"] * 1e9 * DTYPE_BYTES[row["quantisation"]]
    inputs = _inputs(row, architectures)
    by_phase = phases.device_phases(inputs)
    framework = phases.framework_bytes(inputs)
    kind = row["kind"]
    if "base model only" in kind or "as deployed" in kind:
        adapter = weights.adapter_bytes(inputs) if "deployed" in kind else 0
        return weights.weight_bytes(inputs).total + adapter
    if "between steps" in kind:  # before zero_grad: full fine-tuning shows 8 bytes a parameter, so gradients are alive
        return phases.total(by_phase["save"]) - framework + weights.gradient_bytes(inputs)
    peak = phases.step_peak(inputs)
    if kind == "per GPU":
        return peak
    return peak - framework - (0 if "reserved" in kind else phases.allocator_bytes(inputs))


def _inputs(row: Mapping[str, Any], architectures: Mapping[str, ArchitectureConfig]) -> PlanInputs:
    source, full = row["source"], row["method"].startswith("full")
    architecture = find_architecture(row["model"], row.get("params_b") or 0, architectures)
    method, double = _quantization(row)
    trainer = _trainer(row, method)
    if trainer.one_qkv_branch:  # litgpt names query and value apart although they are one layer
        architecture = dataclasses.replace(architecture, fused_qkv=False)
    pure = any(name in source for name in ("litgpt", "fsdp_qlora", "torchtune", "prime-rl"))
    strategy = (row.get("sharding") or "single").split()[0]
    return PlanInputs(
        architecture=architecture,
        method=method,
        double=double,
        bits=_bits(row),
        rank=0
        if full
        else row.get("lora_rank") or (QLORA_RANK if "1b4d85d9" in source else 8),  # that post announces QLoRA
        targets=_targets(row),
        adapter_bytes=2 if pure or "axolotl" in source else 4,
        dropout=any(name in source for name in ("litgpt", "fsdp_qlora", "peft", "QLoRA")),
        upcast="all" if any(name in source for name in ("QLoRA", "1b4d85d9")) else "none",
        stored_bytes=4
        if "mixed" in row["method"] or "prime-rl" in source
        else 2,  # prime-rl: optimization_dtype float32
        cast_copy="mixed" in row["method"],
        rows=row.get("batch_per_gpu")
        or (8 if strategy == "zero3" and "peft" in source else 1),  # PEFT's DeepSpeed guide: batch size 8
        tokens=row.get("seq_len") or SHORTEST_TOKENS,
        checkpointing=bool(row.get("gradient_checkpointing"))
        if row.get("gradient_checkpointing") is not None
        else True,
        attention="eager" if architecture.softcap or "1b4d85d9" in source else "fused",
        optimizer=_optimizer(row),
        strategy=strategy if strategy != "single" or (row.get("n_gpus") or 1) == 1 else "fsdp",
        processes=row.get("n_gpus") or 1,
        offload=bool(row.get("cpu_offload")),
        accumulates="litgpt" in source or "1b4d85d9" in source,  # its table: 4 steps
        trainer=trainer,
    )


def _trainer(row: Mapping[str, Any], method: str) -> TrainerMemoryModel:
    source, quantized = row["source"], method != "none"
    if "litgpt" in source:
        if "resource-tables" in source:
            return trainers.LITGPT_2023_QUANTIZED if quantized else trainers.LITGPT_2023
        return trainers.LITGPT_QUANTIZED if quantized else trainers.LITGPT
    if "fsdp_qlora" in source:
        return trainers.TRANSFORMERS_HELD
    if "torchtune" in source:
        return trainers.TORCHTUNE
    if "prime-rl" in source or "axolotl" in source:
        return trainers.FUSED_LOSS
    return trainers.TRANSFORMERS


def _quantization(row: Mapping[str, Any]) -> tuple[str, bool]:
    text = (row.get("quantisation") or "").lower()
    if row["method"].startswith("full") or not text:
        return "none", False
    if "int8" in text or "8-bit" in text:
        return "int8", False
    if "hqq" in text or _bits(row) < 4:
        return "hqq", False
    stated = row.get("double_quant")
    # bitsandbytes.nn.Linear4bit compresses its statistics unless told otherwise, and fsdp_qlora does not tell it.
    double = stated if stated is not None else "double" in text or "-dq" in text or "fsdp_qlora" in row["source"]
    return ("fp4" if "fp4" in text else "nf4"), bool(double)


def _bits(row: Mapping[str, Any]) -> int:
    """bitsandbytes knows no 2 and 3 bits; LLaMA-Factory names HQQ for them, which needs no calibration."""
    match = re.match(r"([23])-?bit", row.get("quantisation") or "")
    return int(match.group(1)) if match else 4


def _targets(row: Mapping[str, Any]) -> tuple[str, ...]:
    text = row.get("lora_targets")
    if isinstance(text, str) and text.startswith("["):
        return tuple(re.findall(r"\w+_proj", text))
    if isinstance(text, list):
        return tuple(text)
    for name, targets in TARGETS.items():
        if text and text.split(" (")[0] == name:
            return targets
    if text and text.startswith("q_proj,v_proj"):
        return ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "head")
    return (ALL_LINEAR,)


def _optimizer(row: Mapping[str, Any]) -> str:
    text = (row.get("optimizer") or "AdamW").lower()
    if "8bit" in text:
        return "adamw_8bit"
    if "torchtune" in row["source"] or "estimate" in row["kind"]:  # torchtune's recipes say fused: True
        return "adamw_torch_fused"
    if "paged" in text or ("litgpt" in row["source"] and _quantization(row)[0] != "none"):
        return "paged_adamw_32bit"
    return "adamw_torch"


def find_architecture(
    name: str, billions: float, architectures: Mapping[str, ArchitectureConfig]
) -> ArchitectureConfig:
    """Returns the named model's dimensions, or those of the nearest model with layers added to match its size."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower().removesuffix("-instruct"))
    for alias, key in ALIASES.items():
        if name.lower().startswith(alias):
            return architectures[key]
    for key, architecture in architectures.items():
        if re.sub(r"[^a-z0-9]", "", key) in (plain, plain.removesuffix("v02"), plain + "v03", plain.replace("hf", "")):
            return architecture
    dense = [a for a in architectures.values() if not a.experts and not a.softcap]
    nearest = min(dense, key=lambda a: abs(parameters(a) - billions * 1e9))
    per_layer = (parameters(nearest) - parameters(dataclasses.replace(nearest, layers=1))) / (nearest.layers - 1)
    missing = (billions * 1e9 - parameters(nearest)) / per_layer
    return dataclasses.replace(nearest, layers=max(1, nearest.layers + round(missing)))


def _device_bytes(row: Mapping[str, Any]) -> float:
    """Returns the memory of the row's GPU: the number in its name, less what error correction takes."""
    name = row.get("gpu") or ""
    match = re.search(r"(\d+) ?GB", name)
    corrected = any(re.search(rf"\b{gpu}\b", name) for gpu in CORRECTED_GPUS)
    return int(match.group(1)) * GIB * (15 / 16 if corrected else 1) if match else 0.0


def _unit(row: Mapping[str, Any]) -> float:
    """accelerate's tables say MB and count in 1,024s. Source: accelerate/commands/estimate.py, ``convert_bytes``."""
    return UNITS["MiB"] if "accelerate" in row["source"] and row["unit"] == "MB" else UNITS[row["unit"]]


def _source(row: Mapping[str, Any]) -> str:
    return re.sub(r" @ [0-9a-f]+.*", "", row["source"]).removeprefix("github ").split(" (")[0].split(",")[0]
