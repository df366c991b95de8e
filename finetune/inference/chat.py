"""Loads the tokenizer with the chat template of the data, and the tokens that end an answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.model import ModelSpec


@dataclass(frozen=True)
class Chat:
    """How conversations are rendered and where answers end.

    Attributes:
        tokenizer: Has the chat template that the data was rendered with.
        ends: Token ids that end an answer: the tokenizer's EOS, those of the base's generation config, and the
            template's end of turn, which some bases list in neither.
        system: The system message that the data stage put before conversations without one; None for none.
    """

    tokenizer: Any
    ends: list[int]
    system: str | None


def without_thought(text: str) -> str:
    """Returns a generated answer without the thought before it, as ``<think>...</think>`` or its end alone."""
    _, closed, answer = text.rpartition("</think>")
    return answer.lstrip("\n") if closed else text


def load_chat(spec: ModelSpec, data: Path) -> Chat:
    """Loads the base's tokenizer and what the data stage wrote to ``rendering.json``.

    The template has the run's ``data.thinking`` as its default, so prompts need no variable.

    Args:
        spec: Its base's folder has the tokenizer.
        data: The data stage's folder.
    """
    tokenizer = spec.load_tokenizer()
    file, settings = data / "rendering.json", spec.base.folder / "generation_config.json"
    rendering = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if rendering.get("template"):
        tokenizer.chat_template = rendering["template"]
    configured = json.loads(settings.read_text(encoding="utf-8")).get("eos_token_id") if settings.is_file() else None
    configured = configured if isinstance(configured, list) else [configured]
    ends = {tokenizer.eos_token_id, rendering.get("end_of_turn_id"), *configured} - {None}
    return Chat(tokenizer=tokenizer, ends=sorted(ends), system=rendering.get("system"))
