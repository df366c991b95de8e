"""Conversations that a chat template is tried on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune.console import log
from finetune.data.config import DataConfig
from finetune.data.conversation import Conversation, Message
from finetune.data.read import resolve_formats
from finetune.data.sources import resolve_sources
from finetune.data.worker import read

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city."}},
            "required": ["city"],
        },
    },
}

PROVED_ROWS = 5
"""Rows of each file that are compared."""


def proof_chats() -> Iterator[tuple[str, Conversation]]:
    """Yields conversations by name: one exchange, several, system, tools, thoughts, white space, repeated roles."""
    yield "one exchange", Conversation([_user("What is up?"), _answer("The sky.")])
    yield (
        "two exchanges",
        Conversation([_user("What is up?"), _answer("The sky."), _user("And down?"), _answer("The\nsoil.")]),
    )
    yield "system message", Conversation([_system(), _user("What is up?"), _answer("The sky.")])
    call, result = _call("Rome", "call00001"), _result("sunny", "call00001")
    yield "tools", Conversation([_user("Is it sunny in Rome?"), call, result, _answer("Yes.")], tools=[TOOL])
    thought = {"reasoning_content": "They ask about the sky."}
    yield "thoughts", Conversation([_user("What is up?"), _answer("The sky.", **thought)])
    yield (
        "thoughts, two exchanges",
        Conversation([_user("What is up?"), _answer("The sky.", **thought), _user("And down?"),
                      _answer("The soil.", reasoning_content="Now the opposite.")]),
    )  # fmt: skip
    yield (
        "thoughts and tools",
        Conversation([_user("Is it sunny in Rome?"), {**call, **thought}, result, _answer("Yes.", **thought)],
                     tools=[TOOL]),
    )  # fmt: skip
    yield "white space", Conversation([_user("What is up?"), _answer("\n  The sky. \n")])
    results = [_result("sunny", "call00001"), _result("rainy", "call00002")]
    both = {**call, "tool_calls": [*call["tool_calls"], *_call("Oslo", "call00002")["tool_calls"]]}
    yield "two tool results", Conversation([_user("Rome or Oslo?"), both, *results, _answer("Rome.")], tools=[TOOL])
    yield "two questions in a row", Conversation([_user("What is up?"), _user("Say it."), _answer("The sky.")])


def first_rows(config: DataConfig) -> Iterator[tuple[str, Conversation]]:
    """Yields the first conversations of the data by file and line; none of the hub, which would be downloaded."""
    if config.hub or any(entry.hub for entry in config.sources.values()):
        log("data", "the rows come from the hub, and are not compared here")
        return
    sources = resolve_sources(config)
    for number, (name, columns) in resolve_formats(sources).items():
        for line, value in sources[number].rows(PROVED_ROWS):
            conversation = read(value, name, columns)
            if conversation.parts is None:
                yield f"{sources[number].name}:{line}", conversation


def _system() -> Message:
    return {"role": "system", "content": "Answer in one sentence."}


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _answer(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def _call(city: str, identifier: str) -> Message:
    function = {"name": "weather", "arguments": {"city": city}}
    return _answer("", tool_calls=[{"type": "function", "id": identifier, "function": function}])


def _result(content: str, identifier: str) -> Message:
    return {"role": "tool", "name": "weather", "tool_call_id": identifier, "content": content}
