"""llama.cpp functions that its Python binding does not expose: quantizing rows, and reading a model's logits.

``xllamacpp`` wraps llama.cpp's server, which returns no logits, but its library exports llama.cpp's C interface. The
declarations follow ``llama.h`` and ``ggml.h`` of build 11549, the one in xllamacpp 2026.10.11549. Of the two structs
that are passed by value only leading fields are named; the rest is padding for all that follows, so an added field does
no harm, and `load_library` checks the defaults of the named fields before it relies on their offsets.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import ExportError

BATCH = 256
"""Tokens of one decode: bounds the logits in memory to 256 times the vocabulary."""

DEFAULTS = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1}
"""Values of `llama_context_default_params` that identify the struct."""

ERROR_LEVEL = 4
LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_errors: deque[str] = deque(maxlen=4)
"""The last errors that llama.cpp logged; its other messages are dropped."""


class ModelParams(ctypes.Structure):
    _fields_ = [("all", ctypes.c_byte * 512)]


class ContextParams(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")],
        *[(name, ctypes.c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")],
        *[(name, ctypes.c_int32) for name in ("n_threads", "n_threads_batch")],
        ("rest", ctypes.c_byte * 476),
    ]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        *[(name, ctypes.c_void_p) for name in ("embd", "pos", "n_seq_id", "seq_id")],
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


@cache
def load_library() -> Any:
    """Loads llama.cpp and declares its functions.

    Raises:
        ExportError: The installed xllamacpp has another interface.
    """
    import xllamacpp
    from xllamacpp import xllamacpp as binding

    lib = ctypes.CDLL(binding.__file__)
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_quantize_chunk": (ctypes.c_size_t, [ctypes.c_int, pointer, pointer, *[ctypes.c_int64] * 3, pointer]),
        "llama_log_set": (None, [LOG_CALLBACK, pointer]),
        "llama_model_default_params": (ModelParams, []),
        "llama_model_load_from_file": (pointer, [text, ModelParams]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_model_free": (None, [pointer]),
        "llama_vocab_n_tokens": (ctypes.c_int32, [pointer]),
        "llama_vocab_is_eog": (ctypes.c_bool, [pointer, ctypes.c_int32]),
        "llama_context_default_params": (ContextParams, []),
        "llama_init_from_model": (pointer, [pointer, ContextParams]),
        "llama_free": (None, [pointer]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
        "llama_decode": (ctypes.c_int32, [pointer, Batch]),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [pointer, ctypes.c_int32]),
        "llama_adapter_lora_init": (pointer, [pointer, text]),
        "llama_set_adapters_lora": (ctypes.c_int32, [pointer, pointer, ctypes.c_size_t, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        if not hasattr(lib, name):
            raise ExportError(_unknown_interface(xllamacpp.__version__, f"has no function {name}"))
        getattr(lib, name).restype, getattr(lib, name).argtypes = result, arguments
    params = lib.llama_context_default_params()
    for name, value in DEFAULTS.items():
        if (actual := getattr(params, name)) != value:
            raise ExportError(_unknown_interface(xllamacpp.__version__, f"starts with {name}={actual}, not {value}"))
    return lib


@LOG_CALLBACK
def _on_log(level: int, text: bytes, _: Any) -> None:
    if level == ERROR_LEVEL:
        _errors.append(text.decode(errors="replace").strip())


def _failed(action: str) -> ExportError:
    return ExportError(f"llama.cpp cannot {action}: {'; '.join(_errors) or 'it gives no reason'}")


def _unknown_interface(version: str, difference: str) -> str:
    return (
        f"xllamacpp {version} {difference}: its llama.cpp has another interface; "
        "pip install 'finetune-qlora[gguf]' installs the supported version"
    )


def quantize(rows: np.ndarray, quant_type: int, *, row_bytes: int) -> np.ndarray:
    """Quantizes rows by ggml's own reference code.

    Args:
        rows: float32, shape (n, columns).
        quant_type: A ``GGMLQuantizationType``.
        row_bytes: Bytes of one row in that type.

    Returns:
        uint8, shape (n, row_bytes).
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    blocks = np.empty((len(rows), row_bytes), dtype=np.uint8)
    written = load_library().ggml_quantize_chunk(
        quant_type, rows.ctypes.data, blocks.ctypes.data, 0, len(rows), rows.shape[1], None
    )
    if written != blocks.nbytes:
        raise ExportError(
            f"llama.cpp wrote {written} bytes for {rows.shape} weights of type {quant_type}; expected {blocks.nbytes}"
        )
    return blocks


class LlamaModel:
    """A GGUF file loaded in llama.cpp, which returns logits.

    Args:
        file: The model.
        adapter: A LoRA to apply, or None.
        context: Tokens of the longest text that will be evaluated.
        threads: Number of threads.

    Raises:
        ExportError: llama.cpp cannot load one of them.
    """

    def __init__(self, file: Path, *, adapter: Path | None, context: int, threads: int) -> None:
        self._lib = load_library()
        self._lib.llama_log_set(_on_log, None)  # a server in this process sets its own
        self._model = self._lib.llama_model_load_from_file(str(file).encode(), self._lib.llama_model_default_params())
        if not self._model:
            raise _failed(f"load {file}")
        self.vocabulary = self._lib.llama_model_get_vocab(self._model)
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = max(context, BATCH), BATCH, BATCH
        params.n_threads = params.n_threads_batch = threads
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise _failed(f"create a context of {context} tokens for {file}")
        if adapter:
            self._apply(adapter)

    def _apply(self, adapter: Path) -> None:
        loaded = self._lib.llama_adapter_lora_init(self._model, str(adapter).encode())
        if not loaded:
            raise _failed(f"load the adapter {adapter}")
        adapters, scales = (ctypes.c_void_p * 1)(loaded), (ctypes.c_float * 1)(1.0)
        self._lib.llama_set_adapters_lora(self._context, adapters, 1, scales)

    def ends_at(self, token: int) -> bool:
        """Returns whether generation stops at the token."""
        return bool(self._lib.llama_vocab_is_eog(self.vocabulary, token))

    def logits(self, tokens: Sequence[int], positions: Sequence[int]) -> Iterator[np.ndarray]:
        """Yields float32 logits after each of the positions, shape (vocabulary,); the next one overwrites them.

        Args:
            tokens: The text from its beginning.
            positions: Ascending.
        """
        size, wanted = self._lib.llama_vocab_n_tokens(self.vocabulary), set(positions)
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        for first in range(0, len(tokens), BATCH):
            part = tokens[first : first + BATCH]
            flags = [first + index in wanted for index in range(len(part))]
            batch = Batch(
                n_tokens=len(part),
                token=(ctypes.c_int32 * len(part))(*part),
                logits=(ctypes.c_int8 * len(part))(*flags),
            )
            code = self._lib.llama_decode(self._context, batch)
            if code != 0:
                raise _failed(f"decode {len(tokens)} tokens (code {code})")
            for index in np.flatnonzero(flags).tolist():
                yield np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, index), shape=(size,))

    def close(self) -> None:
        """Frees the model's memory."""
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)
