"""Exports that an interrupted stage has published: those that would be the same are not made and checked again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.export.config import ExportConfig
from finetune.export.manifest import folder_sha256
from finetune.jsonable import from_json, to_jsonable
from finetune.model.base import weights_sha256
from finetune.products import ExportResult
from finetune.run import fingerprint, write_json

if TYPE_CHECKING:
    from finetune.export.context import ExportContext

RECORDS = ".finished"
"""Folder of the records, in the stage's; it is deleted when the stage ends."""

MADE_FROM_OTHERS = ("card", "hub")
"""Formats that describe the other exports or push them."""


def find(context: ExportContext, name: str, settings: ExportConfig) -> ExportResult | None:
    """Returns an export that was published with the same inputs and settings, and adds its snippets to the context.

    Returns:
        None where there is none, or where its files have changed.
    """
    file = _record(context, name)
    if not file.is_file():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    result = from_json(ExportResult, record["result"])
    folder = context.folder / name
    if record["key"] != _key(context, settings) or folder_sha256(folder, reuse=False) != result.sha256:
        return None
    context.snippets.update(record["snippets"])
    return result


def remember(context: ExportContext, name: str, settings: ExportConfig, written: ExportResult, *, since: int) -> None:
    """Records a published export.

    Args:
        context: Of the stage.
        name: Of the export.
        settings: Its settings.
        written: Its description.
        since: Number of snippets in the context before it was written.
    """
    if settings.format in MADE_FROM_OTHERS:
        return
    file = _record(context, name)
    file.parent.mkdir(exist_ok=True)
    snippets = dict(list(context.snippets.items())[since:])
    key = _key(context, settings)
    write_json(file, {"key": key, "result": to_jsonable(written), "snippets": snippets})


def forget(folder: Path) -> None:
    """Deletes the records, when the stage has ended."""
    shutil.rmtree(folder / RECORDS, ignore_errors=True)


def _record(context: ExportContext, name: str) -> Path:
    return context.folder / RECORDS / f"{name}.json"


def _key(context: ExportContext, settings: ExportConfig) -> str:
    inputs = {
        "settings": settings,
        "base": context.spec.key(),
        "adapter": weights_sha256(context.adapter.adapter),
        "merged": weights_sha256(context.merged.folder / "model"),
        "scores": fingerprint(context.scores),
        "data": context.data.fingerprint,
        "seed": context.scorer.seed,
    }
    return fingerprint({name: to_jsonable(value) for name, value in inputs.items()})
