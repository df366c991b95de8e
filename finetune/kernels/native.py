"""The C++ kernels, compiled for this processor on first use and cached.

They need g++ and any x86-64 processor; only attention needs AMX, without which torch's attention is used.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finetune.cache import cache_folder
from finetune.console import log
from finetune.errors import HardwareError
from finetune.files import first_error_line

if TYPE_CHECKING:
    from finetune.kernels.attention import AttentionShape
    from finetune.kernels.forms import GateForm, NormForm

SOURCES = [Path(__file__).with_name(name) for name in ("bfloat16.h", "kernels.cpp", "attention.cpp")]
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
"""No ``-ffast-math``: a non-finite loss must stay non-finite. Threads are those of torch's OpenMP, loaded before."""

SMALLEST_FREE_BYTES = 16 * 1024**2
"""Free disk below which a failed compilation is blamed on the disk; the kernels and g++'s own files take a tenth."""

FUNCTIONS = ("rms_forward", "rms_backward", "gated_forward", "gated_backward", "cross_entropy")
TILE_WIDTH = 32
"""The width of a head must be a multiple of it."""

TILE_FUNCTIONS = ("attention_forward", "attention_backward")


@cache
def library() -> ctypes.CDLL | None:
    """Returns the compiled kernels; None where there is an `obstacle`.

    Raises:
        HardwareError: The disk is full, or the cache cannot be written: without the kernels, the same run would round
            differently, so this is not decided silently.
    """
    if obstacle():
        return None
    file = _file()
    loaded = ctypes.CDLL(str(file))
    for name in (*FUNCTIONS, *(TILE_FUNCTIONS if hasattr(loaded, TILE_FUNCTIONS[0]) else ())):
        getattr(loaded, name).restype = None
    return loaded


@cache
def has_tiles() -> bool:
    """Returns whether the attention kernels can be used: the CPU has AMX, and the system lets this process use it."""
    loaded = library()
    return loaded is not None and hasattr(loaded, TILE_FUNCTIONS[0]) and loaded.attention_permission() == 0


@cache
def obstacle() -> str | None:
    """Returns why there are no kernels on this machine, and compiles them where they can be; None where they are.

    Raises:
        HardwareError: As `library`.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "they can be compiled on x86-64 Linux only"
    if _compiler() is None:
        return "there is no C++ compiler (g++)"
    file = _file()
    return None if file.is_file() else _compile(file)


def _compiler() -> str | None:
    return shutil.which("g++")


def _file() -> Path:
    """Returns a path with a hash of everything that the machine code depends on: machines may share a cache."""
    compiler = _compiler()
    assert compiler is not None
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    content = "\n".join([*(source.read_text() for source in SOURCES), " ".join(FLAGS), version, flags])
    return cache_folder("kernels") / f"{hashlib.sha256(content.encode()).hexdigest()[:24]}.so"


def _compile(file: Path) -> str | None:
    """Compiles the kernels, however long it takes; returns why g++ refuses them, or None."""
    partial = file.with_suffix(f".{os.getpid()}")
    command = [str(_compiler()), *FLAGS, "-o", str(partial), *map(str, SOURCES[1:])]
    log("kernels", "compiles the native kernels for this processor, once")
    try:
        subprocess.run(command, capture_output=True, check=True, text=True, errors="replace")
        os.replace(partial, file)
    except subprocess.CalledProcessError as error:
        partial.unlink(missing_ok=True)
        text = error.stderr or ""
        if os.strerror(errno.ENOSPC) in text or _is_full(tempfile.gettempdir()) or _is_full(file.parent):
            raise _no_room(file, os.strerror(errno.ENOSPC)) from error
        reason = next((line for line in text.splitlines() if "error" in line), f"exit code {error.returncode}")
        return f"g++ could not compile them ({reason[:160]})"
    except OSError as error:
        raise _no_room(file, first_error_line(error)) from error
    return None


def _is_full(folder: str | Path) -> bool:
    return shutil.disk_usage(folder).free < SMALLEST_FREE_BYTES


def _no_room(file: Path, reason: str) -> HardwareError:
    return HardwareError(
        f"kernels.implementation: the native kernels cannot be written: {reason}. g++ writes to "
        f"{tempfile.gettempdir()} (TMPDIR) and its result to {file.parent} (FINETUNE_CACHE): free some there, name "
        "other folders, or set kernels.implementation=plain, which rounds differently"
    )


def _call(name: str, *arguments: Tensor | int | float) -> None:
    loaded = library()
    assert loaded is not None
    getattr(loaded, name)(*map(_to_c, arguments))


def _to_c(value: Tensor | int | float) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_float(value)


def rms_forward(x: Tensor, weight: Tensor, eps: float, form: NormForm) -> tuple[Tensor, Tensor]:
    """Computes `plain.rms_forward`."""
    y, rstd = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32)
    settings = float(eps), float(form.offset), int(form.rounds_first)
    _call("rms_forward", x, weight, y, rstd, rstd.numel(), x.shape[-1], *settings)
    return y, rstd


def rms_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, form: NormForm) -> Tensor:
    """Computes `plain.rms_backward`."""
    dx = torch.empty_like(x)
    _call("rms_backward", dy, x, weight, rstd, dx, rstd.numel(), x.shape[-1], float(form.offset))
    return dx


def gated_forward(gate_up: Tensor, form: GateForm) -> Tensor:
    """Computes `plain.gated_forward`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, width))
    _call("gated_forward", gate_up, out, rows, width, float(form.linear), float(form.cubic))
    return out


def gated_backward(dy: Tensor, gate_up: Tensor, form: GateForm) -> Tensor:
    """Computes `plain.gated_backward`."""
    d_gate_up, width = torch.empty_like(gate_up), gate_up.shape[1] // 2
    _call("gated_backward", dy, gate_up, d_gate_up, gate_up.shape[0], width, float(form.linear), float(form.cubic))
    return d_gate_up


def attention_forward(
    qkv: Tensor, cosine: Tensor, sine: Tensor, starts: Tensor, shape: AttentionShape
) -> tuple[Tensor, Tensor]:
    """Applies rotary positions and causal attention within each document.

    Args:
        qkv: q, k and v concatenated, bfloat16, shape (tokens, (heads + 2 key_heads) width).
        cosine: bfloat16, shape (tokens, width); ``sine`` likewise.
        starts: First token of each document, and the end of the last one, int64, shape (documents + 1,).
        shape: The width must be a multiple of `TILE_WIDTH`.

    Returns:
        The output, shape (tokens, heads width), and the log of the sum of exp(scores), float32, shape (tokens, heads).
    """
    out = qkv.new_empty((len(qkv), shape.heads * shape.width))
    log_sum = qkv.new_empty((len(qkv), shape.heads), dtype=torch.float32)
    _call("attention_forward", qkv, cosine, sine, starts, *_sizes(starts, shape), out, log_sum)
    return out, log_sum


def attention_backward(
    qkv: Tensor,
    cosine: Tensor,
    sine: Tensor,
    starts: Tensor,
    shape: AttentionShape,
    out: Tensor,
    d_out: Tensor,
    log_sum: Tensor,
) -> Tensor:
    """Computes the gradient of ``qkv``."""
    d_qkv = torch.empty_like(qkv)
    _call("attention_backward", qkv, cosine, sine, starts, *_sizes(starts, shape), out, d_out, log_sum, d_qkv)
    return d_qkv


def _sizes(starts: Tensor, shape: AttentionShape) -> tuple[int | float, ...]:
    return len(starts) - 1, shape.heads, shape.key_heads, shape.width, float(shape.scale)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Computes `plain.cross_entropy`."""
    losses = torch.empty(len(targets), dtype=torch.float32)
    _call("cross_entropy", logits, targets, losses, logits.shape[0], logits.shape[1])
    return losses
