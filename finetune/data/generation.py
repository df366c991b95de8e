"""The template's own ``{% generation %}`` marks against ours: two ways to the same mask, which must agree."""

import re
from typing import Any

from finetune.data.conversation import BadRow, Conversation
from finetune.data.render import Renderer
from finetune.data.template import Template
from finetune.errors import DataError

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
TURNS = [
    {"role": "user", "content": "Which way is up?"},
    {"role": "assistant", "content": "Away from the ground."},
    {"role": "user", "content": "And down?"},
    {"role": "assistant", "content": "The other way."},
]


def cross_check(template: Template, renderer: Renderer) -> None:
    """Marks a conversation of two exchanges our way, and compares where the template has marks of its own.

    Raises:
        DataError: A stretch begins or ends elsewhere; only the end of turn itself may be left out by the template.
    """
    try:
        ours = renderer.spans_of(Conversation([dict(turn) for turn in TURNS]))
    except BadRow as error:
        raise DataError(
            f"data.template: {error}; mend the template, or choose another with data.template=..."
        ) from error
    if not MARK.search(template.source):
        return
    from transformers.utils.chat_template_utils import render_jinja_template

    special: Any = template.special
    result: Any = render_jinja_template(
        [TURNS], chat_template=template.source, return_assistant_tokens_mask=True, **special
    )
    (text,), (marks,) = result
    theirs = [(start, end) for start, end in marks]
    if len(ours) != len(theirs) or not all(
        _same(text, a, b, template.end_of_turn) for a, b in zip(ours, theirs, strict=True)
    ):
        raise DataError(
            f"data.template: the template's generation marks hold {[text[a:b] for a, b in theirs]}, but answers and their ends are "
            f"{[text[a:b] for a, b in ours]}; mend the marks, or take them out"
        )


def _same(text: str, ours: tuple[int, int], theirs: tuple[int, int], end_of_turn: str) -> bool:
    mine, marked = text[slice(*ours)].strip(), text[slice(*theirs)].strip()
    return marked in (mine, mine.removesuffix(end_of_turn).strip())
