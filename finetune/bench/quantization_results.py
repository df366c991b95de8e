"""The figures of `finetune bench quantization`: one result for each method, and how they are printed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from finetune.bench.quantization_methods import runtime_of
from finetune.bench.task import change_figures
from finetune.console import change_text, human_bytes, log, table

REFERENCE = "full precision"
RESAMPLES = 2000
HEADER = ("method", "bits", "disk", "memory", "make, load: s", "perplexity", "loss against float32", "KL", "top-1")


@dataclass(frozen=True, kw_only=True)
class QuantizationResult:
    """Measurements of one method.

    Attributes:
        backend: Its name: of an option of the quantization group, of an export, or of int8 layers.
        status: ``measured``, or ``not run:`` and why.
        runtime: Whose kernels compute the products.
        bits_per_parameter: Bits of the linear layers' weights and constants, per weight. The head is left out, except
            in ONNX, where it is a matrix like the others.
        disk_bytes, memory_bytes, constant_bytes: Of the files, None where there are none; of all tensors; of scales and
            zero points alone, 0 where they are inside the blocks (GGUF).
        make_seconds: To make it of the base in 16 bits and to write it, in a fresh process.
        load_seconds: To load what was written; None where nothing is.
        perplexity, kl, top1_agreement: On the text; the last two against float32.
        loss_change: Nats per token against float32, with its 95 % interval over rows.
        prefill_tokens_per_second, decode_tokens_per_second: By batch size.
        task: The task's metric on held-out answers, with its 95 % interval; empty without a task.
        humaneval: pass@1 of greedy programs with its 95 % interval over problems; empty without problems.
        humaneval_at_10: pass@10 of sampled programs, likewise; empty with fewer than ten samples.
        tunable: Whether an adapter can be trained on it, as the tests of its library do.
    """

    backend: str
    status: str
    runtime: str = ""
    bits_per_parameter: float | None = None
    disk_bytes: int | None = None
    memory_bytes: int | None = None
    constant_bytes: int | None = None
    make_seconds: float | None = None
    load_seconds: float | None = None
    perplexity: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    loss_change: dict[str, float] = field(default_factory=dict)
    prefill_tokens_per_second: dict[str, float] = field(default_factory=dict)
    decode_tokens_per_second: dict[str, float] = field(default_factory=dict)
    task: dict[str, float] = field(default_factory=dict)
    humaneval: dict[str, float] = field(default_factory=dict)
    humaneval_at_10: dict[str, float] = field(default_factory=dict)
    tunable: bool | None = None


def summarize(name: str, figures: dict[str, Any], reference: dict[str, Any]) -> QuantizationResult:
    """Builds a result from what the option's process and the reference's process returned."""
    from finetune.inference.bootstrap import Bootstrap, Ratio

    losses, reference_losses = (np.array(process["losses"]) for process in (figures, reference))
    ratio, reference_ratio = (Ratio(totals=side[:, 0], weights=side[:, 1]) for side in (losses, reference_losses))
    change = Bootstrap(len(losses), samples=RESAMPLES, seed=1).difference(reference_ratio, ratio)
    stored = figures["code_bytes"] + figures["constant_bytes"]
    return QuantizationResult(
        backend=name,
        status="measured",
        runtime=runtime_of(name),
        bits_per_parameter=round(8 * stored / figures["weights"], 3),
        disk_bytes=figures["disk_bytes"],
        memory_bytes=figures["memory_bytes"],
        constant_bytes=figures["constant_bytes"],
        make_seconds=figures["make_seconds"],
        load_seconds=figures["load_seconds"],
        perplexity=round(math.exp(ratio.value), 3),
        kl=round(figures["agreement"]["kl"], 5),
        top1_agreement=round(figures["agreement"]["top1_agreement"], 4),
        loss_change=change_figures(change),
        prefill_tokens_per_second=figures["prefill"],
        decode_tokens_per_second=figures["decode"],
        task=_level(figures["scores"]),
        humaneval=_pass_at(1, figures["humaneval"]),
        humaneval_at_10=_pass_at(10, figures["humaneval_sampled"]),
        tunable=figures["tunable"],
    )


def _level(scores: list[float]) -> dict[str, float]:
    from finetune.inference.bootstrap import Bootstrap, mean_of

    if not scores:
        return {}
    return asdict(Bootstrap(len(scores), samples=RESAMPLES, seed=1).level(mean_of(scores)))


def _pass_at(k: int, figures: dict[str, float]) -> dict[str, float]:
    """Returns value, interval and counts of pass@k; empty where it was not measured."""
    name = f"pass_at_{k}"
    if name not in figures:
        return {}
    interval = {"value": figures[name], "low": figures[f"{name}_low"], "high": figures[f"{name}_high"]}
    return interval | {key: figures[key] for key in ("problems", "samples")}


def show(results: list[QuantizationResult], reference: dict[str, Any]) -> None:
    """Prints the table."""
    total, tokens = (sum(row[column] for row in reference["losses"]) for column in (0, 1))
    log("bench", f"float32: perplexity {math.exp(total / tokens):.2f}")
    table("bench", HEADER, [cells(result)[: len(HEADER)] for result in results if result.status == "measured"])
    log("bench", *[f"{result.backend}: {result.status}" for result in results if result.status != "measured"])


def cells(result: QuantizationResult) -> list[str]:
    """Formats a measured method's figures."""
    return [
        result.backend,
        f"{result.bits_per_parameter:.3f}",
        "no file" if result.disk_bytes is None else human_bytes(result.disk_bytes),
        human_bytes(result.memory_bytes or 0),
        f"{result.make_seconds:.1f}, {'-' if result.load_seconds is None else f'{result.load_seconds:.1f}'}",
        f"{result.perplexity:.2f}",
        change_text(result.loss_change),
        f"{result.kl:.4f}",
        f"{result.top1_agreement:.3f}",
        *[
            ", ".join(f"{speed:.0f}" for speed in speeds.values()) or "not measured"
            for speeds in (result.prefill_tokens_per_second, result.decode_tokens_per_second)
        ],
        *[_interval(level) for level in (result.task, result.humaneval, result.humaneval_at_10)],
        "yes" if result.tunable else "no",
        result.runtime,
    ]


def _interval(level: dict[str, float]) -> str:
    return f"{level['value']:.2f} [{level['low']:.2f}, {level['high']:.2f}]" if level else "not measured"
