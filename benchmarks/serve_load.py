"""Measures a server under load: ``python -m benchmarks.serve_load URL --model NAME --clients 50 --seconds 120``.

Any OpenAI-compatible server can be measured. First one client asks every question alone, which gives the tokens per
second of a single client and the answers to expect. Then all clients ask at the same time, each its own questions, and
each compares what it gets. Answers are greedy, so an answer differs from the expected one only by rounding in another
batch; it counts as mixed up where it is closer to another client's answer than to its own.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

TOPICS = ("rivers", "copper", "the moon", "bread", "chess", "whales", "clocks", "paper", "Rome", "rain")


@dataclass(slots=True)
class Totals:
    """What the clients counted.

    Attributes:
        tokens: Generated.
        equal: Answers that are the expected ones.
        rounded: Answers that depart from the expected one, and are still closest to it.
        mixed_up: Answers that are closer to another question's.
        errors: One sentence each.
        first_seconds: Time to the first token of each answer.
    """

    tokens: int = 0
    equal: int = 0
    rounded: int = 0
    mixed_up: int = 0
    errors: list[str] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server, e.g. http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--pid", type=int, help="of the server, to watch its memory")
    arguments = parser.parse_args()
    result = asyncio.run(measure(arguments))
    for error in result["errors"][:5]:
        print(error)
    print(json.dumps({**result, "errors": len(result["errors"])}))


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of one client and of many."""
    questions = [f"Tell me {number + 2} facts about {TOPICS[number % 10]}." for number in range(arguments.clients)]
    key = os.environ.get("FINETUNE_API_KEY", "unused")
    headers = {"Authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=arguments.url, headers=headers, timeout=600.0, trust_env=False, limits=limits
    ) as client:
        alone, started = Totals(), time.monotonic()
        expected = [await _ask(client, arguments, question, alone) for question in questions]
        alone_seconds = time.monotonic() - started
        many, started = Totals(), time.monotonic()
        memory: list[int] = [_resident_bytes(arguments.pid)]
        watcher = asyncio.create_task(_watch(arguments.pid, memory))
        ends = started + arguments.seconds
        await asyncio.gather(*[
            _client(client, arguments, index, questions, expected, many, ends) for index in range(arguments.clients)
        ])  # fmt: skip
        many_seconds = time.monotonic() - started
        watcher.cancel()
    one, all_ = alone.tokens / alone_seconds, many.tokens / many_seconds
    latencies = sorted(many.first_seconds)
    return {
        "clients": arguments.clients,
        "seconds": round(many_seconds, 1),
        "answers": many.equal + many.rounded + many.mixed_up,
        "equal": many.equal,
        "rounded": many.rounded,
        "mixed_up": many.mixed_up,
        "errors": [*alone.errors, *many.errors],
        "tokens_per_second_one": round(one, 2),
        "tokens_per_second": round(all_, 2),
        "ratio": round(all_ / one, 2) if one else None,
        "first_token_seconds_median": round(latencies[len(latencies) // 2], 2) if latencies else None,
        "resident_mib_before": memory[0] // 2**20,
        "resident_mib_most": max(memory) // 2**20,
    }


async def _client(
    client: httpx.AsyncClient, arguments: argparse.Namespace, index: int, questions: Sequence[str],
    expected: Sequence[str], totals: Totals, ends: float,
) -> None:  # fmt: skip
    """Asks its own question again and again, and compares the answer with the expected ones."""
    while time.monotonic() < ends and len(totals.errors) < 100:
        answer = await _ask(client, arguments, questions[index], totals)
        closest = max(range(len(expected)), key=lambda other: (_common(answer, expected[other]), other == index))
        if answer == expected[index]:
            totals.equal += 1
        elif _common(answer, expected[closest]) > _common(answer, expected[index]):
            totals.mixed_up += 1
        else:
            totals.rounded += 1


async def _ask(client: httpx.AsyncClient, arguments: argparse.Namespace, question: str, totals: Totals) -> str:
    body = {
        "model": arguments.model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": arguments.max_tokens,
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


def _common(one: str, other: str) -> int:
    """Returns the number of characters that both begin with."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (mine, theirs) in enumerate(pairs) if mine != theirs), min(len(one), len(other)))


def _resident_bytes(pid: int | None) -> int:
    return int(psutil.Process(pid).memory_info().rss) if pid else 0


async def _watch(pid: int | None, memory: list[int]) -> None:
    while True:
        memory.append(_resident_bytes(pid))
        await asyncio.sleep(1.0)


if __name__ == "__main__":
    main()
