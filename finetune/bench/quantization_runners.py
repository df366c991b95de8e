"""Asks models the same questions: those of transformers' kind directly, GGUF files through llama.cpp."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from finetune.bench.task import BATCH_ROWS

if TYPE_CHECKING:
    from finetune.eval.completers import Completer, Sampling

PREFILL_TOKENS = 256
PROMPT_TOKENS, NEW_TOKENS = 16, 24


class Runner(Protocol):
    """A loaded model."""

    model: Any
    """Returns logits as a causal language model of transformers does."""

    def prefill(self, batch: int) -> int:
        """Reads ``batch`` prompts of 256 tokens; returns the number of tokens."""
        ...

    def decode(self, batch: int) -> int:
        """Writes 24 tokens after each of ``batch`` short prompts, greedily; returns the number of new tokens."""
        ...

    def answers(self, prompts: Sequence[Sequence[int]], *, limit: int, ends: Sequence[int]) -> list[list[int]]:
        """Returns greedy answers, each of at most ``limit`` tokens and without its end token."""
        ...

    def completer(self, sampling: Sampling) -> Completer:
        """Returns what completes texts with this model."""
        ...


class TransformersRunner:
    """A model with transformers' ``generate``.

    Args:
        model: In evaluation mode.
        tokenizer: Of it.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def prefill(self, batch: int) -> int:
        ids = self._ids(batch, PREFILL_TOKENS)
        with torch.no_grad():
            self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        return ids.numel()

    def decode(self, batch: int) -> int:
        ids = self._ids(batch, PROMPT_TOKENS)
        length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        mask = torch.ones_like(ids)
        self.model.generate(input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0, **length)
        return batch * NEW_TOKENS

    def answers(self, prompts: Sequence[Sequence[int]], *, limit: int, ends: Sequence[int]) -> list[list[int]]:
        from finetune.inference.generation import generate

        settings: dict[str, Any] = {"max_new_tokens": limit, "batch_rows": BATCH_ROWS, "ends": ends}
        return [answer.tokens for answer in generate(self.model, self.tokenizer, prompts, **settings)]

    def completer(self, sampling: Sampling) -> Completer:
        from finetune.eval.completers import TransformersCompleter

        return TransformersCompleter(self.model, self.tokenizer, sampling, key="")

    def _ids(self, rows: int, length: int) -> Tensor:
        return token_ids(rows, length, vocabulary=self.model.config.vocab_size).to(self.model.device)


class LlamaCppRunner:
    """A GGUF file: logits from llama.cpp's library, answers from its server.

    Args:
        file: The model.
        config: Of the model that it was made from, as transformers reads it.
        context: Tokens of the longest row that logits are asked for.
        threads: Number of threads.
    """

    def __init__(self, file: Path, config: Any, *, context: int, threads: int) -> None:
        # llama.cpp's threads wait by spinning, which slows down other processes on the same cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        self.file, self.threads = file, threads
        self.model = LlamaCppLogits(file, config, context=context, threads=threads)
        self._server: Any = None
        self._slots = 0

    def prefill(self, batch: int) -> int:
        prompts = token_ids(batch, PREFILL_TOKENS, vocabulary=self.model.config.vocab_size).tolist()
        self._complete(prompts, n_predict=1)
        return batch * PREFILL_TOKENS

    def decode(self, batch: int) -> int:
        prompts = token_ids(batch, PROMPT_TOKENS, vocabulary=self.model.config.vocab_size).tolist()
        self._complete(prompts, n_predict=NEW_TOKENS, ignore_eos=True)
        return batch * NEW_TOKENS

    def answers(self, prompts: Sequence[Sequence[int]], *, limit: int, ends: Sequence[int]) -> list[list[int]]:
        from finetune.export.gguf_runtime import parallel_answers  # a GGUF file has its own end tokens

        wanted = {"prompts": prompts, "max_new_tokens": limit}
        return [answer["tokens"] for answer in parallel_answers(self._params(), wanted, threads=self.threads)]

    def completer(self, sampling: Sampling) -> Completer:
        from finetune.eval.completers import LlamaCppCompleter

        return LlamaCppCompleter(self.file, sampling)

    def _complete(self, prompts: list[list[int]], **settings: Any) -> None:
        from finetune.export.gguf_runtime import complete, parallel_server

        if self._slots != len(prompts):
            self._slots, self._server = len(prompts), None  # the earlier server's memory is freed first
            tokens = PREFILL_TOKENS + NEW_TOKENS
            self._server = parallel_server(self._params(), slots=self._slots, tokens=tokens, threads=self.threads)
        complete(self._server, prompts, slots=self._slots, **settings)

    def _params(self) -> Any:
        from xllamacpp import CommonParams

        params = CommonParams()
        params.model.path, params.verbosity, params.warmup = str(self.file), -1, False
        params.cpuparams_batch.n_threads = self.threads
        return params


class LlamaCppLogits(torch.nn.Module):
    """Returns logits of a GGUF file, called like a model of transformers.

    Args:
        file, config, context, threads: See `LlamaCppRunner`.
    """

    def __init__(self, file: Path, config: Any, *, context: int, threads: int) -> None:
        from finetune.export.gguf.library import LlamaModel

        super().__init__()
        self.config = config
        self.place = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        self.llama = LlamaModel(file, adapter=None, context=context, threads=threads)

    def get_output_embeddings(self) -> None:
        """Returns None: the head is a part of the file."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        """Returns ``logits``, float32, shape (rows, longest, vocabulary); rows are padded on the right."""
        rows = [self._row(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        return SimpleNamespace(logits=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))

    def _row(self, tokens: list[int]) -> Tensor:
        logits = self.llama.logits(tokens, range(len(tokens)))
        return torch.stack([torch.from_numpy(after.copy()) for after in logits])


def token_ids(rows: int, length: int, *, vocabulary: int) -> Tensor:
    """Returns token ids that every vocabulary has, each different from the one before, shape (rows, length)."""
    return (torch.arange(rows * length) % min(1000, vocabulary)).view(rows, length)
