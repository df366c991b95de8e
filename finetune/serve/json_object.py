"""Keeps an answer a JSON object: masks the tokens that would break it, by the grammar of llguidance."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PACKAGE = "llguidance"

WHITESPACE = r"[ \n\t]{1,32}"
"""Between the parts of an object: a choice. Without a bound, a small model may write spaces until its limit."""


class JsonGrammar:
    """A JSON object, over the tokens of one tokenizer.

    Args:
        tokenizer: A fast tokenizer.
        ends: Tokens that end an answer.

    Raises:
        ValueError: llguidance cannot read the tokenizer.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int]) -> None:
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        self._vocabulary, self._ends = from_tokenizer(tokenizer, eos_token=list(ends)), list(ends)
        self._grammar = LLMatcher.grammar_from_json_schema(
            {"type": "object"}, overrides={"whitespace_pattern": WHITESPACE}
        )

    def start(self) -> JsonAnswer:
        """Returns the state of an answer that has no token yet."""
        from llguidance import LLMatcher

        return JsonAnswer(LLMatcher(self._vocabulary, self._grammar, log_level=0), self._ends)


class JsonAnswer:
    """How far an answer's object is.

    Args:
        matcher: Of the grammar.
        ends: Tokens that end an answer.
    """

    def __init__(self, matcher: Any, ends: Sequence[int]) -> None:
        self._matcher, self._ends = matcher, list(ends)

    def mask(self, logits: Tensor) -> Tensor:
        """Returns the logits of the tokens that may come next, and minus infinity for the others.

        Only an end token may follow a complete object.

        Args:
            logits: float32, shape (vocabulary,), on the CPU.
        """
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        if not self._matcher.is_accepting():
            bias = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)[: len(logits)]
            allowed[: len(bias)] = bias > 0
        if not allowed.any():  # it is complete, or the grammar has failed, which `add` tells
            allowed[self._ends] = True
        return logits.masked_fill(~allowed, -torch.inf)

    def add(self, token: int) -> str:
        """Takes the token that was chosen; returns why the grammar failed, and an empty text where it did not."""
        if token not in self._ends:
            self._matcher.consume_token(token)
        return "the grammar of JSON failed for this answer" if self._matcher.is_error() else ""


def open_grammar(tokenizer: Any, ends: Sequence[int]) -> JsonGrammar | None:
    """Returns the grammar; None where llguidance is not installed or cannot read the tokenizer."""
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    try:
        return JsonGrammar(tokenizer, ends)
    except ValueError:
        return None
