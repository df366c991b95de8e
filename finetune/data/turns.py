"""Renders a conversation turn by turn: what serving sends before each answer, and the answer that it expects.

Most templates keep the text of earlier turns when later ones follow: the conversation is then one row. Templates of
reasoning models rewrite earlier turns, e.g. drop their thoughts: a turn whose text the later ones do not keep is then a
row of its own. No turn is trained on in two rows.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from finetune.data.conversation import BadRow, Message
from finetune.data.template import Template
from finetune.data.thoughts import KEYS, complete_thought

MARK = "\ue000"
"""A private-use character, which no template strips."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn, rendered together with the turns before it only.

    Attributes:
        number: Index of its message.
        text: All messages up to it.
        start: Where it begins. Before an answer, this is all that serving sends.
        end: Where it ends, after the token that ends it.
    """

    number: int
    text: str
    start: int
    end: int


@dataclass(slots=True)
class Row:
    """Turns to train on in one text.

    Attributes:
        text: The rendered messages.
        last: The last turn of the text.
        spans: Trained spans, [start, end) in characters, by message.
    """

    text: str
    last: Turn
    spans: dict[int, tuple[int, int]]


@dataclass(slots=True)
class Turns:
    """Renders one conversation, and prefixes of it.

    Attributes:
        messages: As the template takes them.
        thoughts: Thought of each message; "" without one.
        tools: JSON schemas; None for none.
    """

    template: Template
    messages: list[Message]
    thoughts: list[str]
    tools: list[Any] | None

    def rows(self, trained: list[bool], *, apart: bool = False) -> list[Row]:
        """Returns the rows, the one with the last turn first.

        Args:
            trained: Whether each message is trained on.
            apart: Whether each turn gets a row of its own.

        Raises:
            BadRow: The template rejects, changes or drops a part of the conversation.
        """
        last = len(self.messages) - 1
        answer = self._answer(last, check=trained[last])
        rows = [Row(answer.text, answer, {last: (answer.start, answer.end)} if trained[last] else {})]
        self._check_tools(answer.text)
        for number in reversed(range(last)):
            if not trained[number]:
                continue
            if self._opens(number):
                rows[0].spans[number] = self._opening(rows[0].text, number)
                continue
            is_answer = self.messages[number]["role"] == "assistant"
            turn = self._answer(number) if is_answer else self._other(number)
            known = turn.text[: turn.end]
            row = None if apart else next((row for row in rows if row.text.startswith(known)), None)
            if row is None:
                rows.append(Row(turn.text, turn, {number: (turn.start, turn.end)}))
            else:
                row.spans[number] = (turn.start, turn.end)
        return [row for row in rows if row.spans]

    def _answer(self, number: int, *, check: bool = True) -> Turn:
        """Returns an answer after the prompt that serving sends."""
        prompt = self.template.render(self.messages[:number], tools=self.tools, prompt=True)
        text = self.template.render(self.messages[: number + 1], tools=self.tools)
        if not text.startswith(prompt):
            completed = complete_thought(prompt, text, self.thoughts[number]) or self._rejoined(prompt, text, number)
            if completed is None:
                raise BadRow(
                    "the chat template's prompt is not a prefix of the conversation", f"at message {number + 1}"
                )
            text = completed
        start = len(prompt)
        end = self._end_of_answer(text, start)
        if end is None and not self.template.end_of_turn:
            text += self.template.end
            end = len(text)
        if end is None:
            if check:
                raise BadRow("the chat template does not end the turn after an answer", f"message {number + 1}")
            end = len(text)
        turn = Turn(number, text, start, end)
        if check:
            self._check_words(turn)
        return turn

    def _rejoined(self, prompt: str, text: str, number: int) -> str | None:
        """Returns the prompt and the answer of a text in which the answer rewrites the turns before it.

        gpt-oss, for example, drops the thought of a tool call once the final answer is there. Serving has not sent that
        text: it sends the prompt and expects the answer after it. The answer begins after the last opening of a turn
        before the first character that depends on it.
        """
        before = self.template.render(self.messages[:number], tools=self.tools)
        opening = prompt.removeprefix(before) if prompt.startswith(before) else ""
        message = self.messages[number]
        changed = {name: MARK + message[name] for name in ("content", *KEYS) if isinstance(message.get(name), str)}
        other = self.template.render([*self.messages[:number], {**message, **changed}], tools=self.tools)
        at = text.rfind(opening, 0, _shared_length(text, other)) if opening else -1
        return None if at < 0 else prompt + text[at + len(opening) :]

    def _end_of_answer(self, text: str, start: int) -> int | None:
        """Returns where an answer ends: after its end of turn, or after another control token that ends the text."""
        token = self.template.end_of_turn
        found = text.rfind(token, start) if token else -1
        if found >= 0:
            return found + len(token)
        end = len(text.rstrip())
        return next((match.end() for match in self.template.control.finditer(text, start) if match.end() == end), None)

    def _other(self, number: int) -> Turn:
        """Returns a turn that is not an answer: the text that it adds to the turns before it."""
        before = self.template.render(self.messages[:number], tools=self.tools)
        text = self.template.render(self.messages[: number + 1], tools=self.tools)
        shared = _shared_length(before, text)
        token = self.template.end
        if shared < before.rfind(token):
            raise BadRow("the chat template rewrites earlier turns when later ones follow", f"at message {number + 1}")
        tokens = self.template.control.finditer(text)
        start = next((token.start() for token in tokens if token.start() < shared < token.end()), shared)
        turn = Turn(number, text, start, self._end_of_other(text, start))
        self._check_words(turn)
        return turn

    def _opens(self, number: int) -> bool:
        """Whether a message opens the conversation: it is not an answer and follows system messages only."""
        if self.messages[number]["role"] == "assistant":
            return False
        return all(message["role"] == "system" for message in self.messages[:number])

    def _opening(self, text: str, number: int) -> tuple[int, int]:
        """Returns the span of a message at the beginning, which templates may move, merge or surround with text."""
        content = self.messages[number]["content"].strip()
        first = text[: text.find(self.template.end)]
        start = 0 if number == 0 and content in first else text.find(content)
        if start < 0:
            raise BadRow("the chat template changes the words of a trained turn", f"message {number + 1}")
        following = self.template.render(self.messages[: number + 1], tools=self.tools)
        end = self._end_of_other(text, start, limit=_shared_length(following, text))
        self._check_words(Turn(number, text, start, end))
        return start, end

    def _end_of_other(self, text: str, start: int, *, limit: int | None = None) -> int:
        limit = len(text) if limit is None else limit
        token = self.template.end
        found = text.find(token, start, limit)
        return limit if found < 0 else found + len(token)

    def _check_words(self, turn: Turn) -> None:
        message, inside = self.messages[turn.number], turn.text[turn.start : turn.end]
        where = f"message {turn.number + 1}"
        if message["content"].strip() not in inside:
            raise BadRow("the chat template changes the words of a trained turn", where)
        if self.thoughts[turn.number].strip() not in inside:
            raise BadRow("the chat template does not write the thought of a trained turn", where)
        for name, count in Counter(call["function"]["name"] for call in message.get("tool_calls", ())).items():
            if inside.count(name) < count:
                raise BadRow("the chat template does not write tool calls", "use data.tools=text or another template")

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
            if self._is(text, without):
                raise BadRow("the chat template does not write tool calls", "use data.tools=text or another template")

    def _is(self, text: str, messages: list[Message]) -> bool:
        """Whether messages give a text; a template that refuses them gives another."""
        try:
            return self.template.render(messages, tools=self.tools) == text
        except BadRow:
            return False


def _shared_length(first: str, second: str) -> int:
    """Returns the length of the common prefix of two texts."""
    if second.startswith(first):
        return len(first)
    return next(at for at, pair in enumerate(zip(first, f"{second}\0", strict=False)) if pair[0] != pair[1])
