"""What is written down about a request: figures, and one line of the log without its text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from finetune.console import log
from finetune.serve.answers import Answer
from finetune.serve.errors import ApiError
from finetune.serve.service import Service

CLIENT_LEFT = 499
"""Status of a request whose client left before the answer. Source: nginx."""


class Record:
    """Measures one request and writes it down at its end.

    Args:
        service: Its metrics and its choice whether text is logged.
        path: Of the request.
        answers: The choices.
        model: Name of the model that answers.

    Attributes:
        status: Of the response.
    """

    def __init__(self, service: Service, *, path: str, answers: Sequence[Answer], model: str) -> None:
        self.status = 200
        self._service, self._path, self._answers, self._model = service, path, answers, model
        self._started = time.monotonic()
        self._has_first = False

    def __enter__(self) -> Record:
        return self

    def first_token(self) -> None:
        """Notes the time of the first token; later calls do nothing."""
        if not self._has_first:
            self._has_first = True
            self._service.metrics.first_token_seconds.observe(time.monotonic() - self._started)

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.status = error.status if isinstance(error, ApiError) else CLIENT_LEFT
        seconds, metrics = time.monotonic() - self._started, self._service.metrics
        read, written = sum(len(answer.prompt) for answer in self._answers), sum(a.tokens for a in self._answers)
        metrics.requests.labels(self._path, self._model, str(self.status)).inc()
        metrics.prompt_tokens.labels(self._model).inc(read)
        metrics.completion_tokens.labels(self._model).inc(written)
        metrics.seconds.labels(self._path).observe(seconds)
        log("serve", f"{self._path} {self._model} {self.status}: {read} + {written} tokens, {seconds:.2f} s")
        if self._service.config.log_text:
            for answer in self._answers:
                log("serve", f"prompt {answer.prompt_text()!r}", f"answer {answer.text!r}")
