"""Samples answers, each from a random stream of its own, so that an answer does not depend on what is sampled with it.

A token is the largest of log-probability plus Gumbel noise, whose seed is that of the answer. Batches, processes and
resumed runs therefore sample the same answers; only rounding of the logits can change one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from finetune.inference.budget import answer_batches
from finetune.inference.generation import contiguous_head_input, generate_tokens
from finetune.inference.logits import evaluating, unwrap
from finetune.inference.oom import in_halves

SMALLEST_NOISE = 1e-30
"""A draw of 0 would have an infinite logarithm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        max_new_tokens: Longest answer, the end token included.
        temperature: Divides the logits.
        top_p: Probability of the tokens that are sampled from.
        batch_rows: Answers in one batch.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    batch_rows: int = 32


@dataclass(frozen=True, slots=True)
class Sample:
    """A sampled answer.

    Attributes:
        tokens: New token ids, with the end token where it has one.
        logprobs: Log-probability of each at the sampling temperature, before top_p.
        entropy: Mean entropy of the distributions, nats per token.
        ended: Whether the model ended it; False where it reached the limit.
    """

    tokens: list[int]
    logprobs: list[float]
    entropy: float
    ended: bool


def seed_of(*parts: int) -> int:
    """Returns a seed of 63 bits that depends on every part, e.g. run, step, row and number within the group."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample(
    model: Any, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, sampling: Sampling, ends: Sequence[int]
) -> list[Sample]:
    """Samples one answer to each prompt, in the order of the prompts, in evaluation mode: dropout is off.

    Args:
        model: A causal language model, with or without a peft adapter.
        prompts: Token ids up to and including the generation prompt.
        seeds: Of each answer.
        sampling: Limits and distribution.
        ends: Tokens that end an answer; the first one also pads the prompts.
    """
    batches = answer_batches([len(prompt) for prompt in prompts], lambda _: sampling.batch_rows)
    samples: dict[int, Sample] = {}

    def compute(batch: list[int]) -> list[tuple[int, Sample]]:
        choice = SeededChoice([seeds[index] for index in batch], sampling)
        generate_tokens(
            unwrap(model),
            [prompts[index] for index in batch],
            ends=list(ends),
            pad=ends[0] if ends else 0,
            limit=sampling.max_new_tokens,
            choice=choice,
        )
        return list(zip(batch, choice.samples(ends), strict=True))

    with evaluating(model), contiguous_head_input(unwrap(model)):
        for answers in in_halves(batches, compute):
            samples.update(answers)
    return [samples[index] for index in range(len(prompts))]


class SeededChoice(LogitsProcessor):
    """Chooses the next token of each row with the row's own noise, and records what it chose.

    Args:
        seeds: Of each row.
        sampling: Temperature and top_p.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling) -> None:
        self.seeds, self.sampling = seeds, sampling
        self.generators: list[torch.Generator] = []
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns scores of which the chosen token has the only finite one, shape (rows, vocabulary)."""
        if not self.generators:
            self.generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds]
        logprobs = (scores.float() / self.sampling.temperature).log_softmax(-1)
        noise = torch.empty_like(logprobs)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        noisy = self._nucleus(logprobs) - noise.clamp_(min=SMALLEST_NOISE).log_()
        chosen = noisy.argmax(-1, keepdim=True)
        entropy = -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(-1)
        self.steps.append((chosen[:, 0], logprobs.gather(-1, chosen)[:, 0], entropy))
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)

    def _nucleus(self, logprobs: Tensor) -> Tensor:
        """Removes the tokens outside the smallest set with a probability of top_p."""
        if self.sampling.top_p >= 1:
            return logprobs
        ordered, order = logprobs.sort(-1, descending=True)
        probabilities = ordered.exp()
        outside = probabilities.cumsum(-1) - probabilities >= self.sampling.top_p
        return logprobs.masked_fill(torch.zeros_like(outside).scatter_(-1, order, outside), -torch.inf)

    def samples(self, ends: Sequence[int]) -> list[Sample]:
        """Returns the answer of each row, up to its first end token."""
        columns = (torch.stack(column, 1).tolist() for column in zip(*self.steps, strict=True))
        return [_sample(*row, ends=set(ends)) for row in zip(*columns, strict=True)]


def _sample(tokens: list[int], logprobs: list[float], entropies: list[float], *, ends: set[int]) -> Sample:
    end = next((place + 1 for place, token in enumerate(tokens) if token in ends), None)
    size = end or len(tokens)
    return Sample(tokens[:size], logprobs[:size], sum(entropies[:size]) / size, ended=end is not None)
