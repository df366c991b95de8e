"""The one intermediate form: what every format becomes, and what every renderer gets."""

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""``role`` and ``content``, perhaps ``tool_calls``, ``name``, ``tool_call_id``: what chat templates read."""


class BadRow(Exception):
    """A row that cannot be used.

    Args:
        reason: What rule it breaks: a short sentence that is counted in the ledger.
        detail: The value that broke it.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


@dataclass(slots=True)
class Conversation:
    """Turns for a chat template, or raw text where ``parts`` is given.

    Attributes:
        messages: The turns; the last one is the answer.
        train: One entry per message: True, False, or None where the row does not say.
        tools: JSON schemas of the tools that the model may call.
        parts: Raw text with whether it is trained, in place of messages.
        rejected: The worse answer, for preference objectives.
        desirable: For unpaired preference: whether the answer is one to learn.
        tests: For code: what judges the answer, as the row has it; kept for the evaluation and never shown to the model.
    """

    messages: list[Message]
    train: list[bool | None] | None = None
    tools: list[Any] | None = None
    parts: list[tuple[str, bool]] | None = None
    rejected: Message | None = None
    desirable: bool | None = None
    tests: Any = None

    @property
    def answer(self) -> str:
        """The text that the last turn ends with."""
        if self.parts is not None:
            return self.parts[-1][0]
        return self.messages[-1]["content"] or ""


def check(conversation: Conversation, train_roles: frozenset[str]) -> None:
    """Refuses what no chat template can mean.

    Raises:
        BadRow: Names the rule and the turn.
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
            raise BadRow("a system message stands after other turns", f"message {number}")
        if role == before and role in ("user", "assistant"):
            raise BadRow(f"two {role} turns in a row", f"messages {number - 1} and {number}")
        if role == "assistant" and before in ("", "system"):
            raise BadRow("the first turn is the assistant's, so it answers nothing", f"message {number}")
        if role == "tool" and before not in ("assistant", "tool"):
            raise BadRow("a tool result follows no assistant turn", f"message {number}")
        before = role
    if before != "assistant":
        raise BadRow("the last turn is not the assistant's, so there is no answer", f"it is the {before}'s")
    last = messages[-1]
    if not last["content"].strip() and not last.get("tool_calls"):
        raise BadRow("the answer is empty")
    if not any(trained(conversation, train_roles)):
        raise BadRow("no turn is trained", f"roles {', '.join(m['role'] for m in messages)}")


def trained(conversation: Conversation, train_roles: frozenset[str]) -> list[bool]:
    """Whether each message is learnt: its own mark, else its role."""
    roles = [message["role"] in train_roles for message in conversation.messages]
    if conversation.train is None:
        return roles
    return [by_role if mark is None else mark for mark, by_role in zip(conversation.train, roles, strict=True)]
