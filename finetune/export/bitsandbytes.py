"""Exports the tuned model in 4 or 8 bits, as a checkpoint that plain transformers loads with bitsandbytes.

It quantizes the original base with the adapter, never the dequantized base. Its weights are on the 4-bit grid already,
and most of an adapter's changes are less than half a step, so rounding would remove them. Measured on the quickstart
(SmolLM2-135M, NF4, held-out loss): merged 0.092; merged and quantized 2.79, like the untuned base; original 0.106.
The checkpoint is compared with the same rounding in this process; its cost compared with the merged model is reported.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from finetune.errors import ExportError
from finetune.export.config import DTYPES, ExportConfig
from finetune.export.context import ExportContext
from finetune.export.manifest import write_record
from finetune.export.snippets import merged_snippet
from finetune.inference.chat import save_tokenizer
from finetune.products import ExportResult
from finetune.quantization import QuantizationConfig

SHARD = "2GB"


def write(context: ExportContext, name: str, settings: ExportConfig) -> ExportResult:
    """Quantizes dense weights while loading, saves them before any forward pass, and checks the checkpoint.

    Raises:
        ExportError: Several adapters were merged into the dequantized base, or the checkpoint differs.
    """
    from finetune.export.parity import rounding_cost
    from finetune.inference.adapted import free_memory

    config = _config(context, settings)
    # The dense weights meanwhile, and embedding, head and quantized layers.
    context.require_disk(name, 1.6 * context.merged_bytes)
    target, merged_folder = context.scratch / name, context.merged.folder / "model"
    before = context.expected_merged_output(settings)
    from_original = context.merged.chosen == "dequantized" and config.method != "int8"
    model = _open(context, _merge_original(context, name) if from_original else merged_folder, config)
    model.save_pretrained(target, max_shard_size=SHARD)
    shutil.copyfile(merged_folder / "generation_config.json", target / "generation_config.json")
    save_tokenizer(context.chat.tokenizer, target)
    spec = dataclasses.replace(context.spec.dense(dtype=context.merged_dtype), quantization=config)
    write_record(target, "merged", spec=spec, chat=context.chat)
    wanted = context.expected_output(model, settings)
    del model
    free_memory()
    snippet = merged_snippet(name, model=context.spec.config, dtype=context.merged_dtype)
    parity = context.check(name, settings, wanted, snippet=snippet, ends=[], packages=["transformers", "bitsandbytes"])
    scratch, seed = context.scratch, context.scorer.seed
    cost = rounding_cost(name, merged=before, export=wanted, config=settings, scratch=scratch, seed=seed)
    context.snippets[f"The tuned model in {config.method.upper()}, in transformers with bitsandbytes"] = snippet
    return context.publish(name, settings, dataclasses.replace(parity, cost=cost))


def _config(context: ExportContext, settings: ExportConfig) -> QuantizationConfig:
    """Returns the configured method, or the run's own, with the run's other settings."""
    run = context.spec.quantization
    method = settings.dtype or (run.method if run.method in DTYPES["bitsandbytes"] else "nf4")
    return dataclasses.replace(run, method=method, double=run.double and method != "int8")


def _merge_original(context: ExportContext, name: str) -> Path:
    """Merges the adapter into the original base by peft, in host memory where the device has too little.

    Returns:
        The folder.
    """
    from finetune.inference.adapted import free_memory, load_adapter
    from finetune.inference.budget import Workload
    from finetune.inference.dense import place

    if context.merged.adapters:
        raise ExportError(
            f"export.{name}: several adapters were merged into the dequantized base, and rounding that again would "
            "lose them; set merge.choose=original"
        )
    workload = Workload(pass_tokens=1, passes=0)
    fits = not place(context.spec.dense(dtype=context.merged_dtype), workload).max_memory
    device = context.spec.placement.device if fits else "cpu"
    base = _open(context, context.spec.base.folder, device=device)
    model = load_adapter(base, context.adapter.adapter, upcast="none").merge_and_unload()
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        model.config.tie_word_embeddings = False  # one of the two was trained: saved as tied, it would be lost
    model.save_pretrained(context.scratch / "dense", max_shard_size=SHARD)
    del base, model
    free_memory()
    return context.scratch / "dense"


def _open(
    context: ExportContext, folder: Path, config: QuantizationConfig | None = None, *, device: str | None = None
) -> Any:
    """Loads a model without `ModelSpec.load`, which would cache the quantized base for later starts."""
    import torch

    from finetune.model.text_only import from_pretrained
    from finetune.quantization import loader_arguments
    from finetune.quantization.bnb import prevent_repacking

    model = from_pretrained(
        folder,
        dtype=getattr(torch, context.merged_dtype),
        attn_implementation=context.spec.placement.attention,
        device_map={"": device or context.spec.placement.device},
        trust_remote_code=context.spec.config.trust_remote_code,
        **(loader_arguments(config, dtype=context.merged_dtype) if config else {}),
    )
    prevent_repacking(model)  # before the first pass, which may repack the weights to be saved
    return model.eval().requires_grad_(False)
