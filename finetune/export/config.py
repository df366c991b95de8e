"""The export group: one entry per thing that is written."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from finetune.quantization.config import GROUPS

FORMATS = ("adapter", "safetensors", "bitsandbytes", "gptq", "awq", "fp8", "gguf", "gguf_lora", "onnx", "card", "hub")
CALIBRATED = ("gptq", "awq")
GGUF_DTYPES = ("f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")
DTYPES = {
    "safetensors": ("", "bfloat16", "float16", "float32"),
    "bitsandbytes": ("", "nf4", "fp4", "int8"),
    "gguf": GGUF_DTYPES,
    "gguf_lora": GGUF_DTYPES,
    "onnx": ("", "float32", "int8", "int4", "int8_dynamic"),
}
"""By format; empty leaves the choice to the format. The other formats have a single dtype."""


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """One export: its format, and the largest difference allowed from the model that it was made from."""

    format: str
    """``adapter`` (plain peft), ``safetensors`` (the merged model), ``bitsandbytes`` (the merged model in 4 bit),
    ``gptq`` and ``awq`` (4 bits, calibrated on training rows, for vLLM), ``fp8`` (for vLLM), ``gguf`` (for llama.cpp
    and Ollama), ``gguf_lora`` (the adapter for them), ``onnx``, ``card`` (README.md for all of them) or ``hub`` (a push
    of them)."""

    logit_rows: int
    """Held-out prompts to compare logits on, in addition to the reference prompts."""

    loss_rows: int
    """Held-out rows to compare the loss on, from the top: those of ``eval.loss_rows``, or fewer."""

    max_logit_difference: float
    """Largest difference of a logit, anywhere in the compared distributions, before the export fails."""

    max_kl: float
    """Largest mean KL(model || export), in nats per compared position."""

    max_new_tokens: int
    """Tokens within which the export must end its answer, if the model did."""

    rows: int = 0
    """Held-out prompts that the export answers in its own runtime, from the top: ``eval.rows`` or fewer.
    ``eval.metrics`` score them, next to the model's answers. 0 writes none: a large model on a CPU writes a few tokens
    a second."""

    dtype: str = ""
    """dtype of the weights, where the format has several, e.g. ``bfloat16`` or ``q4_k_m``."""

    group_size: int = 64
    """``gptq`` and ``awq``: inputs that share a scale: 32, 64 or 128, and a divisor of every layer's inputs."""

    calibration_rows: int = 0
    """``gptq`` and ``awq``: sequences of training tokens to calibrate on, at most."""

    calibration_tokens: int = 0
    """``gptq`` and ``awq``: tokens of each of these sequences, which rows fill one after the other."""

    steps: int = 0
    """``gptq``: steps of SignRound for each block. auto-round itself takes 200; 0 rounds to nearest."""

    shard_bytes: int = 0
    """``safetensors``: largest file; 0 keeps the files of the base."""

    repository: str = ""
    """``hub``: the repository to push to, e.g. ``me/my-model``."""

    private: bool = True
    """``hub``: whether a newly created repository is private."""

    push: bool = False
    """``hub``: whether files are uploaded; if false, the run only lists them."""

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yields the settings that have no effect given the others, each with the reason."""
        if self.format != "safetensors":
            yield "shard_bytes", "only safetensors files are split"
        if self.format not in CALIBRATED:
            calibrated = ("group_size", "calibration_rows", "calibration_tokens")
            yield from ((name, "only gptq and awq calibrate") for name in calibrated)
        if self.format != "gptq":
            yield "steps", "only gptq trains its rounding"
        if self.format in ("card", "hub"):
            names = ("logit_rows", "loss_rows", "rows", "max_logit_difference", "max_kl", "max_new_tokens")
            yield from ((name, "it writes no weights that could be compared") for name in names)
        if self.format != "hub":
            yield from ((name, "nothing is sent") for name in ("repository", "private", "push"))
        if not self.dtype:
            yield "dtype", "left to the format, which may have a single dtype"

    def problems(self) -> Iterator[str]:
        """Yields one sentence for each setting that is not allowed."""
        if self.format not in FORMATS:
            yield f"export.*.format must be one of {', '.join(FORMATS)}; got {self.format!r}"
        for key, value in (
            ("steps", self.steps),
            ("logit_rows", self.logit_rows),
            ("loss_rows", self.loss_rows),
            ("rows", self.rows),
            ("shard_bytes", self.shard_bytes),
            ("max_logit_difference", self.max_logit_difference),
            ("max_kl", self.max_kl),
        ):
            if value < 0:
                yield f"export.{self.format}.{key} must not be negative; got {value}"
        if self.format in CALIBRATED:
            yield from self._calibration_problems()
        if self.dtype not in DTYPES.get(self.format, ("",)):
            allowed = ", ".join(filter(None, DTYPES.get(self.format, ())))
            rule = f"must be one of {allowed}" if allowed else "must be left out, since this format has a single dtype"
            yield f"export.{self.format}.dtype {rule}; got {self.dtype!r}"
        named = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", self.repository))
        if self.format == "hub" and not named and (self.repository or self.push):
            yield f"export.hub.repository must be owner/name, e.g. me/my-model; got {self.repository!r}"
        if self.format == "hub" and self.push and not os.environ.get("HF_TOKEN"):
            yield "export.hub.push=true needs a token with the right to write: set HF_TOKEN in the environment"
        if self.max_new_tokens < 1:
            yield f"export.{self.format}.max_new_tokens must be at least 1; got {self.max_new_tokens}"

    def _calibration_problems(self) -> Iterator[str]:
        if self.group_size not in GROUPS:
            sizes = ", ".join(map(str, GROUPS))
            yield f"export.{self.format}.group_size must be one of {sizes}; got {self.group_size}"
        for key in ("calibration_rows", "calibration_tokens"):
            if getattr(self, key) < 1:
                yield f"export.{self.format}.{key} must be at least 1; got {getattr(self, key)}"
