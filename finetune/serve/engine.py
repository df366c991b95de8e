"""What every engine offers: token ids in, a stream of tokens out. Servers and chats know nothing else of a model."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = Mapping[str, Any]
"""``role`` and ``content``, as a chat template takes them."""


class RequestRefused(Exception):
    """An engine cannot do what a request asks for; the message says what, and what to ask instead.

    Args:
        message: One sentence for the client.
        parameter: Of the request, e.g. ``messages``.
    """

    def __init__(self, message: str, *, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How one answer is drawn. The neutral values are those of the run's own evaluation: greedy, without penalties.

    Attributes:
        max_tokens: Limit of the answer, the end token included.
        temperature: 0 takes the most probable token.
        top_p: Smallest set of tokens with this probability mass; 1 for all.
        top_k: Number of most probable tokens; 0 for all.
        seed: Of this answer's own generator.
        top_logprobs: Alternatives to return with each token; None returns no log-probabilities.
        every_token: Whether each token must be reported, also where an engine could only send them late.
        json_object: Whether only JSON objects may be written.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    top_logprobs: int | None = None
    every_token: bool = False
    json_object: bool = False


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer, or of a prompt that is scored.

    Attributes:
        id: In the vocabulary.
        text: The text that it completes; empty while a character is incomplete.
        logprob: Of the model itself, before temperature and top_p, in nats; None where not asked for.
        top: The most probable tokens at this place: (id, log-probability), best first.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of an answer.

    Attributes:
        reason: ``stop`` (the model ended it), ``length``, ``cancelled`` or ``error``.
        tokens: Tokens that were generated, the end token included.
        text: What the last tokens leave of an incomplete character.
        error: One sentence, where the reason is ``error``.
    """

    reason: str
    tokens: int
    text: str = ""
    error: str = ""


Event = Token | Finish


class Generation:
    """One answer while it is generated; the engine calls `on_event` from its own thread, `Finish` last.

    Attributes:
        model: Name of the model that answers.
        prompt: Token ids, generation prompt included.
        sampling: How it is drawn.
        cancelled: Whether the engine shall stop.
        on_cancel: What an engine wants to be called then, from the thread that cancels.
    """

    def __init__(
        self, model: str, prompt: Sequence[int], sampling: Sampling, *, on_event: Callable[[Event], None]
    ) -> None:
        self.model, self.prompt, self.sampling = model, list(prompt), sampling
        self.on_event = on_event
        self.on_cancel: Callable[[], None] | None = None
        self.cancelled = False

    def cancel(self) -> None:
        """Stops the generation before its next token."""
        self.cancelled = True
        if self.on_cancel is not None:
            self.on_cancel()

    @property
    def most_tokens(self) -> int:
        """Tokens that prompt and answer can have together."""
        return len(self.prompt) + self.sampling.max_tokens


@dataclass(frozen=True, slots=True)
class Load:
    """How busy an engine is: answers that are generated and that wait, and bytes of the key-value cache."""

    running: int
    waiting: int
    cache_bytes: int


class Engine(Protocol):
    """Generates answers of one or more models that share a tokenizer. Its methods may be called from any thread.

    Attributes:
        context_tokens: Longest prompt and answer together.
        vocabulary: Number of token ids.
        supports_json: Whether `Sampling.json_object` can be kept.
    """

    context_tokens: int
    vocabulary: int
    supports_json: bool

    def names(self) -> list[str]:
        """Returns the models that can be asked now."""

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Returns the token ids of a chat with its generation prompt, by the template of the training.

        Raises:
            RequestRefused: The template cannot render these messages or tools.
        """

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of plain text, with the special tokens that the tokenizer adds."""

    def token_text(self, token: int) -> str:
        """Returns the text of one token, special tokens included."""

    def parse_tools(self, tokens: Sequence[int], prompt: Sequence[int], text: str) -> tuple[str, list[dict[str, str]]]:
        """Returns an answer's text without its tool calls, and those: ``name`` and ``arguments`` (JSON) each."""

    def start(self, generation: Generation) -> None:
        """Queues an answer; `Generation.on_event` gets its tokens."""

    def score(self, model: str, tokens: Sequence[int], *, top: int) -> list[Token]:
        """Returns each token of a text with its log-probability after the ones before it; the first has None."""

    def load(self) -> Load:
        """Returns how busy the engine is."""

    def is_alive(self) -> bool:
        """Returns whether it can still answer."""

    def close(self) -> None:
        """Ends every answer and frees the model."""


def stream(engine: Engine, model: str, prompt: Sequence[int], sampling: Sampling) -> Iterator[Event]:
    """Yields the tokens of one answer and its `Finish`. Closing the iterator stops the generation."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    generation = Generation(model, prompt, sampling, on_event=events.put)
    engine.start(generation)
    try:
        while True:
            event = events.get()
            yield event
            if isinstance(event, Finish):
                return
    finally:
        generation.cancel()
