"""Exports the adapter as a plain peft folder.

That of ``quantization=qat`` is exported for the dense base, where it is the merged model: peft rounds nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from finetune.export.config import ExportConfig
from finetune.export.context import ExportContext
from finetune.export.manifest import write_record
from finetune.export.snippets import adapter_snippet, finetune_snippet
from finetune.hardware.backends import BACKENDS
from finetune.inference.chat import save_tokenizer
from finetune.model import Base
from finetune.products import ExportResult


def write(context: ExportContext, name: str, settings: ExportConfig) -> ExportResult:
    """Copies the adapter with its tokenizer and its record, and checks it in plain peft."""
    from finetune.inference.adapted import check_adapter, free_memory
    from finetune.lora.experts import has_common_layers
    from finetune.quantization.experts import split_modules

    source, target = context.adapter.adapter, context.scratch / name
    check_adapter(source)
    context.require_disk(name, sum(file.stat().st_size for file in source.iterdir()))
    target.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(source / file, target / file)
    _point_to_base(target / "adapter_config.json", context.spec.base)
    save_tokenizer(context.chat.tokenizer, target)
    is_trained = not context.spec.is_rounded_with_adapter
    spec = context.spec if is_trained else context.spec.dense()
    write_record(target, "adapter", spec=spec, chat=context.chat)
    model = context.load(spec, settings, adapter=source)
    wanted = context.expected_output(model, settings, artifact="adapter" if is_trained else None)
    splits, common = bool(split_modules(model)), has_common_layers(model)
    del model
    free_memory()
    snippet = adapter_snippet(name, spec, ends=context.chat.ends, splits=splits, common=common)
    packages = ["peft", "transformers", *filter(None, [BACKENDS[spec.quantization.method].library])]
    parity = context.check(name, settings, wanted, snippet=snippet, ends=context.chat.ends, packages=packages)
    context.snippets["The adapter, in plain peft"] = snippet
    context.snippets["The adapter, as it was trained, refusing any other base"] = finetune_snippet(name)
    return context.publish(name, settings, parity)


def _point_to_base(file: Path, base: Base) -> None:
    """Writes the base's public name into the adapter's config, not a folder of this machine."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = base.public_name
    settings["revision"] = base.revision
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
