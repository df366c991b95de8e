"""What the server does with a request, whatever brought it: finds the model, checks limits, starts the answers."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager

from finetune.serve.answers import Answer, Piece
from finetune.serve.config import ServeConfig
from finetune.serve.engine import Engine, Sampling
from finetune.serve.errors import ApiError
from finetune.serve.metrics import Metrics
from finetune.serve.requests import ChatRequest, CompletionRequest, Request

ALIAS = "adapter"
"""Another name of the first model where that one is an adapter."""


class Service:
    """The models behind a server, and how much may be asked of them.

    Args:
        engines: Each with one or more models; the first model is the run's own.
        config: Limits.

    Attributes:
        draining: Whether new requests are refused, since the server ends.
        open: Answers that are generated or wait.
    """

    def __init__(self, engines: Sequence[Engine], config: ServeConfig) -> None:
        self.engines, self.config = list(engines), config
        self.metrics = Metrics(lambda: self.engines)
        self.draining = False
        self.open = 0

    def names(self) -> list[str]:
        """Returns the models that can be asked."""
        return [name for engine in self.engines for name in engine.names()]

    def find(self, model: str) -> tuple[Engine, str]:
        """Returns the engine of a model, and its name.

        Raises:
            ApiError: There is no such model.
        """
        name = self.names()[0] if model == ALIAS and ALIAS not in self.names() else model
        for engine in self.engines:
            if name in engine.names():
                return engine, name
        raise ApiError(
            404,
            f"the model {model!r} is not served here; ask one of {', '.join(self.names())}",
            parameter="model",
            code="model_not_found",
        )

    @contextmanager
    def slots(self, count: int) -> Iterator[None]:
        """Counts answers as open.

        Raises:
            ApiError: The server ends, or too many wait already.
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down; ask another one", code="draining")
        if self.open + count > self.config.concurrent + self.config.waiting:
            raise ApiError(
                429, f"{self.open} answers are generated or wait already; try again later", code="queue_full"
            )
        self.open += count
        try:
            yield
        finally:
            self.open -= count

    def answers(self, engine: Engine, model: str, prompts: Sequence[Sequence[int]], request: Request) -> list[Answer]:
        """Returns the choices of a request in their order, ``n`` for each prompt; nothing is generated yet.

        Raises:
            ApiError: A prompt or the answer is too long, or something cannot be kept by the model's engine.
        """
        limit = self._output_limit(request)
        has_calls = isinstance(request, ChatRequest) and bool(request.tools)  # read out of the tokens
        seed = secrets.randbits(62) if request.seed is None else request.seed
        answers: list[Answer] = []
        for prompt in prompts:
            tokens = self._answer_tokens(engine, prompt, limit)
            for _ in range(request.n or 1):
                sampling = Sampling(
                    max_tokens=tokens,
                    temperature=request.temperature or 0.0,
                    top_p=1.0 if request.top_p is None else request.top_p,
                    top_k=request.top_k or 0,
                    seed=(seed + len(answers)) % 2**63,
                    top_logprobs=_top_logprobs(request),
                    every_token=request.return_token_ids or has_calls or _top_logprobs(request) is not None,
                    json_object=self._is_json(engine, request),
                )
                answers.append(Answer(engine, model, prompt, sampling, stops=request.stops()))
        return answers

    def _output_limit(self, request: Request) -> int | None:
        name, limit = "max_tokens", request.max_tokens
        if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
            name, limit = "max_completion_tokens", request.max_completion_tokens
        if limit is not None and limit > self.config.max_output_tokens:
            raise ApiError(
                400,
                f"{name}: this server writes at most {self.config.max_output_tokens} tokens; got {limit}",
                parameter=name,
            )
        if limit == 0 and (request.stream or not (isinstance(request, CompletionRequest) and request.echo)):
            raise ApiError(
                400,
                f"{name}: must be at least 1, but for a completion with echo and without stream; got 0",
                parameter=name,
            )
        return limit

    def _answer_tokens(self, engine: Engine, prompt: Sequence[int], limit: int | None) -> int:
        """Returns how long the answer to a prompt may become."""
        context, most = engine.context_tokens, self.config.max_prompt_tokens
        if most is not None and len(prompt) > most:
            raise _too_long(f"this server reads at most {most} tokens; the prompt has {len(prompt)}")
        wanted = 1 if limit is None else limit
        if len(prompt) + wanted > context:
            raise _too_long(
                f"this model's maximum context length is {context} tokens; the prompt has {len(prompt)}"
                + (f" and {limit} more were asked for" if limit else "")
            )
        outside = [token for token in prompt if not 0 <= token < engine.vocabulary]
        if outside:
            raise ApiError(
                400, f"prompt: token ids are below {engine.vocabulary}; got {outside[0]}", parameter="prompt"
            )
        return min(self.config.max_output_tokens, context - len(prompt)) if limit is None else limit

    @staticmethod
    def _is_json(engine: Engine, request: Request) -> bool:
        wanted = isinstance(request, ChatRequest) and request.response_format is not None
        if not wanted or request.response_format.type == "text":  # type: ignore[attr-defined]
            return False
        if not engine.supports_json:
            raise ApiError(
                400,
                "response_format json_object cannot be kept for this model: llguidance is not installed (pip install "
                "'finetune-qlora[serve]') or cannot read its tokenizer; ask for JSON in the messages",
                parameter="response_format",
                code="unsupported_parameter",
            )
        return True


def _too_long(message: str) -> ApiError:
    return ApiError(400, f"{message}; shorten it", parameter="messages", code="context_length_exceeded")


def _top_logprobs(request: Request) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    if isinstance(request, ChatRequest) and request.logprobs:
        return request.top_logprobs or 0
    return None


async def merged(answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, Piece]]:
    """Yields the pieces of several answers as they come, each with the answer's index.

    Raises:
        ApiError: One of them failed; the others are stopped.
    """
    arrived: asyncio.Queue[tuple[int, Piece] | int | Exception] = asyncio.Queue()

    async def read(index: int, answer: Answer) -> None:
        try:
            async for piece in answer.pieces():
                arrived.put_nowait((index, piece))
            arrived.put_nowait(index)
        except ApiError as error:
            arrived.put_nowait(error)

    tasks = [asyncio.create_task(read(index, answer)) for index, answer in enumerate(answers)]
    try:
        running = len(tasks)
        while running:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if isinstance(item, int):
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()


async def wholes(answers: Sequence[Answer]) -> list[Piece]:
    """Returns the whole answers in their order."""
    collected = [Piece("") for _ in answers]
    async for index, piece in merged(answers):
        whole = collected[index]
        whole.text, whole.finish = whole.text + piece.text, piece.finish
        whole.tokens += piece.tokens
    return collected
