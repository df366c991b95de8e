"""Writes a Modelfile for Ollama, with a Go template that gives the same text as the model's own chat template.

Ollama does not read Jinja. Most chat templates put fixed texts around each message. `infer_template` reads these texts
from the template's output and puts them into a Go template. If its output differs on any probe, the Modelfile has no
TEMPLATE. Source of what Ollama passes to a template: its template/template.go (August 2026).
"""

from __future__ import annotations

import json
import os.path
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from finetune.chat_templates import named_templates
from finetune.export.gguf.vocabulary import adds_bos
from finetune.export.parity import REFERENCE_CHATS

if TYPE_CHECKING:
    from finetune.inference.chat import Chat

Messages = list[dict[str, str]]
ROLES = {"S": "system", "U": "user", "A": "assistant"}


def _messages(*turns: str) -> Messages:
    return [{"role": ROLES[turn[0]], "content": turn[1:]} for turn in turns]


PROBES: list[Messages] = [
    *REFERENCE_CHATS,
    _messages("U {{ .System }} %s", "A \n yes\t\n", 'Uand "that" \\n?', "A", "Ulast"),
    _messages("S a ", "U b ", "A c ", "U d "),
    _messages("SBe brief.\n", "Uone", "Atwo\n", "U three ", "Afour", "Ufive"),
]

NO_SYSTEM = '{{ index $.Messages "the template of this model takes no system message" }}'
"""Fails with this sentence in Ollama's message, as the model's template fails."""

SPACE = " \n\t\r"
"""Characters that the Go template strips from a message if the model's template does."""

IS_SPACE = '(or (eq $k " ") (eq $k "\\n") (eq $k "\\t") (eq $k "\\r"))'
TRIM = (
    "{{ if ROLES }}{{ $from := 0 }}{{ $to := 0 }}{{ $text := false }}{{ $white := true }}"
    '{{ range $n := len $c }}{{ $k := printf "%.1s" (slice $c $n) }}'
    f"{{{{ if {IS_SPACE} }}}}{{{{ if not $white }}}}{{{{ $to = $n }}}}{{{{ $white = true }}}}{{{{ end }}}}"
    "{{ else }}{{ if not $text }}{{ $from = $n }}{{ $text = true }}{{ end }}{{ $white = false }}{{ end }}{{ end }}"
    '{{ if not $text }}{{ $c = "" }}{{ else if $white }}{{ $c = slice $c $from $to }}'
    "{{ else }}{{ $c = slice $c $from }}{{ end }}{{ end }}"
)
"""Strips a message. Go templates cannot subtract, so the end of the text is where its last white space began."""


class UnsupportedTemplateError(Exception):
    """The chat template does not put the same texts around each message; holds the reason."""


@dataclass(frozen=True, kw_only=True)
class GoTemplate:
    """The texts around messages, without the BOS token that the tokenizer adds.

    Attributes:
        opening: Before a first user message.
        system: Before and after a system message; None if the template takes no system message.
        later: Before a user message that follows an answer.
        close: After a user message.
        answer: After ``close``, before an existing answer.
        generation: After ``close``, before the answer to generate.
        trimmed: Roles whose messages are stripped.
    """

    opening: str
    system: tuple[str, str] | None
    later: str
    close: str
    answer: str
    generation: str
    trimmed: frozenset[str]

    def render(self, messages: Messages) -> str:
        """Returns the text that the Go template gives."""
        text = ""
        for index, message in enumerate(messages):
            role, content = message["role"], message["content"]
            content = content.strip(SPACE) if role in self.trimmed else content
            if role == "system":
                assert self.system is not None
                before, after = self.system
            elif role == "user":
                follows_system = index == 1 and messages[0]["role"] == "system"
                before, after = self.opening if index == 0 else "" if follows_system else self.later, self.close
            else:
                before, after = self.answer, ""
            text += before + content + after
        return text + self.generation

    def source(self) -> str:
        """Returns the template's source; ``range`` over a number needs Go 1.24, which Ollama is built with."""
        roles = " ".join(f'(eq .Role "{role}")' for role in sorted(self.trimmed))
        system = f"{_literal(self.system[0])}{{{{ $c }}}}{_literal(self.system[1])}" if self.system else NO_SYSTEM
        later = f'{{{{ else if not (and (eq $i 1) (eq $first "system")) }}}}{_literal(self.later)}{{{{ end }}}}'
        user = f"{{{{ if eq $i 0 }}}}{_literal(self.opening)}{later}{{{{ $c }}}}{_literal(self.close)}"
        parts = [
            "{{- $first := (index .Messages 0).Role }}",
            "{{- range $i, $m := .Messages }}{{ $c := .Content }}",
            TRIM.replace("ROLES", f"or {roles}") if roles else "",
            f'{{{{ if eq .Role "system" }}}}{system}',
            f'{{{{ else if eq .Role "user" }}}}{user}',
            f'{{{{ else if eq .Role "assistant" }}}}{_literal(self.answer)}{{{{ $c }}}}',
            "{{ end }}{{ end }}",
            _literal(self.generation),
        ]
        return "".join(parts)


def write_modelfile(file: Path, chat: Chat, *, source: str) -> list[str]:
    """Writes the Modelfile.

    Args:
        file: In the folder of the model.
        chat: Tokenizer, end tokens, and the system message that training put before chats without one.
        source: First lines, e.g. ``FROM ./model.gguf``.

    Returns:
        One sentence for each difference in Ollama.
    """
    lines, notes = [source], []
    try:
        lines.append(f'TEMPLATE """{infer_template(chat).source()}"""')
    except UnsupportedTemplateError as error:
        notes.append(
            f"the Modelfile has no TEMPLATE, since {error}; Ollama then takes the nearest one that it knows, or none: "
            "compare first"
        )
    if chat.system is not None and '"""' in chat.system:
        notes.append(
            "the Modelfile has no SYSTEM, since the system message of the training holds three quotation marks: "
            "send it yourself"
        )
    elif chat.system is not None:
        lines.append(f'SYSTEM """{chat.system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in chat.tokenizer.convert_ids_to_tokens(chat.ends)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return notes


def infer_template(chat: Chat) -> GoTemplate:
    """Reads the texts around messages from the chat template's output.

    Raises:
        UnsupportedTemplateError: The Go template gives another text for a probe.
    """
    template = chat.tokenizer.chat_template
    if not template:
        raise UnsupportedTemplateError("the tokenizer has no chat template")
    if any("strftime_now" in source for source in named_templates(template).values()):
        raise UnsupportedTemplateError("the chat template writes the date of the day")
    bos = chat.tokenizer.bos_token if adds_bos(chat.tokenizer) else ""

    def render(messages: Messages) -> str:
        text: str = chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text.removeprefix(bos)

    try:
        inferred = _infer(render)
        probes = [probe for probe in PROBES if inferred.system is not None or probe[0]["role"] != "system"]
        wrong = next((probe for probe in probes if inferred.render(probe) != render(probe)), None)
    except TemplateError as error:
        raise UnsupportedTemplateError(f"the chat template refuses a plain chat: {error}") from error
    if wrong:
        raise UnsupportedTemplateError(
            f"no Go template of the known shape writes the chat {wrong} as the model's own does"
        )
    return inferred


def _infer(render: Callable[[Messages], str]) -> GoTemplate:
    opening, before_generation = _split(render(_messages("Uone")), "one")
    _, before_answer, later, _ = _split(render(_messages("Uone", "Atwo", "Uthree")), "one", "two", "three")
    close = os.path.commonprefix([before_generation, before_answer])  # noqa: RUF071, characters are meant
    spaced = {
        "system": _messages("S zero ", "Uone"),
        "user": _messages("U zero "),
        "assistant": _messages("Uone", "A zero ", "Utwo"),
    }
    return GoTemplate(
        opening=opening,
        system=_system_texts(render),
        later=later,
        close=close,
        answer=before_answer.removeprefix(close),
        generation=before_generation.removeprefix(close),
        trimmed=frozenset(role for role, messages in spaced.items() if _strips(render, messages)),
    )


def _system_texts(render: Callable[[Messages], str]) -> tuple[str, str] | None:
    try:
        before, between, _ = _split(render(_messages("Szero", "Uone")), "zero", "one")
    except TemplateError:
        return None
    return before, between


def _strips(render: Callable[[Messages], str], messages: Messages) -> bool:
    try:
        return " zero " not in render(messages)
    except TemplateError:
        return False


def _split(text: str, *marks: str) -> list[str]:
    """Splits a text at marks, each of which it contains once, in this order."""
    pieces = []
    for mark in marks:
        before, separator, text = text.partition(mark)
        if not separator or mark in text:
            raise UnsupportedTemplateError("the chat template leaves out messages or repeats them")
        pieces.append(before)
    return [*pieces, text]


def _literal(text: str) -> str:
    """Returns a Go action that prints the text unchanged."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
