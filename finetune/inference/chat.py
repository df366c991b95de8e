"""The tokenizer as it was used for the data: its template, and every token that ends an answer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.model import ModelSpec


@dataclass(frozen=True)
class Chat:
    """How conversations are written and where answers end.

    Attributes:
        tokenizer: With the chat template that the data were rendered with.
        ends: Token ids that end an answer: the tokenizer's end token, those of the base's generation config, and the
            template's end of turn, which some bases name in neither.
        system: The system message that the data room put before conversations without one; None for none.
    """

    tokenizer: Any
    ends: list[int]
    system: str | None


def load_chat(spec: ModelSpec, data: Path) -> Chat:
    """Reads the base's tokenizer and what the data room wrote into ``rendering.json``.

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
    ends = {
        tokenizer.eos_token_id,
        rendering.get("end_of_turn_id"),
        *(configured if isinstance(configured, list) else [configured]),
    }
    return Chat(
        tokenizer=tokenizer, ends=sorted(end for end in ends if end is not None), system=rendering.get("system")
    )
