"""Compares our loss mask with the one from the template's own ``{% generation %}`` marks."""

import re
from typing import Any

from finetune.data.conversation import BadRow, Conversation
from finetune.data.render import Renderer
from finetune.data.template import Template
from finetune.errors import DataError

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
TURNS = [{"role": "user", "content": "Which way is up?"}, {"role": "assistant", "content": "Away from the ground."}]


def check_generation_marks(template: Template, renderer: Renderer) -> None:
    """Checks on one exchange that both masks are the same, where the template has marks.

    Raises:
        DataError: The answer cannot be rendered after what serving sends, or the trained part begins or ends elsewhere.
            The template may leave out the end of turn itself, and mark what serving sends before the answer.
    """
    try:
        ours = renderer.render(Conversation([dict(turn) for turn in TURNS], train=[False, True]))[0]
    except BadRow as error:
        raise DataError(
            f"data.template: {error}; fix the template, or choose another with data.template=..."
        ) from error
    source = template.source if isinstance(template.source, str) else template.source["default"]
    if not MARK.search(source):
        return
    from transformers.utils.chat_template_utils import render_jinja_template

    special: Any = template.special
    system = [] if renderer.system is None else [{"role": "system", "content": renderer.system}]
    result: Any = render_jinja_template(
        [[*system, *TURNS]], chat_template=source, return_assistant_tokens_mask=True, **special
    )
    (text,), (marks,) = result
    marked = [text[start:end] for start, end in marks]
    expected = [ours.text[start:end] for start, end in ours.spans]
    prompt = ours.text[: ours.answer]
    if len(marked) != len(expected) or not all(
        _same(mark, answer, template.end_of_turn, prompt) for mark, answer in zip(marked, expected, strict=True)
    ):
        raise DataError(
            f"data.template: the template's generation marks contain {marked}, but the answers "
            f"with their ends are {expected}; fix the marks, or remove them"
        )


def _same(mark: str, answer: str, end_of_turn: str, prompt: str) -> bool:
    marked, expected = mark.strip(), answer.strip()
    for ending in (expected, expected.removesuffix(end_of_turn).strip() if end_of_turn else expected):
        before = marked.removesuffix(ending)
        if marked.endswith(ending) and prompt.rstrip().endswith(before.rstrip()):
            return True
    return False
