"""Renders conversations as text and finds the spans of that text to train on."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from finetune.data.conversation import BadRow, Conversation, Message, trained_turns
from finetune.data.template import Template

FIRST_PLACEHOLDER = 0xF0000
"""Private-use characters replace control tokens that a user only wrote about, until the text is tokenized."""


@dataclass(slots=True)
class Rendered:
    """Rendered text with the spans to train on.

    Attributes:
        text: The text to tokenize.
        spans: Trained spans, [start, end) in characters, in order.
        answer: Where the last turn begins. Serving sends everything before it.
        reference: The text of the last turn.
        literals: Placeholder character -> the control token that it replaces.
    """

    text: str
    spans: list[tuple[int, int]]
    answer: int
    reference: str
    literals: dict[str, str] = field(default_factory=dict)

    def with_literals(self) -> str:
        """Returns the text with the control tokens in place of their placeholders."""
        if not self.literals:
            return self.text
        return "".join(self.literals.get(character, character) for character in self.text)


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """The settings that decide how a conversation is written.

    Attributes:
        template: None where all rows are raw text.
        bos: Precedes raw text; may be "".
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
        """Renders one conversation.

        Raises:
            BadRow: The template rejects, changes or drops a part of it.
        """
        if conversation.parts is not None:
            return self._render_text(conversation.parts)
        if self.template is None:
            raise BadRow("the tokenizer has no chat template", "choose one with data.template=...")
        trained = trained_turns(conversation, self.train_roles)
        messages = conversation.messages
        if self.system is not None and messages[0]["role"] != "system":
            messages, trained = [{"role": "system", "content": self.system}, *messages], [False, *trained]
        tools = conversation.tools
        if self.tools == "text":
            messages, trained, tools = tools_as_text(messages, trained, tools)
        messages, literals = self._replace_control_tokens(messages)
        rendered = _Turns(self.template, messages, tools).rendered(trained)
        rendered.literals = literals
        return rendered

    def spans_of(self, conversation: Conversation) -> list[tuple[int, int]]:
        """Returns the spans of the assistant's turns in the rendered text."""
        assert self.template is not None
        trained = [message["role"] == "assistant" for message in conversation.messages]
        return _Turns(self.template, conversation.messages, None).rendered(trained).spans

    def _render_text(self, parts: list[tuple[str, bool]]) -> Rendered:
        text, spans = self.bos, list[tuple[int, int]]()
        for part, trained in parts:
            if trained:
                spans.append((len(text), len(text) + len(part)))
            text += part
        start, end = spans[-1]
        spans[-1] = (start, end + len(self.eos))
        return Rendered(text + self.eos, spans, answer=start, reference=parts[-1][0])

    def _replace_control_tokens(self, messages: list[Message]) -> tuple[list[Message], dict[str, str]]:
        assert self.template is not None
        control = self.template.control
        if self.control_tokens == "control" or not any(control.search(message["content"]) for message in messages):
            return messages, {}
        placeholders: dict[str, str] = {}

        def placeholder(match: re.Match[str]) -> str:
            return placeholders.setdefault(match.group(), chr(FIRST_PLACEHOLDER + len(placeholders)))

        replaced = [{**message, "content": control.sub(placeholder, message["content"])} for message in messages]
        return replaced, {character: token for token, character in placeholders.items()}


@dataclass(slots=True)
class _Turns:
    """Renders one conversation, and prefixes of it to find where turns begin and end."""

    template: Template
    messages: list[Message]
    tools: list[Any] | None

    def rendered(self, trained: list[bool]) -> Rendered:
        last = len(self.messages) - 1
        text = self.template.render(self.messages, tools=self.tools)
        self._check_tools(text)
        spans = [self._span(text, turn) for turn in range(len(self.messages)) if trained[turn]]
        answer = spans[-1][0] if trained[last] else self._start(text, last)
        return Rendered(text, spans, answer=answer, reference=self.messages[last]["content"])

    def _check_tools(self, text: str) -> None:
        """Checks that tools and calls change the text. A name alone proves nothing: it may also be in the prose."""
        if self.tools and (
            not all(tool["function"]["name"] in text for tool in self.tools)
            or self.template.render(self.messages, tools=None) == text
        ):
            raise BadRow("the chat template does not write the tools", "use data.tools=text or another template")
        if any(message.get("tool_calls") for message in self.messages):
            without = [
                {name: value for name, value in message.items() if name != "tool_calls"} for message in self.messages
            ]
            if self.template.render(without, tools=self.tools) == text:
                raise BadRow("the chat template does not write tool calls", "use data.tools=text or another template")

    def _span(self, text: str, turn: int) -> tuple[int, int]:
        message, start = self.messages[turn], self._start(text, turn)
        limit = len(text) if turn == len(self.messages) - 1 else self._limit(text, turn)
        end = text.find(self.template.end_of_turn, start, limit)
        if end < 0:
            if message["role"] == "assistant":
                raise BadRow("the chat template does not end the turn after an answer", f"message {turn + 1}")
            end = limit
        else:
            end += len(self.template.end_of_turn)
        inside = text[start:end]
        if message["content"].strip() not in inside:
            raise BadRow("the chat template changes the words of a trained turn", f"message {turn + 1}")
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in inside:
                raise BadRow("the chat template does not write tool calls", "use data.tools=text or another template")
        return start, end

    def _start(self, text: str, turn: int) -> int:
        """Returns where a turn begins: after the text that serving sends before it."""
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
            raise BadRow("the chat template's prompt is not a prefix of the conversation", f"at message {turn + 1}")
        raise BadRow("the chat template rewrites earlier turns when later ones follow", f"at message {turn + 1}")

    def _after(self, text: str, before: str) -> int:
        """Returns where two renderings start to differ, or the start of the control token that this is inside of."""
        shared = _shared_length(before, text)
        tokens = self.template.control.finditer(text)
        return next((token.start() for token in tokens if token.start() < shared < token.end()), shared)

    def _find(self, text: str, turn: int) -> int:
        at = text.find(self.messages[turn]["content"].strip())
        if at < 0:
            raise BadRow("the chat template changes the words of a trained turn", f"message {turn + 1}")
        return at

    def _limit(self, text: str, turn: int) -> int:
        """Returns the length of the text that the turns so far determine."""
        return _shared_length(self.template.render(self.messages[: turn + 1], tools=self.tools), text)


def _shared_length(first: str, second: str) -> int:
    """Returns the length of the common prefix of two texts."""
    if second.startswith(first):
        return len(first)
    return next(at for at, pair in enumerate(zip(first, f"{second}\0", strict=False)) if pair[0] != pair[1])


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
        plain.append({"role": role, "content": content})
    if not tools:
        return plain, trained, None
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    note = f"You may call these tools, one JSON object each between <tool_call> and </tool_call>:\n{listed}"
    if plain[0]["role"] == "system":
        first = {"role": "system", "content": f"{plain[0]['content']}\n\n{note}"}
        return [first, *plain[1:]], trained, None
    return [{"role": "system", "content": note}, *plain], [False, *trained], None
