"""Asks the server of another program on this machine: JSON, and streams that end where their answer is cancelled."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from finetune.openai_api import error_message
from finetune.serve.engine import Event, Finish, Generation

DATA = b"data: "


class UpstreamError(Exception):
    """The other server refuses, or the connection failed.

    Args:
        status: Of HTTP; 0 where there was no response.
        message: What the server says.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Upstream:
    """One server.

    Args:
        address: As ``http://127.0.0.1:8000``.
        key: Sent as ``Authorization: Bearer KEY``.
    """

    def __init__(self, address: str, key: str) -> None:
        parts = urllib.parse.urlsplit(address)
        self._host, self._port = parts.hostname or "", parts.port
        self._headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}

    def ask(self, path: str, body: Mapping[str, Any] | None = None, *, generation: Generation | None = None) -> Any:
        """Returns the response's JSON, or its text where it is not JSON; a POST with a body, a GET without.

        Raises:
            UpstreamError: The server refuses, or cannot be reached.
        """
        with self._response(path, body, generation) as response:
            text = response.read().decode()
        try:
            return json.loads(text)
        except ValueError:
            return text

    def stream(self, path: str, body: Mapping[str, Any], generation: Generation) -> Iterator[dict[str, Any]]:
        """Yields the events of an answer; ends early where the generation is cancelled, which closes the connection.

        Raises:
            UpstreamError: The server refuses, or cannot be reached.
        """
        try:
            with self._response(path, body, generation) as response:
                for line in response:
                    if line.startswith(DATA) and not line.startswith(DATA + b"[DONE]"):
                        yield json.loads(line[len(DATA) :])
        except UpstreamError:
            if not generation.cancelled:
                raise

    @contextmanager
    def _response(
        self, path: str, body: Mapping[str, Any] | None, generation: Generation | None
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self._host, self._port)  # does not ask a proxy
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", path, data, self._headers)
            if generation is not None:
                _end_with(generation, connection.sock)
            response = connection.getresponse()
            if response.status >= 400:
                raise UpstreamError(response.status, error_message(response.read(), reason=response.reason))
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise UpstreamError(0, f"the connection failed: {error!r}") from error
        finally:
            connection.close()


def _end_with(generation: Generation, connected: socket.socket) -> None:
    """Closes the connection when the generation is cancelled, also while nothing arrives."""

    def hang_up() -> None:
        with contextlib.suppress(OSError):  # it is closed
            connected.shutdown(socket.SHUT_RDWR)

    generation.on_cancel = hang_up
    if generation.cancelled:
        hang_up()


def deliver(events: Iterator[Event], generation: Generation, *, running: set[Generation], program: str) -> None:
    """Passes an answer's events on as they come, and at last how it ended, errors of the other server included.

    Args:
        events: Tokens, and one `Finish`.
        generation: The answer; it leaves ``running``.
        running: Answers of the engine.
        program: Name of the other server, for errors.
    """
    finish = Finish("error", 0, error=f"{program} ended the answer without a reason")
    try:
        for event in events:
            if isinstance(event, Finish):
                finish = event
            else:
                generation.on_event(event)
    except (UpstreamError, ValueError, KeyError) as error:
        finish = Finish("error", 0, error=f"{program} failed: {error}")
    finally:
        running.discard(generation)
        generation.on_event(Finish("cancelled", 0) if generation.cancelled else finish)


def free_port() -> int:
    """Returns a port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
