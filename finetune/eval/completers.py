"""Completes texts: by a causal language model in transformers, or by a GGUF file in llama.cpp."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finetune.cache import file_sha256
from finetune.console import log
from finetune.errors import EvalError
from finetune.paths import CONF

if TYPE_CHECKING:
    from torch import Tensor

LLAMA_CPP = "xllamacpp==2026.10.11549"
PROMPT_TOKENS = 2048
"""Longest prompt in llama.cpp, which reserves memory for all of it; a longer one is refused."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are sampled.

    Attributes:
        max_new_tokens: Maximum tokens of a completion.
        temperature: 0 takes the most likely token.
        top_p: Samples from the most likely tokens that together have this probability.
        stops: Texts that end a completion and are not part of it.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    stops: tuple[str, ...]


class Completer(Protocol):
    """Completes a text."""

    key: str
    """Identifies weights and dtype: another model has another key."""

    def complete(self, prompt: str, *, seed: int) -> str:
        """Returns the text after the prompt, up to the first stop."""
        ...


def load_completer(model: str, sampling: Sampling, *, quantization: str) -> Completer:
    """Loads a ``.gguf`` file in llama.cpp, or any other value of ``model.name`` in transformers.

    Args:
        model: Also the name of an option of the model group, e.g. ``smollm2_135m``.
        sampling: How to sample tokens.
        quantization: Option of the quantization group; a GGUF file has its own.

    Raises:
        EvalError: llama.cpp cannot open the file, or is not installed.
        ConfigError, ModelError: transformers has no such model.
    """
    if not model.endswith(".gguf") or model.startswith("package:"):
        return _load_transformers(model, sampling, quantization=quantization)
    if quantization != "none":
        raise EvalError(f"quantization={quantization}: {model} is quantized already; leave quantization out")
    return LlamaCppCompleter(Path(model), sampling)


def _load_transformers(model: str, sampling: Sampling, *, quantization: str) -> TransformersCompleter:
    """Loads a model with the device and dtype that `finetune.hardware.place` chooses."""
    from finetune import hardware
    from finetune.config import load
    from finetune.model import ModelSpec

    known = (CONF / "model" / f"{model}.yaml").is_file() and not model.startswith("_")
    choice = [f"model={model}"] if known else ["model=custom", f"model.name={json.dumps(model)}"]
    config = load([*choice, f"quantization={quantization}", "run.name=none"])
    placement = hardware.place(hardware.probe(config.hardware), config)
    spec = ModelSpec.resolve(config, placement)
    key = json.dumps(["transformers", spec.base.sha256, quantization, placement.dtype])
    completer = TransformersCompleter(spec.load(), spec.load_tokenizer(), sampling, key=key)
    log("bench", f"{config.model.name} in transformers, {quantization}, {placement.dtype} on {placement.device}")
    return completer


class TransformersCompleter:
    """A loaded causal language model with transformers' ``generate``.

    Args:
        model: In evaluation mode.
        tokenizer: Of it.
        sampling: How to sample tokens.
        key: Identifies weights and dtype.
    """

    def __init__(self, model: Any, tokenizer: Any, sampling: Sampling, *, key: str) -> None:
        from finetune.inference.generation import end_tokens

        self.model, self.tokenizer, self.sampling, self.key = model, tokenizer, sampling, key
        self.ends = end_tokens(model, tokenizer)

    def complete(self, prompt: str, *, seed: int) -> str:
        """Returns the text after the prompt, up to the first stop."""
        import torch
        from transformers import GenerationConfig, StoppingCriteriaList

        sampling = self.sampling
        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        length = inputs["input_ids"].shape[1]

        def stopped(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            text = self._text(ids[0, length:])
            return torch.tensor([cut_at_stop(text, sampling.stops) != text], device=ids.device)

        torch.manual_seed(seed)
        method: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            method = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        # Every setting is explicit: transformers fills unset ones from the model's own generation_config.
        settings = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=self.ends or None,
            pad_token_id=self.tokenizer.pad_token_id,
            **method,
        )
        stopping = StoppingCriteriaList([stopped])
        with torch.no_grad():
            written = self.model.generate(**inputs, generation_config=settings, stopping_criteria=stopping)
        return cut_at_stop(self._text(written[0, length:]), sampling.stops)

    def _text(self, ids: Tensor) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text


class LlamaCppCompleter:
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
        # By default llama.cpp uses all the machine's cores, and its threads spin: far slower if other processes run.
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = probe().cores
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise EvalError(f"model: llama.cpp cannot open {file}: {error}") from error
        self.sampling = sampling
        self.key = json.dumps(["llama.cpp", file_sha256(file)])
        log("bench", f"{file.name} in llama.cpp, with the dtype of the file")

    def complete(self, prompt: str, *, seed: int) -> str:
        """Returns the text after the prompt, up to the first stop."""
        sampling = self.sampling
        # Neutral values are explicit: llama.cpp's defaults are top_k=40 and min_p=0.05.
        settings = {"top_k": 0, "top_p": sampling.top_p, "min_p": 0.0, "repeat_penalty": 1.0}
        settings |= {"temperature": sampling.temperature, "max_tokens": sampling.max_new_tokens}
        reply = self.server.handle_completions(
            {"prompt": prompt, "seed": seed, "stop": list(sampling.stops), **settings}
        )
        if "error" in reply:
            raise EvalError(f"llama.cpp refused a prompt: {reply['error']['message']}")
        return cut_at_stop(reply["choices"][0]["text"], sampling.stops)


def cut_at_stop(text: str, stops: tuple[str, ...]) -> str:
    """Returns the text before the first stop."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
