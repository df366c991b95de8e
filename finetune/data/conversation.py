"""Conversation: the one form that every format is read into and that the renderer takes."""

import json
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""``role`` and ``content``, perhaps ``tool_calls``, ``name``, ``tool_call_id``: the keys that chat templates read."""


class BadRow(Exception):
    """A row that cannot be used.

    Args:
        reason: The rule that it breaks: a short sentence that the ledger counts.
        detail: The value that breaks the rule.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


@dataclass(slots=True)
class Conversation:
    """Turns for a chat template, or raw text where ``parts`` is set.

    Attributes:
        messages: The turns; the last one is the answer.
        train: One entry per message: whether it is trained on, or None where the row does not say.
        tools: JSON schemas of the tools that the model can call.
        parts: Pieces of raw text and whether each is trained on, instead of messages.
        rejected: The worse answer, for preference objectives.
        desirable: For unpaired preference: whether the answer is a good one.
        tests: For code: the tests that judge the answer; for the evaluation only, the model never sees them.
        needs_answer: Whether an empty last turn is an error; a prompt may be without a reference.
    """

    messages: list[Message]
    train: list[bool | None] | None = None
    tools: list[Any] | None = None
    parts: list[tuple[str, bool]] | None = None
    rejected: Message | None = None
    desirable: bool | None = None
    tests: Any = None
    needs_answer: bool = True

    @property
    def answer(self) -> str:
        """Returns the text of the last turn."""
        if self.parts is not None:
            return self.parts[-1][0]
        return self.messages[-1]["content"] or ""


def chat_before(conversation: Conversation, *, system: str | None) -> str | None:
    """Returns what a client would send for the last turn: messages and tools, as JSON; None for raw text.

    Args:
        conversation: With the last turn.
        system: Precedes a conversation without a system message.
    """
    if conversation.parts is not None:
        return None
    messages = conversation.messages[:-1]
    if system is not None and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": system}, *messages]
    chat = {"messages": messages, **({"tools": conversation.tools} if conversation.tools else {})}
    return json.dumps(chat)


def check(conversation: Conversation, train_roles: frozenset[str]) -> None:
    """Checks that roles alternate in a way that chat templates support, and that there is an answer.

    Raises:
        BadRow: Names the broken rule and the turn.
    """
    if conversation.parts is not None:
        if not conversation.parts[-1][0].strip():
            raise BadRow("the text is empty")
        return
    messages = conversation.messages
    if not messages:
        raise BadRow("there are no messages")
    before = ""
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role == "system" and before not in ("", "system"):
            raise BadRow("a system message follows other turns", f"message {number}")
        if role == before and role in ("user", "assistant"):
            raise BadRow(f"two {role} turns in a row", f"messages {number - 1} and {number}")
        if role == "assistant" and before in ("", "system"):
            raise BadRow("the first turn is the assistant's, so there is no question", f"message {number}")
        if role == "tool" and before not in ("assistant", "tool"):
            raise BadRow("a tool result follows no assistant turn", f"message {number}")
        before = role
    if before != "assistant":
        raise BadRow("the last turn is not the assistant's, so there is no answer", f"it is the {before}'s")
    last = messages[-1]
    if conversation.needs_answer and not last["content"].strip() and not last.get("tool_calls"):
        raise BadRow("the answer is empty")
    if not any(trained_turns(conversation, train_roles)):
        raise BadRow("no turn is trained on", f"roles {', '.join(m['role'] for m in messages)}")


def trained_turns(conversation: Conversation, train_roles: frozenset[str]) -> list[bool]:
    """Returns whether each message is trained on: by its own mark, or else by its role."""
    roles = [message["role"] in train_roles for message in conversation.messages]
    if conversation.train is None:
        return roles
    return [by_role if mark is None else mark for mark, by_role in zip(conversation.train, roles, strict=True)]
