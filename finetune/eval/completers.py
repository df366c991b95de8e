"""Who completes a text: a causal language model in transformers, or a GGUF file in llama.cpp."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from finetune.cache import file_sha256
from finetune.console import log
from finetune.errors import EvalError
from finetune.paths import CONF

LLAMA_CPP = "xllamacpp==2026.10.11549"
PROMPT_TOKENS = 2048
"""Room for a prompt in llama.cpp, which reserves memory for all of it; a longer one is refused."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a completion is drawn.

    Attributes:
        max_new_tokens: Of a completion at most.
        temperature: 0 takes the most probable token.
        top_p: Tokens that together have this much of the probability are drawn from.
        stops: Texts that end a completion and do not belong to it.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    stops: tuple[str, ...]


class Writer(Protocol):
    """Anything that completes a text."""

    key: str
    """Names its weights and numbers: another model has another."""

    def generate(self, prompt: str, *, seed: int) -> str:
        """The text after the prompt, up to the first stop."""
        ...


def open_writer(model: str, sampling: Sampling, *, quantization: str) -> Writer:
    """Loads a model: a ``.gguf`` file in llama.cpp, anything else that ``model.name`` can name in transformers.

    Args:
        model: Also the name of an option of the model group, e.g. ``smollm2_135m``.
        quantization: Option of the quantization group; a GGUF file has its own.

    Raises:
        EvalError: llama.cpp cannot open the file, or is not installed.
        ConfigError, ModelError: transformers has no such model.
    """
    if not model.endswith(".gguf") or model.startswith("package:"):
        return TransformersWriter(model, sampling, quantization=quantization)
    if quantization != "none":
        raise EvalError(f"quantization={quantization}: {model} is quantized as its file says; leave quantization out")
    return LlamaCppWriter(Path(model), sampling)


class TransformersWriter:
    """A causal language model on the device and in the numbers that `finetune.hardware.place` chooses."""

    def __init__(self, model: str, sampling: Sampling, *, quantization: str) -> None:
        from finetune import hardware
        from finetune.config import load
        from finetune.inference.generation import end_tokens
        from finetune.model import ModelSpec

        known = (CONF / "model" / f"{model}.yaml").is_file() and not model.startswith("_")
        choice = [f"model={model}"] if known else ["model=custom", f"model.name={json.dumps(model)}"]
        config = load([*choice, f"quantization={quantization}", "run.name=none"])
        placement = hardware.place(hardware.probe(config.hardware), config)
        spec = ModelSpec.resolve(config, placement)
        self.sampling = sampling
        self.key = json.dumps(["transformers", spec.base.sha256, quantization, placement.dtype])
        self.tokenizer: Any = spec.load_tokenizer()
        self.model: Any = spec.load()
        self.ends = end_tokens(self.model, self.tokenizer)
        log("bench", f"{config.model.name} in transformers, {quantization}, {placement.dtype} on {placement.device}")

    def generate(self, prompt: str, *, seed: int) -> str:
        import torch
        from transformers import GenerationConfig, StoppingCriteriaList

        sampling = self.sampling
        asked = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        length = asked["input_ids"].shape[1]

        def stopped(ids: Any, scores: Any, **_: Any) -> Any:
            return torch.tensor([cut(text := self._text(ids[0, length:]), sampling.stops) != text], device=ids.device)

        torch.manual_seed(seed)
        drawn: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        # transformers fills what is left unset from the model's own generation_config.
        settings = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,
            eos_token_id=self.ends or None, pad_token_id=self.tokenizer.pad_token_id, **drawn,
        )  # fmt: skip
        with torch.no_grad():
            written = self.model.generate(
                **asked, generation_config=settings, stopping_criteria=StoppingCriteriaList([stopped])
            )
        return cut(self._text(written[0, length:]), sampling.stops)

    def _text(self, ids: Any) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text


class LlamaCppWriter:
    """A GGUF file in llama.cpp's own server, inside this process."""

    def __init__(self, file: Path, sampling: Sampling) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise EvalError(
                f"{file}: a GGUF file runs in llama.cpp, whose binding is not installed; run: pip install {LLAMA_CPP}"
            )
        if not file.is_file():
            raise EvalError(f"model: {file} does not exist; give the path of a .gguf file")
        import xllamacpp

        from finetune.hardware import probe

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel = PROMPT_TOKENS + sampling.max_new_tokens, 1
        params.verbosity, params.warmup = -1, False
        # By default it takes all the machine's cores, and its threads spin: far slower where some belong to others.
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = probe().cores
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise EvalError(f"model: llama.cpp cannot open {file}: {error}") from error
        self.sampling = sampling
        self.key = json.dumps(["llama.cpp", file_sha256(file)])
        log("bench", f"{file.name} in llama.cpp, in its own numbers")

    def generate(self, prompt: str, *, seed: int) -> str:
        # Neutral values spelt out: llama.cpp's own defaults draw from 40 tokens above a twentieth of the best one.
        asked = {
            "prompt": prompt, "max_tokens": self.sampling.max_new_tokens, "temperature": self.sampling.temperature,
            "top_k": 0, "top_p": self.sampling.top_p, "min_p": 0.0, "repeat_penalty": 1.0, "seed": seed, "stop": list(self.sampling.stops),
        }  # fmt: skip
        found = self.server.handle_completions(asked)
        if "error" in found:
            raise EvalError(f"llama.cpp refused a prompt: {found['error']['message']}")
        return cut(found["choices"][0]["text"], self.sampling.stops)


def cut(text: str, stops: tuple[str, ...]) -> str:
    """The text before the first stop."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
