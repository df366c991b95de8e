"""Compares, turn by turn, what is trained with what ``apply_chat_template`` sends and expects when serving.

The comparison shares no code with the renderer: prompts and answers come from transformers, tokens from the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from finetune.chat_templates import named_templates
from finetune.data.apart import encode_apart, must_be_apart
from finetune.data.config import DataConfig
from finetune.data.conversation import BadRow, Conversation, Message, check
from finetune.data.encoder import Encoded, Encoder
from finetune.data.render import Rendered, Renderer
from finetune.data.rendering import choose_thinking, make_renderer
from finetune.data.template import Template, inspect_template
from finetune.data.thoughts import CLOSE, has_thoughts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PASS = "PASS"


@dataclass(frozen=True, kw_only=True)
class TurnProof:
    """One trained turn.

    Attributes:
        message: Its number, from 1.
        row: The training row that it is in, from 1.
        served: Text that serving sends.
        trained: Text that has a loss.
        problem: What differs and where; "" where nothing does.
    """

    message: int
    row: int
    served: str
    trained: str
    problem: str


@dataclass(frozen=True, kw_only=True)
class ConversationProof:
    """One conversation.

    Attributes:
        name: What it shows.
        turns: Its trained turns.
        rows: Number of training rows that it becomes.
        refused: Why it cannot be trained on; "" where it can.
        notes: What a user should know, e.g. that the template trims answers.
        is_row: Whether it is one of the user's rows.
    """

    name: str
    turns: list[TurnProof]
    rows: int
    refused: str
    notes: list[str]
    is_row: bool = False

    @property
    def verdict(self) -> str:
        """``PASS``, or what differs, or why the conversation is refused."""
        problems = [f"message {turn.message}: {turn.problem}" for turn in self.turns if turn.problem]
        if problems:
            return f"DIFFERS: {'; '.join(problems)}"
        return f"refused: {self.refused}" if self.refused else PASS

    @property
    def differs(self) -> bool:
        """Whether a turn is trained on in another way than it is served."""
        return any(turn.problem for turn in self.turns)


def prove_template(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, conversations: Iterable[tuple[str, Conversation]]
) -> Iterator[ConversationProof]:
    """Yields the result of each conversation, as if the data were like it.

    Args:
        config: ``template``, ``thinking``, ``system``, ``tools``, ``train_roles`` and ``template_date`` count.
        tokenizer: Its chat template becomes ``config.template`` where that is set.
        conversations: With their names.

    Raises:
        ConfigError: The template refuses ``data.system``.
        DataError: The template cannot be used for training.
    """
    renderer = make_renderer(replace(config, thinking="drop"), tokenizer, raw=False, has_thoughts=bool)
    template = inspect_template(tokenizer, date=config.template_date, limits=config.limits)
    encoder = Encoder.of(tokenizer)
    for name, conversation in conversations:
        chosen, thinking, _ = choose_thinking(config.thinking, template, lambda: has_thoughts(conversation))  # noqa: B023
        own = replace(renderer, template=chosen, thinking=thinking)
        switched = chosen is not template
        variables = {template.switch: thinking == "keep"} if switched and template.switch else {}
        try:
            check(conversation, renderer.train_roles)
            served = Served(tokenizer, template, variables)
            yield _prove(name, conversation, own, encoder, served)
        except BadRow as error:
            yield ConversationProof(name=name, turns=[], rows=0, refused=str(error), notes=[])


@dataclass(frozen=True, slots=True)
class Served:
    """Serving with transformers: the template as it is, with its variables.

    Attributes:
        variables: E.g. ``enable_thinking``.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template
    variables: dict[str, Any]

    def text(self, messages: list[Message], tools: list[Any] | None, *, prompt: bool) -> str:
        """Returns the text of the messages."""
        with _on_day(self.template):
            text: Any = self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=prompt, tokenize=False, **self.variables
            )
        return str(text)

    def tokens(self, text: str) -> list[int]:
        """Returns the token ids of a prompt, as ``apply_chat_template`` makes them."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids


@contextmanager
def _on_day(template: Template) -> Iterator[None]:
    """Makes transformers render a template on its date; transformers takes no function as a variable."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compiled = [_compile_jinja_template(source) for source in named_templates(template.source).values()]
    before = [(each, each.globals) for each in compiled]
    day = datetime.fromisoformat(template.date)
    for each, variables in before:
        each.globals = {**variables, "strftime_now": day.strftime}
    try:
        yield
    finally:
        for each, variables in before:
            each.globals = variables


def _prove(
    name: str, conversation: Conversation, renderer: Renderer, encoder: Encoder, served: Served
) -> ConversationProof:
    prepared = renderer.prepare(conversation)
    if prepared.literals:
        raise BadRow("not compared, since its text contains control tokens", ", ".join(prepared.literals.values()))
    texts, rows = _rows(conversation, renderer, encoder)
    turns = []
    for number, message in enumerate(prepared.messages):
        if prepared.trained[number] and message["role"] == "assistant":
            before, tools = prepared.messages[:number], prepared.tools
            prompt = served.text(before, tools, prompt=True)
            turn = _prove_turn(number + 1, prompt, rows, encoder, served)
            if turn.row and not turn.problem:
                texts_of = (
                    served.text(before, tools, prompt=False),
                    served.text([*before, message], tools, prompt=False),
                )
                turn = replace(turn, problem=_problem(texts_of[0], prompt, texts_of[1], turn.trained, served))
            turns.append(turn)
    answers = sum(prepared.trained[number] for number, m in enumerate(prepared.messages) if m["role"] == "assistant")
    spans = sum(len(row.spans) for row in rows) - (sum(prepared.trained) - answers)
    if spans != answers:
        turns[-1] = replace(turns[-1], problem=f"{answers} answers are trained on in {spans} spans")
    notes = sorted({note for text in texts for note in text.notes})
    return ConversationProof(name=name, turns=turns, rows=len(rows), refused="", notes=notes)


def _rows(conversation: Conversation, renderer: Renderer, encoder: Encoder) -> tuple[list[Rendered], list[Encoded]]:
    """Returns the rows as `finetune.data.worker.Worker` makes them, before they are cut to a length."""
    texts, rows = list[Rendered](), list[Encoded]()
    for text in renderer.render(conversation):
        encoded = encoder.encode([text])[0]
        apart = isinstance(encoded, Encoded) and must_be_apart(text, encoded)
        for part, row in encode_apart(text, renderer, encoder) if apart else [(text, encoded)]:
            if isinstance(row, BadRow):
                raise row
            texts.append(part)
            rows.append(row)
    return texts, rows


def _prove_turn(message: int, prompt: str, rows: list[Encoded], encoder: Encoder, served: Served) -> TurnProof:
    """Finds the trained span that follows the tokens of a prompt."""
    ids = served.tokens(prompt)
    found = [
        (number, row, span)
        for number, row in enumerate(rows, 1)
        for span in row.spans
        if span[0] == len(ids) and row.ids[: span[0]] == ids
    ]
    if not found:
        return TurnProof(message=message, row=0, served=prompt, trained="", problem=_nearest(ids, rows, encoder))
    number, row, (start, end) = found[0]
    trained = encoder.core.decode(row.ids[start:end], skip_special_tokens=False)
    problem = f"trained on in {len(found)} rows" if len(found) > 1 else ""
    return TurnProof(message=message, row=number, served=prompt, trained=trained, problem=problem)


def _problem(before: str, prompt: str, complete: str, trained: str, served: Served) -> str:
    """Returns how the trained text differs from the text that serving expects after the prompt.

    Args:
        before: The messages before the answer, without the opening of the answer.
        complete: The messages with the answer.
    """
    end = served.template.end
    if not served.template.end_of_turn:
        complete += end
    if complete.startswith(prompt):
        expected = complete[len(prompt) :]
        if not expected.startswith(trained):
            return f"trained {trained[:60]!r}, expected {expected[:60]!r}"
        rest = expected[len(trained) :]
        # Phi-3's template, for example, writes EOS after the end of the turn where a conversation ends.
        if served.template.control.sub("", rest).strip() or not _is_ended(trained, served.template):
            return f"not trained: {rest[:60]!r}"
        return ""
    opening = prompt.removeprefix(before)
    rest = complete.rstrip().removesuffix(trained)
    if rest != complete.rstrip() and opening and rest.endswith(opening) and _is_ended(trained, served.template):
        return ""
    opened = prompt.rstrip().removesuffix("<think>")
    if not complete.startswith(opened) or CLOSE not in trained:
        return f"the finished turn {complete[-60:]!r} does not begin with the prompt {prompt[-60:]!r}"
    answer = complete[len(opened) :].rpartition(CLOSE)[2].strip()
    if trained.rpartition(CLOSE)[2].strip() != answer:
        return f"trained {trained[:60]!r}, expected the end of a thought and {answer[:60]!r}"
    return ""


def _is_ended(trained: str, template: Template) -> bool:
    """Returns whether a control token ends the text."""
    return any(match.end() == len(trained) for match in template.control.finditer(trained))


def _nearest(ids: list[int], rows: list[Encoded], encoder: Encoder) -> str:
    """Describes where the prompt that serving sends differs from the row that agrees with it longest."""
    shared = [next((at for at, pair in enumerate(zip(row.ids, ids, strict=False)) if pair[0] != pair[1]),
                   min(len(row.ids), len(ids))) for row in rows]  # fmt: skip
    best = max(range(len(rows)), key=shared.__getitem__)
    at = shared[best]
    theirs, ours = (
        encoder.core.decode(tokens[at : at + 12], skip_special_tokens=False) for tokens in (ids, rows[best].ids)
    )
    return f"from token {at}, serving sends {theirs!r} and the row has {ours!r}"
