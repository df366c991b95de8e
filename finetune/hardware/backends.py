"""What each way of holding the base can do and where it runs: the one table. `place` decides by it and its errors quote it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One way of holding the base.

    Attributes:
        title: As people write it.
        devices: Where it runs; empty where this version does not run it.
        library: Package that quantizes; also the name of the extra that installs it.
        packing: Weights of so many bits share the loader's own 4-bit or 8-bit layers; 0 where it depends on the settings.
        tunable: Whether an adapter can be trained on it: the tests of its library do.
        reason: Why it does not run.
        instead: What to choose then, as an override.
        source: Where this was seen; GPUs are by the library's documentation, not run here.
    """

    title: str
    devices: tuple[str, ...] = ()
    library: str = ""
    packing: int = 0
    tunable: bool = False
    reason: str = ""
    instead: str = ""
    source: str = ""


LIMITS = {
    "none": Limit(title="unquantized", devices=("cpu", "cuda", "mps"), packing=16, tunable=True, source="run here on CPU"),
    "nf4": Limit(
        title="4-bit NF4", devices=("cpu", "cuda"), library="bitsandbytes", packing=4, tunable=True,
        source="bitsandbytes 0.50.2, run here on CPU",
    ),
    "fp4": Limit(
        title="4-bit FP4", devices=("cpu", "cuda"), library="bitsandbytes", packing=4, tunable=True,
        source="bitsandbytes 0.50.2, run here on CPU",
    ),
    "int8": Limit(
        title="8-bit LLM.int8", devices=("cpu", "cuda"), library="bitsandbytes", packing=8, tunable=True,
        source="bitsandbytes 0.50.2, run here on CPU",
    ),
    "torchao_int8": Limit(
        title="8-bit torchao (weights only)", devices=("cpu", "cuda"), library="torchao", packing=8, tunable=True,
        source="torchao 0.18.0, run here on CPU",
    ),
    "hqq": Limit(
        title="HQQ", devices=("cpu", "cuda"), library="hqq", tunable=True, source="hqq 0.2.8.post1, run here on CPU",
    ),
    "torchao_int4": Limit(
        title="4-bit torchao", library="torchao", packing=4, instead="quantization=nf4_double",
        reason="torchao 0.18 packs 4 bits only for GPUs and with the package mslk, and peft 0.21 tunes none of those layers; on a CPU "
        "it keeps 4 bits in a byte each, which torchao_int8 takes too, with a hundredth of the divergence",
        source="torchao 0.18.0: three of its 4-bit forms raised on CPU, IntxWeightOnly ran; peft/tuners/lora/torchao.py",
    ),
    "qat": Limit(
        title="quantization-aware training", library="torchao", instead="quantization=nf4_double",
        reason="torchao 0.18 rounds a layer's own weight in every pass and not the sum with its adapter, so under LoRA the frozen base is "
        "rounded once for all, as by any method here, and the merged model is rounded anew",
        source="torchao 0.18.0, torchao/quantization/qat/linear.py; LoRA over its layers ran on CPU, at the loss of plain 4-bit rounding",
    ),
    "gptq": Limit(
        title="GPTQ", library="gptqmodel", packing=4, instead="quantization=nf4_double",
        reason="gptqmodel 7.7 asks for torch 2.14 where this version is tested with 2.13, compiles its kernels with g++ at the first "
        "load, three of its CPU layers cut gradients off after an evaluation, and transformers saves them as noise",
        source="gptqmodel 7.7.0, run on CPU in an environment of its own",
    ),
    "awq": Limit(
        title="AWQ", library="gptqmodel", packing=4, instead="quantization=nf4_double",
        reason="transformers 5 loads it through gptqmodel 7.7 alone, which asks for torch 2.14 where this version is tested with 2.13, "
        "and peft cannot merge it",
        source="gptqmodel 7.7.0, run on CPU in an environment of its own",
    ),
    "gguf": Limit(
        title="GGUF", library="gguf", instead="model.name=<file>.gguf with any other quantization",
        reason="a GGUF file is a base to start from, made dense once, and a form to export to (export=gguf_q4_k_m); transformers 5.23 "
        "computes with its blocks only by a kernel from the hub, and calls such a model not trainable",
        source="transformers 5.23.0, quantizers/quantizer_gguf.py; gguf 0.19.0, run here on CPU",
    ),
}  # fmt: skip

DEVICES = {
    "cpu": "yes, run in the tests",
    "cuda": "by its documentation, not run here",
    "mps": "by its documentation, not run here",
}
"""What is known of a method that runs on a device."""


def runnable(device: str) -> list[str]:
    """Methods that run on a device."""
    return [name for name, limit in LIMITS.items() if device in limit.devices]


def refusal(method: str) -> str:
    """Why a method does not run in this version, and what to choose; empty for one that does."""
    limit = LIMITS[method]
    return f"quantization.method={method} does not run: {limit.reason}; choose {limit.instead}" if limit.reason else ""


def markdown() -> tuple[str, str]:
    """The tables of README.md and docs/choosing.md: where each method runs, and why the others do not."""
    runs = [
        f"| `quantization={name}` ({limit.title}) | "
        + " | ".join(DEVICES[device] if device in limit.devices else "no" for device in DEVICES) + " |"
        for name, limit in LIMITS.items() if limit.devices
    ]  # fmt: skip
    rest = [f"| `{name}` | {limit.reason} | `{limit.instead}` |" for name, limit in LIMITS.items() if limit.reason]
    return "\n".join(runs), "\n".join(rest)
