"""The adapter as a GGUF LoRA for llama.cpp and Ollama, beside a GGUF of the base that it lies on.

llama.cpp adds an adapter to dense or quantized weights of the original base; the trained graph's own quantization is not to
be had there, so what is exported and compared is the adapter on the original: the merge's candidate ``original``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.console import log
from finetune.errors import ExportError
from finetune.export.config import ExportConfig
from finetune.export.context import Work
from finetune.export.gguf import FILE, check, server_snippet
from finetune.export.needs import LOW_RANK_ONLY, check_packages

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.export.gguf.architecture import Layout
    from finetune.export.gguf.file import Planned
    from finetune.export.parity import Expected

ADAPTER = "adapter.gguf"
PREFIX = "base_model.model."
PARTS = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b"}


def write(work: Work, name: str, settings: ExportConfig) -> dict[str, Any]:
    """Converts the adapter and the base, and opens the one on the other by llama.cpp."""
    check_packages({name: settings})
    from finetune.export.gguf import ollama
    from finetune.export.gguf.file import write_model
    from finetune.inference.adapted import check_adapter

    source, target = work.adapter.folder / "adapter", work.desk / name
    check_adapter(source)
    target.mkdir()
    write_adapter(source, work.spec.base.folder, target / ADAPTER, name=work.spec.base.name)
    notes = write_model(
        work.spec.base.folder, target / FILE, chat=work.chat, numbers=settings.numbers, name=work.spec.base.name, threads=work.spec.placement.threads
    )  # fmt: skip
    notes += ollama.write(target / "Modelfile", work.chat, source=f"FROM ./{FILE}\nADAPTER ./{ADAPTER}")
    snippet = server_snippet(f"{name}/{FILE}", adapter=f"{name}/{ADAPTER}", ollama=f"{name}/Modelfile")
    parity = check(work, name, settings, _expects(work, settings), snippet=snippet)
    for note in notes:
        log("export", f"{name}: {note}")
    work.snippets["The adapter on a GGUF of the base, in llama.cpp"] = snippet
    return {**work.keep(name, settings, parity), "notes": notes}


def _expects(work: Work, settings: ExportConfig) -> Expected:
    """What the adapter gives on the dense base, in peft."""
    from finetune.inference.adapted import free_memory, load_adapted_model

    graph = load_adapted_model(work.spec.dense(), work.adapter.adapter)
    wanted = work.expect(graph, settings)
    del graph
    free_memory()
    return wanted


def write_adapter(folder: Path, base: Path, target: Path, *, name: str) -> None:
    """Writes a peft LoRA as llama.cpp reads it: float32 A and B under the names of the base's tensors.

    Args:
        folder: adapter_config.json and adapter_model.safetensors.
        base: Folder of the base, for its architecture.
        target: The file.
        name: Of the base.

    Raises:
        ExportError: llama.cpp cannot add what was trained.

    Source: llama.cpp build 11549, convert_lora_to_gguf.py and src/llama-adapter.h (scale = alpha / rank of each B).
    """
    from gguf import MODEL_ARCH_NAMES, GGUFType, GGUFWriter, Keys
    from safetensors.torch import load_file

    from finetune.export.gguf.architecture import Layout
    from finetune.export.gguf.file import check_space, write_tensors

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    layout, saved = Layout(base), load_file(folder / "adapter_model.safetensors")
    tensors = dict(_tensors(saved, config=config, layout=layout))
    plans = [_planned(renamed, tensor) for renamed, tensor in tensors.items()]
    check_space(target, sum(plan.bytes for plan in plans))
    writer = GGUFWriter(target, MODEL_ARCH_NAMES[layout.architecture.kind])
    writer.add_type(GGUFType.ADAPTER)
    writer.add_name(f"LoRA for {name}")
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    write_tensors(writer, plans, lambda plan: tensors[plan.name], threads=1)


def _planned(name: str, tensor: Tensor) -> Planned:
    from finetune.export.gguf.file import Planned
    from finetune.export.gguf.quant_types import Kind

    return Planned(name, name, tuple(tensor.shape), Kind.F32, False)


def _tensors(saved: dict[str, Tensor], *, config: dict[str, Any], layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """``blk.0.attn_q.weight.lora_a`` and ``.lora_b``, in float32; where alpha or rank differ by layer, B carries the difference."""
    for key, tensor in saved.items():
        ending = next((ending for ending in PARTS if key.endswith(ending)), None)
        module = key.removeprefix(PREFIX).removesuffix(ending or "")
        renamed = layout.rename(f"{module}.weight") if ending else None
        if ending is None or renamed is None:
            raise ExportError(f"the adapter holds {key.removeprefix(PREFIX)}, and {LOW_RANK_ONLY}")
        if ending == ".lora_B.weight":
            share = _scaling(config, module, rank=tensor.shape[1]) * tensor.shape[1] / config["lora_alpha"]
            tensor = layout.arrange(f"{module}.weight", tensor.float() * share)
        yield renamed + PARTS[ending], tensor.float().contiguous()


def _scaling(config: dict[str, Any], module: str, *, rank: int) -> float:
    """peft's: alpha over the rank, or over its root for rsLoRA."""
    from peft.utils.other import get_pattern_key

    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
