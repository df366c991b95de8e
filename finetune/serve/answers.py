"""One answer on its way to a client: text cut at stop strings, log-probabilities, and how it ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from finetune.serve.engine import Engine, Event, Generation, Sampling, Token
from finetune.serve.errors import ApiError
from finetune.serve.text import StopStrings


@dataclass(slots=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: May be empty.
        tokens: With log-probabilities where asked for.
        finish: Why the answer ended: ``stop`` or ``length``; None while it continues.
    """

    text: str
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None


class Answer:
    """One choice of a response.

    Args:
        engine: Generates it.
        model: Name of the model that answers.
        prompt: Token ids.
        sampling: How it is drawn.
        stops: Strings that end it.

    Attributes:
        text: What was sent so far.
        tokens: Tokens that were generated so far, in the end with the end token.
    """

    def __init__(
        self, engine: Engine, model: str, prompt: Sequence[int], sampling: Sampling, *, stops: Sequence[str]
    ) -> None:
        self.prompt, self.text, self.tokens = prompt, "", 0
        self._engine, self._stops = engine, StopStrings(stops)
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended, and nobody reads
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self.generation = Generation(model, prompt, sampling, on_event=deliver)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yields the answer as it is generated.

        Raises:
            ApiError: The engine failed.
        """
        self._engine.start(self.generation)
        try:
            while True:
                event = await self._events.get()
                piece = self._piece(event)
                self.text += piece.text
                yield piece
                if piece.finish is not None:
                    return
        finally:
            self.generation.cancel()

    def prompt_text(self) -> str:
        """Returns the prompt as text, for the log."""
        return "".join(map(self._engine.token_text, self.prompt))

    def _piece(self, event: Event) -> Piece:
        if isinstance(event, Token):
            self.tokens += 1
            text = self._stops.add(event.text)
            return Piece(text, [event], "stop" if self._stops.found else None)
        if event.reason == "error":
            raise ApiError(500, event.error, code="engine_error")
        self.tokens = event.tokens
        text = self._stops.add(event.text)
        return Piece(text + self._stops.flush(), finish="stop" if self._stops.found else event.reason)
