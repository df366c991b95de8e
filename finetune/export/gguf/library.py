"""The few functions of llama.cpp that its Python binding keeps to itself: quantizing a row, and the logits of a model.

``xllamacpp`` speaks to llama.cpp's server, which gives no logits, but its library exports llama.cpp's C interface. What is
declared here follows ``llama.h`` and ``ggml.h`` of build 11549, the one in xllamacpp 2026.10.11549. Of the two structs that
are passed by value only leading fields are named; the rest is room for all that follows, so an added field does no harm, and
`Library` checks the defaults of those fields before it believes their places.
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
"""Tokens of one decode: bounds the logits that are held at once, at 256 times the vocabulary."""

DEFAULTS = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1}
"""Of `llama_context_default_params`, by which the struct is recognised."""


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
def library() -> Any:
    """llama.cpp, with its functions' types.

    Raises:
        ExportError: The installed xllamacpp has another interface.
    """
    import xllamacpp
    from xllamacpp import xllamacpp as binding

    lib = ctypes.CDLL(binding.__file__)
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_quantize_chunk": (ctypes.c_size_t, [ctypes.c_int, pointer, pointer, *[ctypes.c_int64] * 3, pointer]),
        "llama_log_set": (None, [LISTENER, pointer]),
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
            raise ExportError(_unknown(xllamacpp.__version__, f"has no function {name}"))
        getattr(lib, name).restype, getattr(lib, name).argtypes = result, arguments
    found = lib.llama_context_default_params()
    for name, value in DEFAULTS.items():
        if getattr(found, name) != value:
            raise ExportError(
                _unknown(xllamacpp.__version__, f"starts with {name}={getattr(found, name)}, not {value}")
            )
    lib.llama_log_set(_listen, None)
    return lib


ERROR_LEVEL = 4
LISTENER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_complaints: deque[str] = deque(maxlen=4)
"""The last errors that llama.cpp logged; all else that it logs is dropped."""


@LISTENER
def _listen(level: int, text: bytes, _: Any) -> None:
    if level == ERROR_LEVEL:
        _complaints.append(text.decode(errors="replace").strip())


def _failed(what: str) -> ExportError:
    return ExportError(f"llama.cpp cannot {what}: {'; '.join(_complaints) or 'it does not say why'}")


def _unknown(version: str, what: str) -> str:
    return f"xllamacpp {version} {what}: its llama.cpp has another interface; pip install 'finetune[gguf]' brings the one that is known"


def quantize(rows: np.ndarray, kind: int, *, row_bytes: int) -> np.ndarray:
    """Rows in the numbers of a ggml type, by ggml's own reference code.

    Args:
        rows: float32, shape (n, columns).
        kind: A ``GGMLQuantizationType``.
        row_bytes: Bytes of one row in that type.

    Returns:
        uint8, shape (n, row_bytes).
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    made = np.empty((len(rows), row_bytes), dtype=np.uint8)
    written = library().ggml_quantize_chunk(kind, rows.ctypes.data, made.ctypes.data, 0, len(rows), rows.shape[1], None)
    if written != made.nbytes:
        raise ExportError(
            f"llama.cpp wrote {written} bytes for {rows.shape} numbers of type {kind}, not the {made.nbytes} expected"
        )
    return made


class Model:
    """A GGUF in llama.cpp, asked for logits.

    Args:
        file: The model.
        adapter: A LoRA on top of it, or None.
        context: Tokens of the longest text that will be asked about.
        threads: Of the computation.

    Raises:
        ExportError: llama.cpp cannot load one of them.
    """

    def __init__(self, file: Path, *, adapter: Path | None, context: int, threads: int) -> None:
        self._lib = library()
        self._model = self._lib.llama_model_load_from_file(str(file).encode(), self._lib.llama_model_default_params())
        if not self._model:
            raise _failed(f"load {file}")
        self._vocabulary = self._lib.llama_model_get_vocab(self._model)
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = max(context, BATCH), BATCH, BATCH
        params.n_threads = params.n_threads_batch = threads
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise _failed(f"make a context of {context} tokens for {file}")
        if adapter:
            self._put(adapter)

    def _put(self, adapter: Path) -> None:
        loaded = self._lib.llama_adapter_lora_init(self._model, str(adapter).encode())
        if not loaded:
            raise _failed(f"load the adapter {adapter}")
        adapters, scales = (ctypes.c_void_p * 1)(loaded), (ctypes.c_float * 1)(1.0)
        self._lib.llama_set_adapters_lora(self._context, adapters, 1, scales)

    def ends(self, token: int) -> bool:
        """Whether generation stops at the token."""
        return bool(self._lib.llama_vocab_is_eog(self._vocabulary, token))

    def logits(self, tokens: Sequence[int], positions: Sequence[int]) -> Iterator[np.ndarray]:
        """float32 logits after each of the positions, shape (vocabulary,), in order; each is gone with the next.

        Args:
            tokens: The text from its beginning.
            positions: Ascending.
        """
        size, wanted = self._lib.llama_vocab_n_tokens(self._vocabulary), set(positions)
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        for first in range(0, len(tokens), BATCH):
            part = tokens[first : first + BATCH]
            asked = [first + number in wanted for number in range(len(part))]
            batch = Batch(
                n_tokens=len(part),
                token=(ctypes.c_int32 * len(part))(*part),
                logits=(ctypes.c_int8 * len(part))(*asked),
            )
            code = self._lib.llama_decode(self._context, batch)
            if code != 0:
                raise _failed(f"decode {len(tokens)} tokens (code {code})")
            for number, yes in enumerate(asked):
                if yes:
                    yield np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, number), shape=(size,))

    def close(self) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)
