"""The tokens that end an answer, as serving will stop at them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from finetune.inference.generation import end_tokens

if TYPE_CHECKING:
    from finetune.preflight.context import CheckContext


def end_tokens_of(context: CheckContext) -> set[int]:
    """The tokenizer's, the generation config's, and the template's end of turn, which some bases name in neither."""
    file = context.data.folder / "rendering.json"
    rendering = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    turn = rendering.get("end_of_turn_id")
    return {*end_tokens(context.model, context.tokenizer), *([] if turn is None else [turn])}
