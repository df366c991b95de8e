"""Loads the tokenizer with the chat template of the data, and the tokens that end an answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.model import ModelSpec


NEW_CLASSES = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend")
"""Classes of tokenizers that transformers 4 does not have."""

OF_THIS_MACHINE = ("local_files_only", "is_local", "name_or_path", "_commit_hash")


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


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Saves a tokenizer so that transformers 4 reads it too, without traces of this machine.

    Version 5 names classes that only it has, puts the chat template into a file of its own, renames the list of special
    tokens, and writes how the tokenizer was opened.
    """
    tokenizer.save_pretrained(folder)
    file, source = folder / "tokenizer_config.json", Path(tokenizer.name_or_path) / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    original = json.loads(source.read_text(encoding="utf-8")) if source.is_file() else {}
    for key in OF_THIS_MACHINE:
        settings.pop(key, None)
    if settings.get("tokenizer_class") in NEW_CLASSES:
        named = original.get("tokenizer_class")
        settings["tokenizer_class"] = named if named and named not in NEW_CLASSES else "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        settings["chat_template"] = template
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
