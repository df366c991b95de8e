"""Selects, inspects and renders the tokenizer's chat template."""

import dataclasses
import re
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from finetune.chat_templates import ChatTemplate, named_templates, no_template, read_template
from finetune.console import log
from finetune.data.config import TEMPLATE_DATE
from finetune.data.conversation import BadRow, Message
from finetune.data.limit_config import LIMITS, LimitConfig
from finetune.data.thoughts import OPENED, find_switch, thought_form
from finetune.errors import DataError
from finetune.limits import LimitExceeded, limited

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_QUESTION = "Which way is up"
PROBE_ANSWER = "Away from the ground"
TEMPLATE_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, SyntaxError)
"""What the expressions of a template may raise, besides the errors of Jinja itself. Python refuses deep blocks."""

CHARACTER_BYTES = 100
"""Memory of a template for each character that it may write."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """A chat template and its properties.

    Attributes:
        source: The Jinja text, or several by name.
        special: The names that the template can use: ``bos_token``, ``eos_token``, ...
        control: Matches every control token of the tokenizer.
        date: ISO date that the template gets where it asks for today's.
        limits: Of time and text.
        end_of_turn: The token that ends an assistant's turn; "" where the template writes none.
        switch: The variable that turns thoughts on and off, e.g. ``enable_thinking``; None without one.
        thoughts: How thoughts are given to the template, see `finetune.data.thoughts`.
    """

    source: ChatTemplate
    special: dict[str, str]
    control: re.Pattern[str]
    date: str
    limits: LimitConfig
    end_of_turn: str = ""
    switch: str | None = None
    thoughts: str = ""

    @property
    def end(self) -> str:
        """The token that ends a trained answer: the template's own, or the tokenizer's EOS."""
        return self.end_of_turn or self.special.get("eos_token", "")

    @property
    def thinks(self) -> bool:
        """Whether the template knows thoughts: it writes them, opens them, or can turn them off."""
        return self.switch is not None or self.thoughts == OPENED

    @property
    def writes_date(self) -> bool:
        """Whether the text depends on the day."""
        return any("strftime_now" in source for source in named_templates(self.source).values())

    def render(
        self, messages: list[Message], *, tools: list[Any] | None = None, prompt: bool = False, **variables: Any
    ) -> str:
        """Renders messages; ``prompt`` adds the opening of the assistant's next turn.

        Args:
            variables: Further variables of the template.

        Raises:
            BadRow: The template rejects the messages.
            DataError: It needs more time, memory or text than it may take.
        """
        from jinja2 import TemplateError

        limits = self.limits

        source = self.source
        if isinstance(source, dict):
            source = source["tool_use"] if tools is not None and "tool_use" in source else source["default"]
        try:
            with limited(seconds=limits.template_seconds, memory_bytes=limits.template_characters * CHARACTER_BYTES):
                text: str = _compiled(source, self.date).render(
                    messages=messages,
                    tools=tools,
                    documents=None,
                    add_generation_prompt=prompt,
                    **self.special,
                    **variables,
                )
        except (TemplateError, *TEMPLATE_ERRORS) as error:
            raise BadRow("the chat template rejects the turns", str(error)) from error
        except LimitExceeded as error:
            raise self._too_much(str(error), messages) from error
        most = limits.template_characters
        if len(text) > most and len(text) > most + len(str(messages)) + len(str(tools)):
            raise self._too_much(f"a text of {most:,} characters", messages)
        return text

    def _too_much(self, limit: str, messages: list[Message]) -> DataError:
        content = next((message["content"] for message in messages if message["role"] == "user"), "")
        return DataError(
            f"data.template: the chat template needs more than {limit} for one conversation, which begins with "
            f"{content[:60]!r}; choose another with data.template=..., or raise the limit in data.limits"
        )

    def with_thinking(self, enabled: bool) -> "Template":
        """Returns the template with its switch set, so that the exported template serves as it was trained.

        Thoughts that are off stay off: llama.cpp turns the switch on unasked, for a model that never thought in
        training. Thoughts that are on are a default, which a client can change.
        """
        assert self.switch is not None
        # The environment drops the newline after a block, so the text that follows stays as it is.
        line = f"{{%- set {self.switch} = false %}}\n"
        if enabled:
            line = f"{{%- if {self.switch} is not defined %}}{{% set {self.switch} = true %}}{{% endif %}}\n"
        if isinstance(self.source, dict):
            return dataclasses.replace(self, source={name: line + text for name, text in self.source.items()})
        return dataclasses.replace(self, source=line + self.source)


def set_template(name: str | None, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Sets the tokenizer's chat template to the one that the user named; without a name, keeps the tokenizer's own.

    Args:
        name: As `finetune.chat_templates.template_file` takes it, or the name of one of the tokenizer's own.

    Raises:
        DataError: There is no template of that name, or none at all.
    """
    templates = named_templates(getattr(tokenizer, "chat_template", None))
    own: ChatTemplate | None = templates["default"] if list(templates) == ["default"] else templates or None
    if name is None:
        if own is None:
            raise no_template()
        if "default" not in templates:
            raise DataError(
                f"data.template: the tokenizer has templates named {', '.join(templates)} and none named default; "
                "choose one with data.template=<name>"
            )
        tokenizer.chat_template = own
        return
    text = templates.get(name) or read_template(name)
    if own not in (None, text):
        log("data", f"data.template={name} replaces the tokenizer's own chat template")
    tokenizer.chat_template = text


def inspect_template(
    tokenizer: "PreTrainedTokenizerBase", *, date: str = TEMPLATE_DATE, limits: LimitConfig = LIMITS
) -> Template:
    """Finds out how the tokenizer's template ends a turn and writes thoughts, and checks that it can be trained with.

    Raises:
        DataError: The template cannot be rendered, needs too much, has no end of turn, or writes BOS twice.
    """
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    controls = sorted(
        {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}, key=len, reverse=True
    )
    if not controls:
        raise DataError(
            "data.template: the tokenizer has no control tokens, so no token can end a turn; choose another tokenizer"
        )
    source: Any = tokenizer.chat_template
    control = re.compile("|".join(map(re.escape, controls)))
    template = Template(source=source, special=special, control=control, date=date, limits=limits)
    question, answer = {"role": "user", "content": PROBE_QUESTION}, {"role": "assistant", "content": PROBE_ANSWER}
    try:
        text = template.render([question, answer])
    except BadRow as error:
        raise DataError(
            f"data.template: the chat template cannot render a question and its answer: {error}; choose another"
        ) from error
    bos = special.get("bos_token")
    if bos and text.startswith(bos + bos):
        raise DataError(
            f"data.template: the chat template writes {bos} twice at the beginning of a conversation; fix the template"
        )
    switch = find_switch(template.render, [question], _variables(template))
    return dataclasses.replace(
        template,
        end_of_turn=_end_of_turn(text, template),
        switch=switch,
        thoughts=thought_form(template.render, question, answer, has_switch=switch is not None),
    )


def _end_of_turn(text: str, template: Template) -> str:
    """Returns the token after the probe's answer: EOS where it follows at once, or else the first control token.

    "" where nothing follows, so that EOS must be added.
    """
    at = text.find(PROBE_ANSWER)
    if at < 0:
        raise DataError(
            "data.template: the chat template does not write the assistant's words; "
            "choose another with data.template=..."
        )
    tail, eos = text[at + len(PROBE_ANSWER) :], template.special.get("eos_token", "")
    tokens = re.match(f"(?:{template.control.pattern})+", tail.lstrip())
    if tokens:
        first = template.control.match(tokens.group())
        return eos if eos and eos in tokens.group() else first.group() if first else ""
    if tail.strip():
        raise DataError(
            f"data.template: the chat template ends an assistant's turn with {tail[:30]!r}, which does not begin with "
            "a control token of the tokenizer, so the model would never learn to stop; "
            "choose another with data.template=..."
        )
    if not eos:
        raise DataError(
            "data.template: the chat template does not end an assistant's turn, and the tokenizer has no EOS, so the "
            "model would never learn to stop; choose another with data.template=..."
        )
    return ""


def _variables(template: Template) -> set[str]:
    """Returns the names that the template expects to be given."""
    from jinja2 import meta

    names: set[str] = set()
    for source in named_templates(template.source).values():
        environment = _compiled(source, template.date).environment
        names |= meta.find_undeclared_variables(environment.parse(source))
    return names


@lru_cache(maxsize=8)
def _compiled(source: str, date: str) -> Any:
    """Compiles a template as ``apply_chat_template`` does, whose checks would double the time of every call.

    A test checks that both give the same text.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # A compiled template of our own: transformers keeps the other one for apply_chat_template.
    compiled: Any = _compile_jinja_template(source).environment.from_string(source)
    day = datetime.fromisoformat(date)
    compiled.globals = {**compiled.globals, "strftime_now": day.strftime}  # a chain of maps is searched at every call
    return compiled
