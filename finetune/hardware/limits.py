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
        title="4-bit torchao", library="torchao", packing=4, instead="quantization=hqq",
        reason="torchao 0.18 packs 4 bits only with the package mslk on a GPU, and peft 0.21 tunes none but its 8-bit layers",
        source="torchao 0.18.0: Int4WeightOnly raised on CPU; peft/tuners/lora/torchao.py",
    ),
    "qat": Limit(
        title="quantization-aware training", library="torchao", instead="quantization=nf4_double",
        reason="it trains the base's own weights under rounding, and here the base is frozen: rounding a frozen base is what the other "
        "methods do already",
        source="torchao 0.18.0, torchao/quantization/qat",
    ),
    "gptq": Limit(
        title="GPTQ", library="gptqmodel", packing=4, instead="quantization=hqq",
        reason="gptqmodel 7.7 asks for torch 2.14 where this version is tested with 2.13, compiles its kernels with g++ at the first "
        "load, and its default CPU layer refuses training",
        source="gptqmodel 7.7.0, run on CPU in an environment of its own",
    ),
    "awq": Limit(
        title="AWQ", library="gptqmodel", packing=4, instead="quantization=hqq",
        reason="transformers 5 loads it through gptqmodel 7.7 alone, which asks for torch 2.14 where this version is tested with 2.13, "
        "and it cannot be merged",
        source="gptqmodel 7.7.0, run on CPU in an environment of its own",
    ),
    "gguf": Limit(
        title="GGUF", library="gguf", instead="model.name=<file>.gguf with any other quantization",
        reason="a GGUF file is a base to start from, whose blocks are made dense once, and a form to export to (export=gguf_q4_k_m); "
        "no adapter trains on its blocks",
        source="transformers 5.23.0, gguf 0.19.0, run here on CPU",
    ),
}  # fmt: skip


def runnable(device: str) -> list[str]:
    """Methods that run on a device."""
    return [name for name, limit in LIMITS.items() if device in limit.devices]
