"""Selects, inspects and renders the tokenizer's chat template."""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.console import log
from finetune.data.conversation import BadRow, Message
from finetune.errors import DataError
from finetune.paths import CONF

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_QUESTION = "Which way is up"
PROBE_ANSWER = "Away from the ground"


@dataclass(frozen=True, kw_only=True)
class Template:
    """A chat template and its properties.

    Attributes:
        source: The Jinja text.
        special: The names that the template can use: ``bos_token``, ``eos_token``, ...
        end_of_turn: The token that ends an assistant's turn.
        control: Matches every control token of the tokenizer.
    """

    source: str
    special: dict[str, str]
    end_of_turn: str
    control: re.Pattern[str]

    def render(self, messages: list[Message], *, tools: list[Any] | None = None, prompt: bool = False) -> str:
        """Renders messages; ``prompt`` adds the opening of the assistant's next turn.

        Raises:
            BadRow: The template rejects the messages.
        """
        return _render(self.source, self.special, messages, tools=tools, prompt=prompt)


def shipped_template(name: str) -> Path:
    """Returns the path of ``conf/data/template/<name>.jinja``, in a checkout or in an installed wheel."""
    return CONF / "data" / "template" / f"{name}.jinja"


def find_template(name: str) -> Path:
    """Returns the file of a template that the user named.

    Raises:
        DataError: There is none of that name.
    """
    file = Path(name) if name.endswith((".jinja", ".j2")) else shipped_template(name)
    if not file.is_file():
        raise DataError(
            f"data.template: there is no template {name!r} (no file {file}); choose one of {_shipped_names()}, or a "
            ".jinja file"
        )
    return file


def no_template() -> DataError:
    """Returns the error of a tokenizer without a chat template where the user named none."""
    return DataError(f"data.template: the tokenizer has no chat template; choose one of {_shipped_names()}, or a file")


def _shipped_names() -> str:
    return ", ".join(sorted(file.stem for file in shipped_template("x").parent.glob("*.jinja")))


def set_template(name: str | None, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Sets the tokenizer's chat template to the one that the user named; without a name, keeps the tokenizer's own.

    Raises:
        DataError: There is no template of that name, or none at all.
    """
    own = getattr(tokenizer, "chat_template", None)
    if name is None:
        if not own:
            raise no_template()
        return
    text = find_template(name).read_text(encoding="utf-8").rstrip("\n")
    if own not in (None, text):
        log("data", f"data.template={name} replaces the tokenizer's own chat template")
    tokenizer.chat_template = text


def inspect_template(tokenizer: "PreTrainedTokenizerBase") -> Template:
    """Finds out how the tokenizer's template ends a turn, and checks that it can be used for training.

    Raises:
        DataError: The template cannot be rendered, has no end of turn, or writes BOS twice.
    """
    source: Any = tokenizer.chat_template
    if isinstance(source, dict):
        source = source["default"] if "default" in source else next(iter(source.values()))
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    controls = sorted(
        {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}, key=len, reverse=True
    )
    if not controls:
        raise DataError(
            "data.template: the tokenizer has no control tokens, so no token can end a turn; choose another tokenizer"
        )
    control = re.compile("|".join(map(re.escape, controls)))
    question, answer = {"role": "user", "content": PROBE_QUESTION}, {"role": "assistant", "content": PROBE_ANSWER}
    try:
        text = _render(source, special, [question, answer])
    except BadRow as error:
        raise DataError(
            f"data.template: the chat template cannot render a question and its answer: {error}; choose another"
        ) from error
    bos = special.get("bos_token")
    if bos and text.startswith(bos + bos):
        raise DataError(
            f"data.template: the chat template writes {bos} twice at the beginning of a conversation; fix the template"
        )
    return Template(source=source, special=special, end_of_turn=_end_of_turn(text, control), control=control)


def _end_of_turn(text: str, control: re.Pattern[str]) -> str:
    at = text.find(PROBE_ANSWER)
    if at < 0:
        raise DataError(
            "data.template: the chat template does not write the assistant's words; "
            "choose another with data.template=..."
        )
    tail = text[at + len(PROBE_ANSWER) :]
    match = control.match(tail.lstrip())
    if not match:
        raise DataError(
            f"data.template: the chat template ends an assistant's turn with {tail[:30]!r}, which does not begin with "
            "a control token of the tokenizer, so the model would never learn to stop; "
            "choose another with data.template=..."
        )
    return match.group()


def _render(
    source: str,
    special: dict[str, str],
    messages: list[Message],
    *,
    tools: list[Any] | None = None,
    prompt: bool = False,
) -> str:
    from jinja2 import TemplateError

    try:
        return _compiled(source).render(
            messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **special
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise BadRow("the chat template rejects the turns", str(error)) from error


@lru_cache(maxsize=4)
def _compiled(source: str) -> Any:
    """Compiles a template as ``apply_chat_template`` does, whose checks would double the time of every call.

    A test checks that both give the same text.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compiled = _compile_jinja_template(source)
    compiled.globals = dict(compiled.globals)  # a chain of maps is searched at every call
    return compiled
