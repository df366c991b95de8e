"""The methods that `finetune bench quantization` measures: options of the quantization group, exports, and int8 layers.

names = choose_methods(["nf4", "gguf_q4_0"])
reason = obstacle("qat")  # empty where it runs
"""

from __future__ import annotations

from finetune.config.overrides import group_options
from finetune.errors import ConfigError
from finetune.export.config import GGUF_DTYPES
from finetune.export.needs import missing_packages
from finetune.hardware.backends import BACKENDS, CALIBRATED, obstacle_on_dense_base
from finetune.paths import CONF

FP8 = "fp8"
GGUF = {f"gguf_{dtype}": dtype for dtype in GGUF_DTYPES}
ONNX = {"onnx": "float32", **{f"onnx_{dtype}": dtype for dtype in ("int8", "int4", "int8_dynamic")}}
W8A8 = ("w8a8_dynamic", "w8a8_static", "w8a8_smoothquant")
EXPORTS = (FP8, *GGUF, *ONNX)
"""Named as in the export group."""

CALIBRATES = (*CALIBRATED, *W8A8[1:])
"""Methods that read training rows."""


def choose_methods(wanted: list[str]) -> list[str]:
    """Returns the named methods, or all of them.

    Raises:
        ConfigError: There is no such method.
    """
    known = [*group_options("quantization", [CONF]), *EXPORTS, *W8A8]
    unknown = ", ".join(sorted(set(wanted) - set(known)))
    if unknown:
        raise ConfigError(f"bench quantization: {unknown} is not a method; choose from {', '.join(known)}")
    return list(dict.fromkeys(wanted)) or known


def option_of(method: str) -> str:
    """Returns the option of the quantization group that a method's model is loaded with before anything else."""
    return method if method in group_options("quantization", [CONF]) else "none"


def obstacle(method: str) -> str:
    """Explains why a method does not run on a dense base, or here; empty where it does."""
    kind = "gguf" if method in GGUF else "onnx" if method in ONNX else method
    if missing := missing_packages(kind):
        return f"it {missing}"
    return "" if method in CALIBRATED else obstacle_on_dense_base(method, trained=False)


def libraries(method: str) -> tuple[str, ...]:
    """Returns the packages besides torch and transformers that decide a method's result."""
    if method in GGUF:
        return ("gguf", "xllamacpp")
    if method in ONNX:
        return ("onnx", "onnxruntime")
    library = BACKENDS[method].library if method in BACKENDS else ""
    library = library or ("bitsandbytes" if method == "nf4_double" else "")
    return (library.replace("_", "-"),) if library else ()


def runtime_of(method: str) -> str:
    """Returns whose kernels compute the products."""
    if method in GGUF:
        return "llama.cpp"
    if method in ONNX:
        return "ONNX Runtime"
    return "torch" if method in CALIBRATED or not libraries(method) else libraries(method)[0]
