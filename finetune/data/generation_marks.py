"""Compares our loss mask with the one from the template's own ``{% generation %}`` marks."""

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


def check_generation_marks(template: Template, renderer: Renderer) -> None:
    """Checks on a conversation of two exchanges that both masks are the same, where the template has marks.

    Raises:
        DataError: A trained part begins or ends elsewhere. The template may leave out the end of turn itself.
    """
    try:
        ours = renderer.spans_of(Conversation([dict(turn) for turn in TURNS]))
    except BadRow as error:
        raise DataError(
            f"data.template: {error}; fix the template, or choose another with data.template=..."
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
            f"data.template: the template's generation marks contain {[text[a:b] for a, b in theirs]}, but the answers "
            f"with their ends are {[text[a:b] for a, b in ours]}; fix the marks, or remove them"
        )


def _same(text: str, ours: tuple[int, int], theirs: tuple[int, int], end_of_turn: str) -> bool:
    expected, marked = text[slice(*ours)].strip(), text[slice(*theirs)].strip()
    return marked in (expected, expected.removesuffix(end_of_turn).strip())
