"""Turns pieces of answers into the choices of a response, whole or streamed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

from finetune.serve.answers import Answer, Piece
from finetune.serve.engine import Engine, Token
from finetune.serve.requests import ChatRequest, CompletionRequest
from finetune.serve.responses import chat_logprobs, completion_logprobs, tool_calls


class Writer(Protocol):
    """Writes the choices of one kind of response. Indices are those of the answers."""

    async def prepare(self) -> None:
        """Computes what must be known before the response starts."""

    def first(self, index: int) -> dict[str, Any]:
        """Returns the choice that opens a stream."""

    def chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """Returns the choice of one chunk; None while nothing can be sent."""

    def whole(self, index: int, piece: Piece) -> dict[str, Any]:
        """Returns the choice of a response that is not streamed."""


class ChatWriter:
    """Writes chat completions."""

    def __init__(self, engine: Engine, request: ChatRequest, answers: Sequence[Answer]) -> None:
        self._engine, self._request, self._answers = engine, request, answers
        self._has_tools = bool(request.tools) and request.tool_choice != "none"
        self._pending = [Piece("") for _ in answers]

    async def prepare(self) -> None:
        """Needs nothing."""

    def first(self, index: int) -> dict[str, Any]:
        """Returns a delta with the role."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """Returns a delta; with tools only one at the end, since a call is known when it is complete."""
        if self._has_tools:
            pending = self._pending[index]
            pending.text, pending.finish = pending.text + piece.text, piece.finish
            pending.tokens += piece.tokens
            if piece.finish is None:
                return None
            piece = pending
        elif not (piece.text or piece.finish or self._request.logprobs or self._request.return_token_ids):
            return None
        delta, finish = self._message(index, piece)
        return {"index": index, "delta": delta, **self._details(index, piece), "finish_reason": finish}

    def whole(self, index: int, piece: Piece) -> dict[str, Any]:
        """Returns a message."""
        message, finish = self._message(index, piece)
        message = {"role": "assistant", "content": None, "refusal": None, **message}
        for call in message.get("tool_calls", []):
            del call["index"]  # of chunks only
        return {"index": index, "message": message, **self._details(index, piece), "finish_reason": finish}

    def _message(self, index: int, piece: Piece) -> tuple[dict[str, Any], str | None]:
        """Returns the content, without the tool calls that it has and with them apart, and the finish reason."""
        if not self._has_tools:
            return ({"content": piece.text} if piece.text or piece.finish is None else {"content": ""}), piece.finish
        tokens = [token.id for token in piece.tokens]
        text, calls = self._engine.parse_tools(tokens, self._answers[index].prompt, piece.text)
        if not calls:
            return {"content": text}, piece.finish
        return {"content": text or None, "tool_calls": tool_calls(calls)}, "tool_calls"

    def _details(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = chat_logprobs(piece.tokens, self._engine.token_text) if self._request.logprobs else None
        return {"logprobs": logprobs, **_token_ids(self._request, piece)}


class CompletionWriter:
    """Writes text completions, with the prompt before them where ``echo`` asks for it."""

    def __init__(self, engine: Engine, model: str, request: CompletionRequest, answers: Sequence[Answer]) -> None:
        self._engine, self._model, self._request, self._answers = engine, model, request, answers
        self._prompts: list[list[Token]] = [[] for _ in answers]
        self._characters = [0 for _ in answers]

    async def prepare(self) -> None:
        """Scores the prompts where ``echo`` and ``logprobs`` ask for it.

        Raises:
            RequestRefused: The engine cannot.
        """
        if not self._request.echo:
            return
        for index, answer in enumerate(self._answers):
            repeated = index and answer.prompt is self._answers[index - 1].prompt
            if repeated:
                self._prompts[index] = self._prompts[index - 1]
            elif self._request.logprobs is None:
                self._prompts[index] = [Token(token, self._engine.token_text(token)) for token in answer.prompt]
            else:
                self._prompts[index] = await asyncio.to_thread(
                    self._engine.score, self._model, answer.prompt, top=self._request.logprobs
                )

    def first(self, index: int) -> dict[str, Any]:
        """Returns the prompt where it is echoed; an empty text otherwise."""
        return self._choice(index, Piece("".join(token.text for token in self._prompts[index]), self._prompts[index]))

    def chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """Returns a part of the text."""
        if not (piece.text or piece.tokens or piece.finish):
            return None
        return self._choice(index, piece)

    def whole(self, index: int, piece: Piece) -> dict[str, Any]:
        """Returns the whole text."""
        prompt = self._prompts[index]
        text = "".join(token.text for token in prompt) + piece.text
        return self._choice(index, Piece(text, [*prompt, *piece.tokens], piece.finish))

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self._request.logprobs is not None:
            logprobs = completion_logprobs(piece.tokens, self._engine.token_text, offset=self._characters[index])
        self._characters[index] += len(piece.text)
        choice = {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}
        return {**choice, **_token_ids(self._request, piece)}


def _token_ids(request: ChatRequest | CompletionRequest, piece: Piece) -> dict[str, Any]:
    return {"token_ids": [token.id for token in piece.tokens]} if request.return_token_ids else {}
