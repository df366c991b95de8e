"""The merged model as a plain transformers folder."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from finetune.export.config import ExportConfig
from finetune.export.snippets import merged_snippet
from finetune.export.travel import write_record
from finetune.export.work import Work


def write(work: Work, name: str, settings: ExportConfig) -> dict[str, Any]:
    """Links the merged weights, adds the record, and opens the folder by plain transformers."""
    from finetune.measure import free
    from finetune.model import load

    source, target = work.merged.folder / "model", work.desk / name
    target.mkdir()
    for file in source.iterdir():
        _link(file, target / file.name)
    placement = dataclasses.replace(work.placement, dtype=work.merged_dtype)
    dense = dataclasses.replace(work.quantization, method="none", double=False)
    write_record(target, "merged", base=work.base, model=work.model, quantization=dense, placement=placement, chat=work.chat)
    merged = load(dataclasses.replace(work.base, folder=source), work.model, quantization=dense, placement=placement)
    wanted = work.expect(merged, settings)
    del merged
    free()
    snippet = merged_snippet(name, model=work.model, dtype=work.merged_dtype)
    parity = work.check(name, settings, wanted, snippet=snippet, ends=[], packages=["transformers"])
    work.snippets["The merged model, in plain transformers"] = snippet
    return work.keep(name, settings, parity)


def _link(file: Path, target: Path) -> None:
    """Weights are linked, since they are large and never written to; everything else is a copy of its own."""
    if file.suffix == ".safetensors":
        try:
            os.link(file, target)
        except OSError:  # another disk, or a file system without links
            shutil.copyfile(file, target)
    else:
        shutil.copyfile(file, target)
