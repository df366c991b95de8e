"""Guards in front of every request: key, host, body size and form; and a stream that always gives back its place."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import Counter

from finetune.serve.config import MIB, ServeConfig, is_loopback
from finetune.serve.errors import ApiError

Result = TypeVar("Result")

PUBLIC = ("/health", "/", "/page.css", "/page.js")
"""Paths that need no key: a load balancer asks for health, and the page has a field for the key."""


class Guard:
    """Refuses requests without the key, and, where there is no key, those addressed to another host.

    A page that a browser opened elsewhere can send requests to this machine's own address, under a name of its own.

    Args:
        app: What comes after.
        config: Key and host.
        errors: Counts refusals by status.
    """

    def __init__(self, app: Any, *, config: ServeConfig, errors: Counter) -> None:
        self._app, self._config, self._errors = app, config, errors

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            self._errors.labels(error.status).inc()
            headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
            await JSONResponse(error.body(), error.status, headers)(scope, receive, send)

    def _refusal(self, scope: Any) -> ApiError | None:
        headers = dict(scope["headers"])
        key = self._config.api_key
        if key:
            given = headers.get(b"authorization", b"")
            if scope["path"] in PUBLIC or hmac.compare_digest(given, f"Bearer {key}".encode()):
                return None
            how = "is missing; send Authorization: Bearer KEY" if not given else "is wrong"
            return ApiError(401, f"the API key {how}", code="invalid_api_key")
        host = headers.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0].strip("[]")
        if not is_loopback(host):
            return ApiError(403, f"this server answers requests to this machine's own address; got {host!r}")
        return None


async def read_json(request: Request, config: ServeConfig) -> Any:
    """Reads a request's body.

    Raises:
        ApiError: 415, 413 or 400: it has another type, is too large, or is not JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"send Content-Type: application/json; got {kind or 'none'}")
    body = await in_time(config.request_seconds, _read(request, config))
    try:
        content = json.loads(body)
        json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON in UTF-8: {error}", code="invalid_json") from error
    return content


async def _read(request: Request, config: ServeConfig) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > config.max_body_mib * MIB:
            raise ApiError(413, f"the body is larger than {config.max_body_mib} MiB; shorten it", code="body_too_large")
    return bytes(body)


class EventStream(StreamingResponse):
    """Streams events, and calls ``release`` at its end, also where the client left before the first one."""

    def __init__(self, content: Any, *, release: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._release = release

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]
            self._release()


def event(content: Any) -> str:
    """Returns one server-sent event."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n"


async def in_time(seconds: float, work: Coroutine[Any, Any, Result]) -> Result:
    """Returns the result of some work.

    Raises:
        ApiError: It took longer; it was stopped.
    """
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError as error:
        raise timed_out(seconds) from error


def timed_out(seconds: float) -> ApiError:
    """Returns the error of a request that took too long."""
    return ApiError(504, f"the request took longer than {seconds:g} seconds; ask for fewer tokens", code="timeout")


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """Returns the result of some work; None where the client left before, and the work was stopped."""
    task, gone = asyncio.create_task(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()
