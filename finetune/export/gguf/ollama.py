"""A Modelfile for Ollama, whose Go template writes what the model's own template writes, or has no template at all.

Ollama reads no Jinja. Most chat templates are the same few texts around each message, so these texts are read off the
template's own output and put into a Go template of one shape; where that shape does not give the very same text on every
probe, no TEMPLATE is written. Source of what Ollama hands to a template: its template/template.go (August 2026).
"""

from __future__ import annotations

import json
import os.path
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.export.gguf.vocabulary import adds_bos
from finetune.export.parity import GOLDEN_CHATS

if TYPE_CHECKING:
    from finetune.inference.chat import Chat

Messages = list[dict[str, str]]

SPACE = " \n\t\r"
"""What the Go template takes off the ends of a message, where the model's template trims it."""


def _said(*turns: str) -> Messages:
    roles = {"S": "system", "U": "user", "A": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[1:]} for turn in turns]


PROBES: list[Messages] = [
    *GOLDEN_CHATS,
    _said("U {{ .System }} %s", "A \n yes\t\n", 'Uand "that" \\n?', "A", "Ulast"),
    _said("S a ", "U b ", "A c ", "U d "),
    _said("SBe brief.\n", "Uone", "Atwo\n", "U three ", "Afour", "Ufive"),
]


class NoShapeError(Exception):
    """The template does not write the same texts around each message; says why."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The texts around messages, without the beginning-of-text that the tokenizer adds.

    Attributes:
        opening: Before a first message of the user.
        system: Before and between a first system message and the user's; None where the template takes none.
        later: Between an answer and the next message of the user.
        close: After the user's message.
        answer: Then, before an answer that is there.
        generation: Then, before an answer that is asked for.
        trimmed: Roles whose messages lose white space at both ends.
    """

    opening: str
    system: tuple[str, str] | None
    later: str
    close: str
    answer: str
    generation: str
    trimmed: frozenset[str]

    def render(self, messages: Messages) -> str:
        """What the Go template gives."""
        text = ""
        for number, message in enumerate(messages):
            role, content = message["role"], message["content"]
            content = content.strip(SPACE) if role in self.trimmed else content
            if role == "system":
                assert self.system is not None
                before, after = self.system
            elif role == "user":
                led = messages[0]["role"] == "system" and number == 1
                before, after = self.opening if number == 0 else "" if led else self.later, self.close
            else:
                before, after = self.answer, ""
            text += before + content + after
        return text + self.generation

    def go(self) -> str:
        """As a Go template for Ollama; needs the Go 1.24 or later that Ollama is built with, for ``range`` over a number."""
        system = f"{_go(self.system[0])}{{{{ $c }}}}{_go(self.system[1])}" if self.system else NO_SYSTEM
        opening = f"{{{{ if eq $i 0 }}}}{_go(self.opening)}"
        later = f'{{{{ else if not (and (eq $i 1) (eq $first "system")) }}}}{_go(self.later)}{{{{ end }}}}'
        return "".join([
            "{{- $first := (index .Messages 0).Role }}",
            "{{- range $i, $m := .Messages }}{{ $c := .Content }}",
            *([TRIM.replace("ROLES", "or " + " ".join(f'(eq .Role "{role}")' for role in sorted(self.trimmed)))] if self.trimmed else []),
            f'{{{{ if eq .Role "system" }}}}{system}',
            f'{{{{ else if eq .Role "user" }}}}{opening}{later}{{{{ $c }}}}{_go(self.close)}',
            f'{{{{ else if eq .Role "assistant" }}}}{_go(self.answer)}{{{{ $c }}}}',
            "{{ end }}{{ end }}",
            _go(self.generation),
        ])  # fmt: skip


NO_SYSTEM = '{{ index $.Messages "the template of this model takes no system message" }}'
"""Fails with this sentence in Ollama's message, as the model's template fails."""

WHITE = '(or (eq $k " ") (eq $k "\\n") (eq $k "\\t") (eq $k "\\r"))'

TRIM = (
    "{{ if ROLES }}{{ $from := 0 }}{{ $to := 0 }}{{ $text := false }}{{ $white := true }}"
    '{{ range $n := len $c }}{{ $k := printf "%.1s" (slice $c $n) }}'
    f"{{{{ if {WHITE} }}}}{{{{ if not $white }}}}{{{{ $to = $n }}}}{{{{ $white = true }}}}{{{{ end }}}}"
    "{{ else }}{{ if not $text }}{{ $from = $n }}{{ $text = true }}{{ end }}{{ $white = false }}{{ end }}{{ end }}"
    '{{ if not $text }}{{ $c = "" }}{{ else if $white }}{{ $c = slice $c $from $to }}{{ else }}{{ $c = slice $c $from }}{{ end }}{{ end }}'
)
"""Go templates cannot subtract, so the end of the text is where its last white space began."""


def write(file: Path, chat: Chat, *, source: str) -> list[str]:
    """Writes the Modelfile.

    Args:
        file: Beside the model.
        chat: Its tokenizer, end tokens, and the system message that training put before chats without one.
        source: What the file is about, e.g. ``FROM ./model.gguf``.

    Returns:
        What Ollama will do otherwise, in sentences.
    """
    lines, notes = [source], []
    try:
        lines.append(f'TEMPLATE """{shape_of(chat).go()}"""')
    except NoShapeError as error:
        notes.append(
            f"the Modelfile has no TEMPLATE, since {error}; Ollama then takes the nearest one that it knows, or none: compare first"
        )
    if chat.system is not None and '"""' in chat.system:
        notes.append(
            "the Modelfile has no SYSTEM, since the system message of the training holds three quotation marks: send it yourself"
        )
    elif chat.system is not None:
        lines.append(f'SYSTEM """{chat.system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in chat.tokenizer.convert_ids_to_tokens(chat.ends)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return notes


def shape_of(chat: Chat) -> Shape:
    """Reads the texts off the template's output.

    Raises:
        NoShapeError: Some probe comes out otherwise.
    """
    from jinja2 import TemplateError

    template = chat.tokenizer.chat_template
    if not template:
        raise NoShapeError("the tokenizer has no chat template")
    if "strftime_now" in template:
        raise NoShapeError("the chat template writes the date of the day")
    begin = chat.tokenizer.bos_token if adds_bos(chat.tokenizer) else ""

    def render(messages: Messages) -> str:
        text: str = chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text.removeprefix(begin)

    try:
        shape = _read(render)
        wrong = next((one for one in PROBES if not _refuses(shape, one) and shape.render(one) != render(one)), None)
    except TemplateError as error:
        raise NoShapeError(f"the chat template refuses a plain chat: {error}") from error
    if wrong:
        raise NoShapeError(f"no Go template of the known shape writes the chat {wrong} as the model's own does")
    return shape


def _refuses(shape: Shape, messages: Messages) -> bool:
    return shape.system is None and messages[0]["role"] == "system"


def _read(render: Callable[..., str]) -> Shape:
    opening, asked = _cut(render(_said("Uone")), "one")
    _, answered, later, _ = _cut(render(_said("Uone", "Atwo", "Uthree")), "one", "two", "three")
    close = os.path.commonprefix([asked, answered])  # noqa: RUF071, characters are meant
    return Shape(
        opening=opening,
        system=_system(render),
        later=later,
        close=close,
        answer=answered.removeprefix(close),
        generation=asked.removeprefix(close),
        trimmed=frozenset(role for role in ("system", "user", "assistant") if _trims(render, role)),
    )


def _system(render: Callable[..., str]) -> tuple[str, str] | None:
    from jinja2 import TemplateError

    try:
        before, between, _ = _cut(render(_said("Szero", "Uone")), "zero", "one")
    except TemplateError:
        return None
    return before, between


def _trims(render: Callable[..., str], role: str) -> bool:
    from jinja2 import TemplateError

    chats = {
        "system": _said("S zero ", "Uone"),
        "user": _said("U zero "),
        "assistant": _said("Uone", "A zero ", "Utwo"),
    }
    try:
        return " zero " not in render(chats[role])
    except TemplateError:
        return False


def _cut(text: str, *marks: str) -> list[str]:
    """The pieces of a text around the marks, each of which stands in it once, in this order."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise NoShapeError("the chat template leaves out messages or repeats them")
        pieces.append(before)
    return [*pieces, text]


def _go(text: str) -> str:
    """A text as an action, so that Go changes nothing in it."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
