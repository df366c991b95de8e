"""Renders conversations as text and finds the spans of that text to train on."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from finetune.data.conversation import BadRow, Conversation, Message, trained_turns
from finetune.data.template import Template
from finetune.data.thoughts import INLINE, KEEP, KEYS, OPEN, REFUSE, split_thought, with_thought
from finetune.data.turns import Row, Turns

FIRST_PLACEHOLDER = 0xF0000
"""Private-use characters replace control tokens that a user only wrote about, until the text is tokenized."""

TRIMMED, REWRITTEN = "trimmed answers", "rewritten history"
THOUGHTS_REMOVED, WITHOUT_THOUGHTS = "removed thoughts", "answers without thoughts"


@dataclass(slots=True)
class Rendered:
    """Rendered text with the spans to train on.

    Attributes:
        text: The text to tokenize.
        spans: Trained spans, [start, end) in characters, in order.
        answer: Where the last turn begins. Serving sends everything before it.
        reference: The text of the last turn, without its thought.
        conversation: The turns of the text; trained on are those with a span.
        literals: Placeholder character -> the control token that it replaces.
        notes: What a user should know of: `TRIMMED`, `REWRITTEN`, `THOUGHTS_REMOVED`, `WITHOUT_THOUGHTS`.
    """

    text: str
    spans: list[tuple[int, int]]
    answer: int
    reference: str
    conversation: Conversation
    literals: dict[str, str] = field(default_factory=dict)
    notes: frozenset[str] = frozenset()

    def with_literals(self, text: str | None = None) -> str:
        """Returns the text, or another one, with the control tokens in place of their placeholders."""
        text = self.text if text is None else text
        if not self.literals:
            return text
        return "".join(self.literals.get(character, character) for character in text)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A conversation as the template takes it.

    Attributes:
        messages: With the added system message, and with thoughts in the template's form.
        trained: Whether each message is trained on.
        thoughts: Thought of each message; "" without one.
        literals: Placeholder character -> the control token that it replaces.
        notes: As in `Rendered`.
    """

    messages: list[Message]
    trained: list[bool]
    thoughts: list[str]
    tools: list[Any] | None
    literals: dict[str, str]
    notes: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """The settings that decide how a conversation is written.

    Attributes:
        template: None where all rows are raw text.
        bos: Precedes raw text; may be "".
        eos: Ends raw text.
        control_tokens: ``text`` or ``control``.
        thinking: What is done with thoughts: ``keep``, ``remove`` or ``refuse``.
    """

    template: Template | None
    train_roles: frozenset[str]
    system: str | None
    control_tokens: str
    tools: str
    bos: str
    eos: str
    thinking: str = KEEP

    def render(self, conversation: Conversation, *, apart: bool = False) -> list[Rendered]:
        """Renders one conversation.

        Args:
            apart: Whether each trained turn becomes a text of its own in any case.

        Returns:
            One text, or several where the template rewrites earlier turns; the one with the last turn first.

        Raises:
            BadRow: The template rejects, changes or drops a part of it.
        """
        if conversation.parts is not None:
            return [self._render_text(conversation)]
        prepared = self.prepare(conversation)
        rows = self.turns(prepared).rows(prepared.trained, apart=apart)
        return [self._rendered(row, prepared, conversation, several=len(rows) > 1) for row in rows]

    def prepare(self, conversation: Conversation) -> Prepared:
        """Returns the messages as the template takes them.

        Raises:
            BadRow: They hold thoughts that the template does not write.
        """
        if self.template is None:
            raise BadRow("the tokenizer has no chat template", "choose one with data.template=...")
        trained = trained_turns(conversation, self.train_roles)
        messages, tools = conversation.messages, conversation.tools
        if self.system is not None and messages[0]["role"] != "system":
            messages, trained = [{"role": "system", "content": self.system}, *messages], [False, *trained]
        if self.tools == "text":
            messages, trained, tools = tools_as_text(messages, trained, tools)
        messages, literals = self._replace_control_tokens(messages)
        messages, thoughts, notes = self._with_thoughts(messages, trained)
        return Prepared(messages, trained, thoughts, tools, literals, notes)

    def turns(self, prepared: Prepared) -> Turns:
        """Returns what renders the turns of a prepared conversation."""
        assert self.template is not None
        return Turns(self.template, prepared.messages, prepared.thoughts, prepared.tools)

    def _rendered(self, row: Row, prepared: Prepared, conversation: Conversation, *, several: bool) -> Rendered:
        last, notes = row.last.number, prepared.notes | ({REWRITTEN} if several else set())
        own = conversation
        if several:
            added = len(prepared.messages) - len(conversation.messages)
            train: list[bool | None] = [number in row.spans for number in range(added, last + 1)]
            messages = conversation.messages[: last + 1 - added]
            own = Conversation(messages, train=train, tools=conversation.tools, tests=conversation.tests)
        if any(_is_trimmed(prepared.messages[number], row.text[slice(*span)]) for number, span in row.spans.items()):
            notes |= {TRIMMED}
        spans = sorted(row.spans.values())
        rendered = Rendered(
            row.text, spans, row.last.start, "", own, literals=prepared.literals, notes=frozenset(notes)
        )
        rendered.reference = rendered.with_literals(split_thought(prepared.messages[last])[1]["content"])
        return rendered

    def _with_thoughts(
        self, messages: list[Message], trained: list[bool]
    ) -> tuple[list[Message], list[str], frozenset[str]]:
        """Gives each message its thought in the template's form, or removes it."""
        assert self.template is not None
        found = [split_thought(message) if _may_think(message) else ("", message) for message in messages]
        thoughts = [thought for thought, _ in found]
        form, notes = self.template.thoughts, set[str]()
        if self.thinking == KEEP:
            answers = [thought for thought, message, on in zip(thoughts, messages, trained, strict=True)
                       if on and message["role"] == "assistant"]  # fmt: skip
            if self.template.thinks and not all(answers):
                notes.add(WITHOUT_THOUGHTS)
            if form == INLINE and not any(KEYS[0] in message for message in messages):
                return messages, [""] * len(messages), frozenset(notes)
            return [with_thought(message, thought, form) for thought, message in found], thoughts, frozenset(notes)
        if any(thoughts):
            if self.thinking == REFUSE:
                raise BadRow(
                    "a row has a thought, and the first rows have none", "set data.thinking to train, drop or off"
                )
            notes.add(THOUGHTS_REMOVED)
        return [message for _, message in found], [""] * len(messages), frozenset(notes)

    def _render_text(self, conversation: Conversation) -> Rendered:
        parts = conversation.parts or []
        text, spans = self.bos, list[tuple[int, int]]()
        for part, trained in parts:
            if trained:
                spans.append((len(text), len(text) + len(part)))
            text += part
        start, end = spans[-1]
        spans[-1] = (start, end + len(self.eos))
        return Rendered(text + self.eos, spans, answer=start, reference=parts[-1][0], conversation=conversation)

    def _replace_control_tokens(self, messages: list[Message]) -> tuple[list[Message], dict[str, str]]:
        assert self.template is not None
        control = self.template.control
        if self.control_tokens == "control" or not any(
            control.search(text) for message in messages for text in _written(message)
        ):
            return messages, {}
        placeholders: dict[str, str] = {}

        def placeholder(match: re.Match[str]) -> str:
            return placeholders.setdefault(match.group(), chr(FIRST_PLACEHOLDER + len(placeholders)))

        replaced = [
            {**message, **{name: control.sub(placeholder, message[name]) for name in WRITTEN if name in message}}
            for message in messages
        ]
        return replaced, {character: token for token, character in placeholders.items()}


WRITTEN = ("content", KEYS[0])
"""The keys of a message that a user wrote as text."""


def _written(message: Message) -> Iterator[str]:
    yield from (message[name] for name in WRITTEN if name in message)


def _may_think(message: Message) -> bool:
    return KEYS[0] in message or OPEN in message["content"]


def _is_trimmed(message: Message, inside: str) -> bool:
    """Whether the template left out white space at the edges of an answer."""
    return message["role"] == "assistant" and message["content"] not in inside


def tools_as_text(
    messages: list[Message], trained: list[bool], tools: list[Any] | None
) -> tuple[list[Message], list[bool], list[Any] | None]:
    """Writes tools and calls as JSON into the messages, for templates without support for them."""
    plain: list[Message] = []
    for message in messages:
        content = message["content"]
        for call in message.get("tool_calls", ()):
            written = json.dumps(call["function"], ensure_ascii=False)
            content = f"{content}\n<tool_call>\n{written}\n</tool_call>".lstrip("\n")
        role = "user" if message["role"] == "tool" else message["role"]
        content = f"<tool_response>\n{content}\n</tool_response>" if message["role"] == "tool" else content
        thought = {KEYS[0]: message[KEYS[0]]} if KEYS[0] in message else {}
        plain.append({"role": role, "content": content, **thought})
    if not tools:
        return plain, trained, None
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    note = f"You may call these tools, one JSON object each between <tool_call> and </tool_call>:\n{listed}"
    if plain[0]["role"] == "system":
        first = {"role": "system", "content": f"{plain[0]['content']}\n\n{note}"}
        return [first, *plain[1:]], trained, None
    return [{"role": "system", "content": note}, *plain], [False, *trained], None
