"""Requests to servers of other programs: a cancelled answer hangs up, and errors are told in their own words."""

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from finetune.serve.engine import Generation, Sampling
from finetune.serve.upstream import Upstream, UpstreamError
from tests.fixtures.served import wait_until

Reply = Callable[[socket.socket], None]


@pytest.fixture
def upstream() -> Iterator[Callable[[Reply], Upstream]]:
    """Makes a server that reads one request and answers by a function of the connection."""
    listeners: list[socket.socket] = []

    def make(reply: Reply) -> Upstream:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                request = b""
                while not request.endswith(b"\r\n\r\n{}"):
                    request += connection.recv(65536)
                reply(connection)

        threading.Thread(target=serve, daemon=True).start()
        return Upstream(f"http://127.0.0.1:{listener.getsockname()[1]}", "key")

    yield make
    for listener in listeners:
        listener.close()


def generation() -> Generation:
    return Generation("tiny", [1], Sampling(max_tokens=1), on_event=lambda _: None)


def response(status: str, body: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def test_cancelled_answer_hangs_up_while_nothing_arrives(upstream: Callable[[Reply], Upstream]) -> None:
    left = threading.Event()

    def wait_for_the_end(connection: socket.socket) -> None:
        if connection.recv(1) == b"":
            left.set()

    asked, events = generation(), []
    server = upstream(wait_for_the_end)
    reader = threading.Thread(target=lambda: events.extend(server.stream("/completion", {}, asked)))
    reader.start()
    wait_until(lambda: asked.on_cancel is not None)
    asked.cancel()
    reader.join(10)
    assert not reader.is_alive()
    assert left.wait(10)
    assert events == []


def test_generation_that_was_cancelled_before_ends_at_once(upstream: Callable[[Reply], Upstream]) -> None:
    asked = generation()
    asked.cancel()
    assert list(upstream(lambda connection: None).stream("/completion", {}, asked)) == []


def test_events_of_a_stream_are_read_to_its_end(upstream: Callable[[Reply], Upstream]) -> None:
    body = 'data: {"a": 1}\n\n: comment\n\ndata: {"a": 2}\n\ndata: [DONE]\n\n'
    server = upstream(lambda connection: connection.sendall(response("200 OK", body)))
    assert list(server.stream("/completion", {}, generation())) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("body", "message"),
    [('{"error": {"message": "too long"}}', "too long"), ('{"error": "no"}', "no"), ("broken", "broken"), ("", "Bad")],
)
def test_errors_are_in_the_words_of_the_server(body: str, message: str, upstream: Callable[[Reply], Upstream]) -> None:
    server = upstream(lambda connection: connection.sendall(response("400 Bad", body)))
    with pytest.raises(UpstreamError, match=f"^{message}$") as caught:
        server.ask("/tokenize", {})
    assert caught.value.status == 400


def test_server_that_is_gone_is_an_error(upstream: Callable[[Reply], Upstream]) -> None:
    with pytest.raises(UpstreamError, match="the connection failed"):
        upstream(lambda connection: None).ask("/tokenize", {})
