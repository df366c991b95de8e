"""The one table of quantization methods: what each can do and where it runs. `place` decides by it, and error messages
quote it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BackendSupport:
    """Support for one quantization method.

    Attributes:
        title: Name as people write it.
        devices: Where it runs; empty where this version does not run it.
        library: Package that quantizes; also the name of the extra that installs it.
        tunable: Whether an adapter can be trained on it, as the tests of its library do.
        reason: Why it does not run.
        alternative: Override to choose instead.
        source: Version and place where this was observed; for GPUs it is the library's documentation, not run here.
    """

    title: str
    devices: tuple[str, ...] = ()
    library: str = ""
    tunable: bool = False
    reason: str = ""
    alternative: str = ""
    source: str = ""


CPU_AND_CUDA = ("cpu", "cuda")
BITSANDBYTES = "bitsandbytes 0.50.2, run here on CPU"
AUTOROUND = "auto-round 0.16.1, and finetune/quantization/packed_linear.py, run here on CPU"
CALIBRATED = ("gptq", "awq")
"""Methods that a run makes from a dense base and its own training rows, and then trains on as ``prequantized``."""

BACKENDS = {
    "none": BackendSupport(title="unquantized", devices=("cpu", "cuda", "mps"), tunable=True, source="run here on CPU"),
    "nf4": BackendSupport(
        title="4-bit NF4", devices=CPU_AND_CUDA, library="bitsandbytes", tunable=True, source=BITSANDBYTES
    ),
    "fp4": BackendSupport(
        title="4-bit FP4", devices=CPU_AND_CUDA, library="bitsandbytes", tunable=True, source=BITSANDBYTES
    ),
    "int8": BackendSupport(
        title="8-bit LLM.int8", devices=CPU_AND_CUDA, library="bitsandbytes", tunable=True, source=BITSANDBYTES
    ),
    "torchao_int8": BackendSupport(
        title="8-bit torchao (weights only)",
        devices=CPU_AND_CUDA,
        library="torchao",
        tunable=True,
        source="torchao 0.18.0, run here on CPU",
    ),
    "hqq": BackendSupport(
        title="HQQ", devices=CPU_AND_CUDA, library="hqq", tunable=True, source="hqq 0.2.8.post1, run here on CPU"
    ),
    "prequantized": BackendSupport(
        title="as the base is stored: GPTQ, AWQ, compressed-tensors, FP8, bitsandbytes",
        devices=CPU_AND_CUDA,
        tunable=True,
        source="finetune/quantization/packed_linear.py, run here on CPU",
    ),
    "gptq": BackendSupport(
        title="4 bits in GPTQ's format, calibrated on the training rows",
        devices=CPU_AND_CUDA,
        library="auto_round",
        tunable=True,
        source=AUTOROUND,
    ),
    "awq": BackendSupport(
        title="AWQ, calibrated on the training rows",
        devices=CPU_AND_CUDA,
        library="auto_round",
        tunable=True,
        source=AUTOROUND,
    ),
    "torchao_int4": BackendSupport(
        title="4-bit torchao",
        library="torchao",
        alternative="quantization=nf4_double",
        reason="torchao 0.18 packs 4 bits only for GPUs and with the package mslk, and peft 0.21 trains no adapter on "
        "those layers; "
        "on a CPU it stores 4 bits in a byte each, as much as torchao_int8 needs at a hundredth of the divergence",
        source="torchao 0.18.0: three of its 4-bit forms raised on CPU, IntxWeightOnly ran; "
        "peft/tuners/lora/torchao.py",
    ),
    "qat": BackendSupport(
        title="quantization-aware NF4",
        devices=CPU_AND_CUDA,
        library="bitsandbytes",
        tunable=True,
        source="finetune/quantization/qat.py with bitsandbytes 0.50.2, run here on CPU",
    ),
    "gguf": BackendSupport(
        title="GGUF",
        library="gguf",
        alternative="model.name=<file>.gguf with any other quantization",
        reason="a GGUF file is a base to start from, dequantized once, and a format to export to "
        "(export=gguf_q4_k_m); transformers "
        "5.23 computes with its blocks only through a kernel from the hub, and calls such a model not trainable",
        source="transformers 5.23.0, quantizers/quantizer_gguf.py; gguf 0.19.0, run here on CPU",
    ),
}

SUPPORT = {
    "cpu": "yes, run in the tests",
    "cuda": "by its documentation, not run here",
    "mps": "by its documentation, not run here",
}
"""How support on each device is known."""


def methods_for(device: str) -> list[str]:
    """Returns the methods that run on a device."""
    return [name for name, backend in BACKENDS.items() if device in backend.devices]


def unsupported_reason(method: str) -> str:
    """Explains why a method does not run in this version and what to choose; empty for a method that runs."""
    backend = BACKENDS[method]
    if not backend.reason:
        return ""
    return f"quantization.method={method} does not run: {backend.reason}; choose {backend.alternative}"


def obstacle_on_dense_base(name: str, *, trained: bool) -> str:
    """Explains why an option of the quantization group cannot be measured on a dense base; empty where it can.

    Args:
        name: The option.
        trained: Whether an adapter is trained on it.
    """
    if name == "qat" and not trained:
        return "it rounds the sum of base and adapter while one is trained; the base alone is that of nf4"
    if name == "prequantized":
        return "it is how a base is stored, and this one is dense (docs/quantized-bases.md)"
    if name in CALIBRATED:
        return "it is calibrated on the training rows of a run, and made there (docs/quantized-bases.md)"
    return BACKENDS[name].reason if name in BACKENDS else ""


def markdown() -> tuple[str, str]:
    """Builds the tables of README.md and docs/choosing.md: where each method runs, and why the others do not."""
    supported, unsupported = [], []
    for name, backend in BACKENDS.items():
        if backend.devices:
            cells = [SUPPORT[device] if device in backend.devices else "no" for device in SUPPORT]
            supported.append(f"| {' | '.join([f'`quantization={name}` ({backend.title})', *cells])} |")
        else:
            unsupported.append(f"| `{name}` | {backend.reason} | `{backend.alternative}` |")
    return "\n".join(supported), "\n".join(unsupported)
