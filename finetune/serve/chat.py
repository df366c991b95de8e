"""A chat in the terminal: streaming, history, commands, and the base's answer next to the tuned one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.console import log
from finetune.errors import ConfigError
from finetune.serve.artifacts import Artifacts, choose_kinds, find_artifacts, open_models
from finetune.serve.config import ServeConfig
from finetune.serve.engine import Engine, Finish, RequestRefused, Sampling, stream

if TYPE_CHECKING:
    from finetune.serve.artifacts import Opened

HELP = """\
/reset               forget the conversation
/system [TEXT]       set or remove the system message, and forget the conversation
/model NAME          adapter, base, merged or gguf
/temperature T       0 takes the most probable token
/save FILE           write the conversation as a line of JSON
/help  /quit"""

COMPARED = {"base": "base", "adapter": "tuned"}


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """How a chat answers.

    Attributes:
        model: Kind of the model that answers first; empty for the run's own.
        system: System message; None for the training's.
        temperature: 0 takes the most probable token.
        max_tokens: Limit of an answer.
        seed: Of sampled answers; each further answer has the next one.
        compare: Whether base and tuned answer next to each other.
        base: Folder of the base, where it is neither on the hub nor where the run found it.
    """

    model: str = ""
    system: str | None = None
    temperature: float = 0.0
    max_tokens: int = 512
    seed: int = 0
    compare: bool = False
    base: Path | None = None


def chat(target: Path, settings: ChatSettings) -> None:
    """Chats with a run, one of its exports or a GGUF file until the input ends.

    Where the input is not a terminal, each of its lines is a turn, and only answers are printed.

    Raises:
        ConfigError: There is nothing to chat with.
        ModelError: A file has changed, or a model cannot be loaded.
    """
    artifacts = find_artifacts(target, base=settings.base)
    wanted = ["adapter", "base"] if settings.compare else [settings.model] if settings.model else []
    is_terminal = sys.stdin.isatty()
    with Models(artifacts) as models:
        kinds = choose_kinds(artifacts, wanted)
        for kind in kinds:
            models.open(kind)
        conversation = Conversation(models, replace(settings, model=kinds[0]))
        if is_terminal:
            log("chat", f"{artifacts.name}: {kinds[0]} answers; /help lists the commands, /quit or Ctrl-D ends")
        for line in _lines(is_terminal):
            if not conversation.take(line):
                break


class Models:
    """The models of a run, each loaded when it is first asked.

    Args:
        artifacts: What there is.
    """

    def __init__(self, artifacts: Artifacts) -> None:
        self._artifacts = artifacts
        self._opened: dict[str, tuple[Opened, str]] = {}

    def __enter__(self) -> Models:
        return self

    def __exit__(self, *_: object) -> None:
        for opened in {id(opened): opened for opened, _ in self._opened.values()}.values():
            opened.close()

    def open(self, kind: str) -> tuple[Engine, str]:
        """Returns the engine of a model, and its name there.

        Raises:
            ConfigError: The run has none of this kind.
        """
        if kind not in self._opened:
            choose_kinds(self._artifacts, [kind])
            together = ["adapter", "base"] if kind in ("adapter", "base") else [kind]
            # One answer at a time, so no more rows than the two that are compared.
            with redirect_stdout(sys.stderr):  # the output has answers only
                opened = open_models(self._artifacts, together, ServeConfig(concurrent=2))
            for name, of_kind in zip(opened.engines[0].names(), together, strict=True):
                self._opened[of_kind] = (opened, name)
        opened, name = self._opened[kind]
        return opened.engines[0], name


@dataclass
class Conversation:
    """The turns so far.

    Attributes:
        models: Answer.
        settings: How.
        messages: User and assistant turns, without the system message.
        answers: Number of answers, which moves the seed on.
    """

    models: Models
    settings: ChatSettings
    messages: list[dict[str, str]] = field(default_factory=list)
    answers: int = 0

    def take(self, line: str) -> bool:
        """Answers a line, or follows a command; False: the chat ends."""
        line = line.strip()
        if line in ("/quit", "/exit"):
            return False
        try:
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._turn(line)
        except (ConfigError, RequestRefused, OSError) as error:
            log("chat", str(error), stream=sys.stderr)
        return True

    def _command(self, line: str) -> None:
        name, _, value = line.partition(" ")
        value = value.strip()
        if name == "/help":
            sys.stdout.write(f"{HELP}\n")
        elif name == "/reset":
            self._forget()
        elif name == "/system":
            self.settings = replace(self.settings, system=value or None)
            self._forget()
        elif name == "/model":
            self.models.open(value)
            self.settings = replace(self.settings, model=value)
            log("chat", f"{value} answers")
        elif name == "/temperature":
            self.settings = replace(self.settings, temperature=_temperature(value))
        elif name == "/save":
            self._save(value)
        else:
            raise ConfigError(f"{name}: not a command; /help lists them")

    def _forget(self) -> None:
        self.messages.clear()
        log("chat", "the conversation was forgotten")

    def _save(self, value: str) -> None:
        if not value:
            raise ConfigError("/save: give a file, e.g. /save chat.jsonl")
        with open(value, "a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": self._prompt()}, ensure_ascii=False) + "\n")
        log("chat", f"{len(self.messages)} turns were added to {value}")

    def _prompt(self) -> list[dict[str, str]]:
        system = self.settings.system
        return [*([{"role": "system", "content": system}] if system else []), *self.messages]

    def _turn(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        try:
            answer = self._compared() if self.settings.compare else self._answered(self.settings.model)
        except RequestRefused:
            self.messages.pop()
            raise
        except KeyboardInterrupt:  # stops this answer, not the chat
            self.messages.pop()
            sys.stdout.write("\n")
            return
        self.messages.append({"role": "assistant", "content": answer})
        self.answers += 1

    def _answered(self, kind: str) -> str:
        """Writes an answer while it is generated; returns it."""
        answer = ""
        for piece in self.pieces(kind):
            answer += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return answer

    def _compared(self) -> str:
        """Writes the base's and the tuned answer; returns the tuned one, which the conversation continues from."""
        if sys.stdout.isatty():
            return _next_to_each_other({title: self.pieces(kind) for kind, title in COMPARED.items()})
        answer = ""
        for kind, title in COMPARED.items():
            sys.stdout.write(f"{title}: ")
            answer = self._answered(kind)
        return answer

    def pieces(self, kind: str) -> Iterator[str]:
        """Yields the text of the answer to the last turn.

        Raises:
            RequestRefused: The conversation is longer than the model's context, or the model failed.
        """
        engine, model = self.models.open(kind)
        prompt = engine.render(self._prompt())
        room = engine.context_tokens - len(prompt)
        if room < 1:
            raise RequestRefused(
                f"the conversation has {len(prompt)} tokens and the model reads {engine.context_tokens}; /reset it",
                parameter="messages",
            )
        sampling = Sampling(
            max_tokens=min(self.settings.max_tokens, room),
            temperature=self.settings.temperature,
            seed=self.settings.seed + self.answers,
        )
        for event in stream(engine, model, prompt, sampling):
            if isinstance(event, Finish) and event.error:
                raise RequestRefused(event.error, parameter="messages")
            yield event.text
            if isinstance(event, Finish) and event.reason == "length":
                log("chat", f"the answer reached its limit of {sampling.max_tokens} tokens", stream=sys.stderr)


def _next_to_each_other(answers: dict[str, Iterator[str]]) -> str:
    """Shows answers in columns while they are generated; returns the last one."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    texts = dict.fromkeys(answers, "")

    def table() -> Table:
        columns = Table(box=None, expand=True, padding=(0, 2, 0, 0))
        for title in texts:
            columns.add_column(title, ratio=1, overflow="fold")
        columns.add_row(*map(Text, texts.values()))
        return columns

    with Live(table(), console=Console(), vertical_overflow="visible") as live:
        for title, pieces in answers.items():
            for piece in pieces:
                texts[title] += piece
                live.update(table())
    return list(texts.values())[-1]


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise ConfigError(f"/temperature: must be a number between 0 and 2; got {text!r}")
    return value


def _lines(is_terminal: bool) -> Iterator[str]:
    """Yields what the user types or pipes in, line by line."""
    if not is_terminal:
        yield from sys.stdin
        return
    import readline  # noqa: F401 - editing and history of lines

    while True:
        try:
            yield input("> ")
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n")
