"""Finds chat templates by name, and the one that a tokenizer ships, from files alone: no tokenizer is loaded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from finetune.errors import DataError
from finetune.paths import CONF

ChatTemplate = str | dict[str, str]
"""Jinja text, or several by name. As in transformers, ``tool_use`` is used where there are tools, else ``default``."""

FOLDER = CONF / "data" / "template"
TRL = "trl:"
"""``trl:qwen3`` names ``trl/chat_templates/qwen3.jinja`` of the installed trl, which is read and not imported."""

SUFFIXES = (".jinja", ".j2")
TRAINING = "_training"
"""Ends the names of trl's own variants; the others are the templates that model families ship."""


def template_names() -> list[str]:
    """Returns the names of the templates in ``conf/data/template``."""
    return sorted(file.stem for file in FOLDER.glob("*.jinja"))


def trl_templates() -> list[str]:
    """Returns the names of the original templates of the installed trl, each beginning with ``trl:``."""
    files = _trl_folder().glob("*.jinja")
    return sorted(TRL + file.stem for file in files if not file.stem.endswith(TRAINING))


def template_file(name: str) -> Path:
    """Returns the file of a template: one of ``conf/data/template``, one of trl's as ``trl:<name>``, or a path."""
    if name.startswith(TRL):
        return _trl_folder() / f"{name.removeprefix(TRL)}.jinja"
    return Path(name).expanduser() if name.endswith(SUFFIXES) else FOLDER / f"{name}.jinja"


def find_template(name: str, *, setting: str = "data.template") -> Path:
    """Returns the file of a template that the user named.

    Raises:
        DataError: There is none of that name.
    """
    file = template_file(name)
    if not file.is_file():
        raise DataError(
            f"{setting}: there is no template {name!r} (no file {file}); choose one of {', '.join(template_names())}, "
            "trl:<name> for one of trl's, or a .jinja file"
        )
    return file


def read_template(name: str, *, setting: str = "data.template") -> str:
    """Returns a template's text, as transformers reads ``chat_template.jinja``; errors as in `find_template`."""
    return find_template(name, setting=setting).read_text(encoding="utf-8").rstrip("\n")


def no_template() -> DataError:
    """Returns the error of a tokenizer without a chat template where the user named none."""
    names = ", ".join(template_names())
    return DataError(f"data.template: the tokenizer has no chat template; choose one of {names}, or a file")


def tokenizer_template(folder: Path) -> ChatTemplate | None:
    """Returns the chat template that a tokenizer's files hold, or None.

    Args:
        folder: Has ``tokenizer_config.json`` and, in newer repositories, ``chat_template.jinja``.
    """
    templates: dict[str, str] = {}
    if (config := folder / "tokenizer_config.json").is_file():
        templates |= named_templates(json.loads(config.read_text(encoding="utf-8")).get("chat_template"))
    if (legacy := folder / "chat_template.json").is_file():
        templates |= named_templates(json.loads(legacy.read_text(encoding="utf-8")).get("chat_template"))
    if (file := folder / "chat_template.jinja").is_file():
        templates["default"] = file.read_text(encoding="utf-8")
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    return templates["default"] if list(templates) == ["default"] else templates or None


def named_templates(value: Any) -> dict[str, str]:
    """Returns the templates by name; a single one is ``default``. Takes the list that older tokenizers hold, too."""
    if not value:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in [*value, *value.values()]):
        raise DataError(
            f"data.template: the tokenizer's chat_template must be a text, or texts by name; got {value!r:.60}; "
            "correct tokenizer_config.json, or name another template"
        )
    return dict(value)


def _trl_folder() -> Path:
    spec = importlib.util.find_spec("trl")
    locations = spec.submodule_search_locations if spec else None
    return Path(next(iter(locations), "trl") if locations else "trl") / "chat_templates"
