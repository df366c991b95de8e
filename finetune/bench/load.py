"""Clients that ask a server at the same time, each its own questions, and each checks what it gets.

First one client asks each question alone, which gives the tokens per second of a single client and the answers to
expect. Answers are greedy, so an answer departs from the expected one only by rounding in another batch; it counts as
mixed up where it is the answer to another question.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

Messages = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a server is asked.

    Attributes:
        url: Of the server, e.g. ``http://127.0.0.1:8000``.
        model: Name in the requests.
        questions: Messages of each; the clients take them in turn.
        clients: Number of clients at the same time.
        seconds: Time for which they begin new requests.
        max_tokens: Length of an answer at most.
        pid: Of the server, to watch its memory.
    """

    url: str
    model: str
    questions: Sequence[Messages]
    clients: int
    seconds: float
    max_tokens: int
    pid: int


@dataclass(frozen=True)
class LoadResult:
    """What the clients counted.

    Attributes:
        answers: Complete ones.
        equal: Those that are the expected ones.
        rounded: Those that depart from the expected one, which are nobody else's either.
        mixed_up: Those that are the expected ones of another question.
        errors: One sentence each.
        tokens_per_second_one: Of one client alone.
        tokens_per_second: Of all clients together.
        first_token_seconds: Median time to the first token under load.
        resident_mib_before: Resident memory of the server before the load.
        resident_mib_most: The most during it.
    """

    answers: int
    equal: int
    rounded: int
    mixed_up: int
    errors: list[str]
    tokens_per_second_one: float
    tokens_per_second: float
    first_token_seconds: float | None
    resident_mib_before: int
    resident_mib_most: int


@dataclass(slots=True)
class Totals:
    """What is counted during the load; the fields are those of `LoadResult`."""

    tokens: int = 0
    equal: int = 0
    rounded: int = 0
    mixed_up: int = 0
    errors: list[str] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)


async def measure_load(load: Load) -> LoadResult:
    """Returns the figures of one client and of many."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=load.url, timeout=600.0, trust_env=False, limits=limits) as client:
        alone, started = Totals(), time.monotonic()
        expected = [await _ask(client, load, question, alone) for question in load.questions]
        alone_seconds = time.monotonic() - started
        many, started = Totals(), time.monotonic()
        memory = [_resident_bytes(load.pid)]
        watcher = asyncio.create_task(_watch(load.pid, memory))
        ends = started + load.seconds
        clients = (_client(client, load, index % len(expected), expected, many, ends) for index in range(load.clients))
        await asyncio.gather(*clients)
        many_seconds = time.monotonic() - started
        watcher.cancel()
    latencies = sorted(many.first_seconds)
    return LoadResult(
        answers=many.equal + many.rounded + many.mixed_up,
        equal=many.equal,
        rounded=many.rounded,
        mixed_up=many.mixed_up,
        errors=[*alone.errors, *many.errors],
        tokens_per_second_one=round(alone.tokens / alone_seconds, 2),
        tokens_per_second=round(many.tokens / many_seconds, 2),
        first_token_seconds=round(latencies[len(latencies) // 2], 2) if latencies else None,
        resident_mib_before=memory[0] // 2**20,
        resident_mib_most=max(memory) // 2**20,
    )


async def _client(
    client: httpx.AsyncClient,
    load: Load,
    index: int,
    expected: Sequence[str],
    totals: Totals,
    ends: float,
) -> None:
    """Asks one question again and again, and compares the answer with the expected ones."""
    while time.monotonic() < ends and len(totals.errors) < 100:
        answer = await _ask(client, load, load.questions[index], totals)
        if answer == expected[index]:
            totals.equal += 1
        elif answer in expected:
            totals.mixed_up += 1
        else:
            totals.rounded += 1


async def _ask(client: httpx.AsyncClient, load: Load, question: Messages, totals: Totals) -> str:
    body = {
        "model": load.model,
        "messages": question,
        "max_tokens": load.max_tokens,
        "temperature": 0,
        "stream": True,
    }
    text, started, has_first, count = "", time.monotonic(), False, 0
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                totals.errors.append(f"{response.status_code}: {(await response.aread())[:200]!r}")
                await asyncio.sleep(0.2)
                return ""
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    totals.errors.append(str(event["error"]))
                    break
                piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                if piece and not has_first:
                    has_first = True
                    totals.first_seconds.append(time.monotonic() - started)
                count += bool(piece)
                text += piece
    except httpx.HTTPError as error:
        totals.errors.append(repr(error))
    totals.tokens += count
    return text


def _resident_bytes(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


async def _watch(pid: int, memory: list[int]) -> None:
    while True:
        memory.append(_resident_bytes(pid))
        await asyncio.sleep(1.0)
