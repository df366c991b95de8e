"""Exports the adapter as a GGUF LoRA for llama.cpp and Ollama, next to a GGUF of its base.

llama.cpp adds an adapter to dense or quantized weights of the original base; it cannot load the quantized base that was
trained on. So the adapter on the original base is exported and compared: the merge's candidate ``original``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.console import log
from finetune.errors import ExportError
from finetune.export.config import ExportConfig
from finetune.export.context import ExportContext
from finetune.export.gguf.writer import FILE, check, server_snippet
from finetune.export.needs import LOW_RANK_ONLY, check_packages
from finetune.files import require_disk
from finetune.products import ExportResult

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.export.gguf.architecture import Layout
    from finetune.export.parity import Expected

ADAPTER = "adapter.gguf"
PREFIX = "base_model.model."
COLUMNS = ".linear_attn.out_proj"
"""Layers whose columns change places in llama.cpp, and so those of A; of other layers the rows do, and those of B."""

SUFFIXES = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b"}


def write(context: ExportContext, name: str, settings: ExportConfig) -> ExportResult:
    """Converts the adapter and the base, loads both in llama.cpp and compares; returns the export's description."""
    check_packages({name: settings})
    from finetune.export.gguf.file import write_model
    from finetune.export.gguf.ollama import write_modelfile
    from finetune.inference.adapted import check_adapter

    source, target, base = context.adapter.adapter, context.scratch / name, context.spec.base
    check_adapter(source)
    target.mkdir()
    write_adapter(source, base.folder, target / ADAPTER, name=base.public_name)
    dtype, threads = settings.dtype, context.spec.placement.threads
    notes = write_model(
        base.folder, target / FILE, chat=context.chat, dtype=dtype, name=base.public_name, threads=threads
    )
    notes += write_modelfile(target / "Modelfile", context.chat, source=f"FROM ./{FILE}\nADAPTER ./{ADAPTER}")
    snippet = server_snippet(f"{name}/{FILE}", adapter=f"{name}/{ADAPTER}", ollama=f"{name}/Modelfile")
    parity = check(context, name, settings, _expected(context, settings), snippet=snippet)
    for note in notes:
        log("export", f"{name}: {note}")
    context.snippets["The adapter on a GGUF of the base, in llama.cpp"] = snippet
    return context.publish(name, settings, parity, notes=notes)


def _expected(context: ExportContext, settings: ExportConfig) -> Expected:
    """Measures the adapter on the dense base, in peft."""
    from finetune.inference.adapted import free_memory

    model = context.load(context.spec.dense(), settings, adapter=context.adapter.adapter)
    expected = context.expected_output(model, settings)
    del model
    free_memory()
    return expected


def write_adapter(folder: Path, base: Path, target: Path, *, name: str) -> None:
    """Writes a peft LoRA in llama.cpp's form: float32 A and B under the names of the base's tensors.

    Args:
        folder: adapter_config.json and adapter_model.safetensors.
        base: Folder of the base, for its architecture.
        target: The file.
        name: Of the base.

    Raises:
        ExportError: llama.cpp does not support this kind of adapter.

    Source: llama.cpp build 11549, convert_lora_to_gguf.py and src/llama-adapter.h (scale = alpha / rank of each B).
    """
    from gguf import MODEL_ARCH_NAMES, GGUFType, GGUFWriter, Keys
    from safetensors.torch import load_file

    from finetune.export.gguf.architecture import Layout
    from finetune.export.gguf.file import GGUFTensor, required_bytes, write_tensors
    from finetune.export.gguf.quant_types import QuantType
    from finetune.export.gguf.tensors import Part

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    layout, saved = Layout(base), load_file(folder / "adapter_model.safetensors")
    tensors = [
        GGUFTensor(Part(name, name, tuple(value.shape), partial(iter, (value,))), QuantType.F32, False)
        for name, value in _tensors(saved, config=config, layout=layout)
    ]
    require_disk(target.parent, required_bytes(tensors), target.name, error=ExportError)
    writer = GGUFWriter(target, MODEL_ARCH_NAMES[layout.architecture.arch])
    writer.add_type(GGUFType.ADAPTER)
    writer.add_name(f"LoRA for {name}")
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    write_tensors(writer, tensors, threads=1)


def _tensors(saved: dict[str, Tensor], *, config: dict[str, Any], layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Yields ``blk.0.attn_q.weight.lora_a`` and ``.lora_b`` in float32; B absorbs alphas and ranks of layers."""
    for key, tensor in saved.items():
        suffix = next((suffix for suffix in SUFFIXES if key.endswith(suffix)), None)
        module = key.removeprefix(PREFIX).removesuffix(suffix or "")
        renamed = layout.gguf_name(f"{module}.weight") if suffix else None
        if suffix is None or renamed is None:
            raise ExportError(f"the adapter holds {key.removeprefix(PREFIX)}, and {LOW_RANK_ONLY}")
        if suffix == ".lora_B.weight":
            factor = _scaling(config, module, rank=tensor.shape[1]) * tensor.shape[1] / config["lora_alpha"]
            tensor = tensor.float() * factor
        if (suffix == ".lora_A.weight") == module.endswith(COLUMNS):
            tensor = layout.converted(f"{module}.weight", tensor)
        yield renamed + SUFFIXES[suffix], tensor.float().contiguous()


def _scaling(config: dict[str, Any], module: str, *, rank: int) -> float:
    """Returns peft's scaling: alpha over the rank, or over its root for rsLoRA."""
    from peft.utils.other import get_pattern_key

    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
