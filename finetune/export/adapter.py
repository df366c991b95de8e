"""The adapter as a plain peft folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from finetune.export.config import ExportConfig
from finetune.export.context import Work
from finetune.export.manifest import write_record
from finetune.export.snippets import adapter_snippet, finetune_snippet
from finetune.hardware.backends import BACKENDS
from finetune.model import Base


def write(work: Work, name: str, settings: ExportConfig) -> dict[str, Any]:
    """Copies the adapter with its tokenizer and all that its loader needs, and opens it by plain peft."""
    from finetune.inference.adapted import check_adapter, free_memory, load_adapted_model

    source, target = work.adapter.adapter, work.desk / name
    check_adapter(source)
    work.need(name, sum(file.stat().st_size for file in source.iterdir()))
    target.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(source / file, target / file)
    _point_to_base(target / "adapter_config.json", work.spec.base)
    work.chat.tokenizer.save_pretrained(target)
    write_record(target, "adapter", spec=work.spec, chat=work.chat)
    graph = load_adapted_model(work.spec, source)
    wanted = work.expect(graph, settings, artifact="adapter")
    del graph
    free_memory()
    snippet = adapter_snippet(name, work.spec, ends=work.chat.ends)
    packages = ["peft", "transformers", *filter(None, [BACKENDS[work.spec.quantization.method].library])]
    parity = work.check(name, settings, wanted, snippet=snippet, ends=work.chat.ends, packages=packages)
    work.snippets["The adapter, in plain peft"] = snippet
    work.snippets["The adapter, as it was trained, refusing any other base"] = finetune_snippet(name)
    return work.keep(name, settings, parity)


def _point_to_base(file: Path, base: Base) -> None:
    """The base by the name that others know it by, not by a cache folder of this machine."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = base.name if base.source == "hub" else str(base.folder.resolve())
    settings["revision"] = base.revision
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
