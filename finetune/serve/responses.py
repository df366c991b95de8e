"""Responses in OpenAI's form."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.serve.answers import Answer
from finetune.serve.engine import Token

TokenText = Callable[[int], str]


@dataclass(frozen=True, kw_only=True)
class ResponseHead:
    """What every part of one response repeats.

    Attributes:
        kind: ``chat.completion`` or ``text_completion``.
        model: Name of the model that answers.
    """

    kind: str
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choices: Sequence[Mapping[str, Any]], *, chunk: bool = False) -> dict[str, Any]:
        """Returns a response, or one chunk of a stream."""
        is_chat = self.kind == "chat.completion"
        return {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{self.id}",
            "object": f"{self.kind}.chunk" if chunk and is_chat else self.kind,
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
        }


def usage(answers: Sequence[Answer], choices: int | None) -> dict[str, int]:
    """Returns the count of tokens: each prompt once, and every token of each choice, the end token included."""
    prompt_tokens = sum(len(answer.prompt) for answer in answers[:: choices or 1])
    completion_tokens = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def chat_logprobs(tokens: Sequence[Token], text: TokenText) -> dict[str, Any]:
    """Returns ``choices[].logprobs`` of a chat."""
    return {
        "content": [
            {
                **_entry(text(token.id), token.logprob),
                "top_logprobs": [_entry(text(other), logprob) for other, logprob in token.top],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def completion_logprobs(tokens: Sequence[Token], text: TokenText, *, offset: int = 0) -> dict[str, Any]:
    """Returns ``choices[].logprobs`` of a completion; ``offset`` is the number of characters before the tokens."""
    texts = [text(token.id) for token in tokens]
    offsets = [offset + sum(map(len, texts[:index])) for index in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            None if token.logprob is None else {text(other): logprob for other, logprob in token.top}
            for token in tokens
        ],
        "text_offset": offsets,
    }


def _entry(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def tool_calls(calls: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Returns ``message.tool_calls``."""
    return [
        {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": dict(call), "index": index}
        for index, call in enumerate(calls)
    ]
