"""Conversations as text, and where in that text the learnt stretches lie."""

import json
from dataclasses import dataclass, field
from typing import Any

from finetune.data.conversation import BadRow, Conversation, Message, trained
from finetune.data.template import Template

FIRST_STAND_IN = 0xF0000
"""Private-use characters stand in for control tokens that a user merely wrote about, until the text is tokenised."""


@dataclass(slots=True)
class Rendered:
    """Text with marks.

    Attributes:
        text: What is tokenised.
        spans: Learnt stretches, [start, end) in characters, in order.
        answer: Where the last turn begins: everything before it is what serving sends.
        reference: The last turn's text.
        literals: Stand-in characters and the control tokens that they stand for.
    """

    text: str
    spans: list[tuple[int, int]]
    answer: int
    reference: str
    literals: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """Everything that decides how a conversation is written.

    Attributes:
        template: None where only raw text is read.
        bos: Put before raw text, or "".
        eos: Ends raw text.
        control_tokens: ``text`` or ``control``.
    """

    template: Template | None
    train_roles: frozenset[str]
    system: str | None
    control_tokens: str
    tools: str
    bos: str
    eos: str

    def render(self, conversation: Conversation) -> Rendered:
        """One conversation.

        Raises:
            BadRow: The template refuses, changes or drops some of it.
        """
        if conversation.parts is not None:
            return self._raw(conversation.parts)
        if self.template is None:
            raise BadRow("the tokenizer has no chat template", "choose one with data.template=...")
        learnt = trained(conversation, self.train_roles)
        messages = conversation.messages
        if self.system is not None and messages[0]["role"] != "system":
            messages, learnt = [{"role": "system", "content": self.system}, *messages], [False, *learnt]
        tools = conversation.tools
        if self.tools == "text":
            messages, learnt, tools = spell_out_tools(messages, learnt, tools)
        messages, literals = self._spell_out(messages)
        rendered = _Turns(self.template, messages, tools).rendered(learnt)
        rendered.literals = literals
        return rendered

    def spans_of(self, conversation: Conversation) -> list[tuple[int, int]]:
        """Where assistant turns lie in the rendered text."""
        assert self.template is not None
        learnt = [message["role"] == "assistant" for message in conversation.messages]
        return _Turns(self.template, conversation.messages, None).rendered(learnt).spans

    def _raw(self, parts: list[tuple[str, bool]]) -> Rendered:
        text, spans = self.bos, list[tuple[int, int]]()
        for part, learnt in parts:
            if learnt:
                spans.append((len(text), len(text) + len(part)))
            text += part
        start, end = spans[-1]
        spans[-1] = (start, end + len(self.eos))
        return Rendered(text + self.eos, spans, answer=start, reference=parts[-1][0])

    def _spell_out(self, messages: list[Message]) -> tuple[list[Message], dict[str, str]]:
        assert self.template is not None
        control = self.template.control
        if self.control_tokens == "control" or not any(control.search(message["content"]) for message in messages):
            return messages, {}
        stand_ins: dict[str, str] = {}

        def stand_in(match: Any) -> str:
            return stand_ins.setdefault(match.group(), chr(FIRST_STAND_IN + len(stand_ins)))

        spelt = [{**message, "content": control.sub(stand_in, message["content"])} for message in messages]
        return spelt, {character: token for token, character in stand_ins.items()}


@dataclass(slots=True)
class _Turns:
    """One conversation's rendering: prefixes are rendered to find where turns begin and end."""

    template: Template
    messages: list[Message]
    tools: list[Any] | None

    def rendered(self, learnt: list[bool]) -> Rendered:
        last = len(self.messages) - 1
        text = self.template.render(self.messages, tools=self.tools)
        self._check_tools(text)
        spans = [self._span(text, turn) for turn in range(len(self.messages)) if learnt[turn]]
        answer = spans[-1][0] if learnt[last] else self._start(text, last)
        return Rendered(text, spans, answer=answer, reference=self.messages[last]["content"])

    def _check_tools(self, text: str) -> None:
        """A name that also stands in the prose proves nothing, so the text must differ from the one without tools or calls."""
        if self.tools and (
            not all(tool["function"]["name"] in text for tool in self.tools)
            or self.template.render(self.messages, tools=None) == text
        ):
            raise BadRow("the chat template does not write the tools", "use data.tools=text or another template")
        if any(message.get("tool_calls") for message in self.messages):
            bare = [
                {name: value for name, value in message.items() if name != "tool_calls"} for message in self.messages
            ]
            if self.template.render(bare, tools=self.tools) == text:
                raise BadRow("the chat template does not write tool calls", "use data.tools=text or another template")

    def _span(self, text: str, turn: int) -> tuple[int, int]:
        message, start = self.messages[turn], self._start(text, turn)
        limit = len(text) if turn == len(self.messages) - 1 else self._limit(text, turn)
        end = text.find(self.template.end_of_turn, start, limit)
        if end < 0:
            if message["role"] == "assistant":
                raise BadRow("the chat template writes no end of turn after an answer", f"message {turn + 1}")
            end = limit
        else:
            end += len(self.template.end_of_turn)
        inside = text[start:end]
        if message["content"].strip() not in inside:
            raise BadRow("the chat template changes the words of a learnt turn", f"message {turn + 1}")
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in inside:
                raise BadRow("the chat template does not write tool calls", "use data.tools=text or another template")
        return start, end

    def _start(self, text: str, turn: int) -> int:
        """Where a turn's own words begin: after what serving sends before it."""
        before = self.messages[:turn]
        assistant = self.messages[turn]["role"] == "assistant"
        if not assistant and all(message["role"] == "system" for message in before):
            opening = text[: text.find(self.template.end_of_turn)]
            return 0 if not before and self.messages[turn]["content"].strip() in opening else self._find(text, turn)
        if not assistant:
            return self._after(text, self.template.render(before, tools=self.tools))
        prefix = self.template.render(before, tools=self.tools, prompt=True)
        if text.startswith(prefix):
            return len(prefix)
        if text.startswith(self.template.render(before, tools=self.tools)):
            raise BadRow("the chat template's prompt is no beginning of the conversation", f"at message {turn + 1}")
        raise BadRow("the chat template rewrites earlier turns when later ones follow", f"at message {turn + 1}")

    def _after(self, text: str, before: str) -> int:
        """Where two renderings part, moved out of the control token that it may lie in."""
        shared = _shared(before, text)
        inside = (
            match.start() for match in self.template.control.finditer(text) if match.start() < shared < match.end()
        )
        return next(inside, shared)

    def _find(self, text: str, turn: int) -> int:
        at = text.find(self.messages[turn]["content"].strip())
        if at < 0:
            raise BadRow("the chat template changes the words of a learnt turn", f"message {turn + 1}")
        return at

    def _limit(self, text: str, turn: int) -> int:
        """Up to where the text is decided by the turns so far."""
        return _shared(self.template.render(self.messages[: turn + 1], tools=self.tools), text)


def _shared(one: str, other: str) -> int:
    """Length of the beginning that two texts share."""
    if other.startswith(one):
        return len(one)
    return next(at for at, pair in enumerate(zip(one, f"{other}\0", strict=False)) if pair[0] != pair[1])


def spell_out_tools(
    messages: list[Message], learnt: list[bool], tools: list[Any] | None
) -> tuple[list[Message], list[bool], list[Any] | None]:
    """Tools and calls as JSON inside the messages, for templates that know neither."""
    plain: list[Message] = []
    for message in messages:
        content = message["content"]
        for call in message.get("tool_calls", ()):
            written = json.dumps(call["function"], ensure_ascii=False)
            content = f"{content}\n<tool_call>\n{written}\n</tool_call>".lstrip("\n")
        role = "user" if message["role"] == "tool" else message["role"]
        content = f"<tool_response>\n{content}\n</tool_response>" if message["role"] == "tool" else content
        plain.append({"role": role, "content": content})
    if not tools:
        return plain, learnt, None
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    note = f"You may call these tools, one JSON object each between <tool_call> and </tool_call>:\n{listed}"
    if plain[0]["role"] == "system":
        first = {"role": "system", "content": f"{plain[0]['content']}\n\n{note}"}
        return [first, *plain[1:]], learnt, None
    return [{"role": "system", "content": note}, *plain], [False, *learnt], None
