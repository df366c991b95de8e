"""The kernels of kernels.cpp, compiled for this very processor on first use and kept in the cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.cache import cache_folder

if TYPE_CHECKING:
    from finetune.kernels.attention import Shape

SOURCES = [Path(__file__).with_name(name) for name in ("numbers.h", "kernels.cpp", "attention.cpp")]
FLAGS = (
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-shared",
    "-fPIC",
)
"""No ``-ffast-math``: a loss that is no number must stay none. Threads are those of torch's own OpenMP, loaded before."""

COMPILE_SECONDS = 60
FUNCTIONS = ("rms_forward", "rms_backward", "swiglu_forward", "swiglu_backward", "cross_entropy")
TILE_WIDTH = 32
"""Numbers of a head must be a multiple of a tile's."""

TILE_FUNCTIONS = ("attention_forward", "attention_backward")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had; `missing` says why."""
    if missing():
        return None
    file = _file()
    if not file.is_file() and not _compile(file):
        return None
    loaded = ctypes.CDLL(str(file))
    for name in (*FUNCTIONS, *(TILE_FUNCTIONS if hasattr(loaded, TILE_FUNCTIONS[0]) else ())):
        getattr(loaded, name).restype = None
    return loaded


@cache
def has_tiles() -> bool:
    """Whether the attention kernels can be used: the processor has AMX, and the operating system lets this process use it."""
    loaded = library()
    return loaded is not None and hasattr(loaded, TILE_FUNCTIONS[0]) and loaded.attention_permission() == 0


def missing() -> str | None:
    """Why this machine cannot have the kernels; None where it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "they are compiled on x86-64 Linux only"
    if _compiler() is None:
        return "there is no C++ compiler (g++)"
    return None


def _compiler() -> str | None:
    return shutil.which("g++")


def _file() -> Path:
    """Named by everything that the machine code depends on; a cache may be shared between machines."""
    compiler = _compiler()
    assert compiler is not None
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    content = "\n".join([*(source.read_text() for source in SOURCES), " ".join(FLAGS), version, flags])
    return cache_folder("kernels") / f"{hashlib.sha256(content.encode()).hexdigest()[:24]}.so"


def _compile(file: Path) -> bool:
    partial = file.with_suffix(f".{os.getpid()}")
    command = [str(_compiler()), *FLAGS, "-o", str(partial), *map(str, SOURCES[1:])]
    try:
        subprocess.run(command, capture_output=True, check=True, timeout=COMPILE_SECONDS)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return False
    os.replace(partial, file)
    return True


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _library() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None
    return loaded


def _whole(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def rms_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `plain.rms_forward`."""
    y, rstd = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32)
    _library().rms_forward(
        _at(x), _at(weight), _at(y), _at(rstd), _whole(rstd.numel()), _whole(x.shape[-1]), ctypes.c_float(eps)
    )  # fmt: skip
    return y, rstd


def rms_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """See `plain.rms_backward`."""
    dx = torch.empty_like(x)
    _library().rms_backward(_at(dy), _at(x), _at(weight), _at(rstd), _at(dx), _whole(rstd.numel()), _whole(x.shape[-1]))
    return dx


def swiglu_forward(both: Tensor) -> Tensor:
    """See `plain.swiglu_forward`."""
    rows, width = both.shape[0], both.shape[1] // 2
    out = both.new_empty((rows, width))
    _library().swiglu_forward(_at(both), _at(out), _whole(rows), _whole(width))
    return out


def swiglu_backward(dy: Tensor, both: Tensor) -> Tensor:
    """See `plain.swiglu_backward`."""
    d_both = torch.empty_like(both)
    _library().swiglu_backward(_at(dy), _at(both), _at(d_both), _whole(both.shape[0]), _whole(both.shape[1] // 2))
    return d_both


def attention_forward(
    joint: Tensor, cosine: Tensor, sine: Tensor, borders: Tensor, shape: Shape
) -> tuple[Tensor, Tensor]:
    """Rotary positions and causal attention of each document.

    Args:
        joint: q, k and v side by side, bfloat16, shape (tokens, (heads + 2 key_heads) width).
        cosine: bfloat16, shape (tokens, width); so is ``sine``.
        borders: int64, shape (documents + 1,).
        shape: Of the heads; the width must be a multiple of 32.

    Returns:
        The output, shape (tokens, heads width), and the log of the sum of exp(scores), float32, shape (tokens, heads).
    """
    out = joint.new_empty((len(joint), shape.heads * shape.width))
    log_sum = joint.new_empty((len(joint), shape.heads), dtype=torch.float32)
    _library().attention_forward(*_attention(joint, cosine, sine, borders, shape), _at(out), _at(log_sum))
    return out, log_sum


def attention_backward(
    joint: Tensor,
    cosine: Tensor,
    sine: Tensor,
    borders: Tensor,
    shape: Shape,
    out: Tensor,
    d_out: Tensor,
    log_sum: Tensor,
) -> Tensor:
    """The gradient of ``joint``."""
    d_joint = torch.empty_like(joint)
    arguments = _attention(joint, cosine, sine, borders, shape)
    _library().attention_backward(*arguments, _at(out), _at(d_out), _at(log_sum), _at(d_joint))
    return d_joint


def _attention(joint: Tensor, cosine: Tensor, sine: Tensor, borders: Tensor, shape: Shape) -> tuple[Any, ...]:
    return (
        _at(joint), _at(cosine), _at(sine), _at(borders), _whole(len(borders) - 1),
        _whole(shape.heads), _whole(shape.key_heads), _whole(shape.width), ctypes.c_float(shape.scale),
    )  # fmt: skip


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """See `plain.cross_entropy`."""
    losses = torch.empty(len(targets), dtype=torch.float32)
    _library().cross_entropy(_at(logits), _at(targets), _at(losses), _whole(logits.shape[0]), _whole(logits.shape[1]))
    return losses
