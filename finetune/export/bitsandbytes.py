"""The tuned model in 4 (or 8) bits, as a checkpoint that plain transformers opens with bitsandbytes.

What is rounded is the original base with the adapter, never the dequantized one: its weights lie on the 4-bit grid already,
and most of what an adapter adds is less than half a step, so rounding takes it off again. Measured on the quickstart
(SmolLM2-135M, NF4, held-out loss): merged 0.092; that rounded again 2.79, which is the untuned base's; original 0.106.
The checkpoint is held against the same rounding in this process, and its cost beside the merged model is measured and said.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from finetune.errors import ExportError
from finetune.export.config import NUMBERS, ExportConfig
from finetune.export.context import Work
from finetune.export.manifest import write_record
from finetune.export.snippets import merged_snippet
from finetune.quantization import QuantizationConfig

SHARD = "2GB"


def write(work: Work, name: str, settings: ExportConfig) -> dict[str, Any]:
    """Quantizes dense weights on the way in, saves them before anything is computed, and opens them again.

    Raises:
        ExportError: Several adapters in the dequantized base, or a checkpoint that differs.
    """
    from finetune.export.cost import cost
    from finetune.inference.adapted import free_memory

    config = _config(work, settings)
    work.need(name, 1.6 * work.merged_bytes)  # the dense weights meanwhile, and embedding, head and quantized layers
    target, merged_folder = work.desk / name, work.merged.folder / "model"
    before = work.expect_merged(settings)
    source = (
        _originals(work, name) if work.merged.chosen == "dequantized" and config.method != "int8" else merged_folder
    )
    model = _open(work, source, config)
    model.save_pretrained(target, max_shard_size=SHARD)
    shutil.copyfile(merged_folder / "generation_config.json", target / "generation_config.json")
    work.chat.tokenizer.save_pretrained(target)
    spec = dataclasses.replace(work.spec.dense(dtype=work.merged_dtype), quantization=config)
    write_record(target, "merged", spec=spec, chat=work.chat)
    wanted = work.expect(model, settings)
    del model
    free_memory()
    snippet = merged_snippet(name, model=work.spec.config, dtype=work.merged_dtype)
    parity = work.check(name, settings, wanted, snippet=snippet, ends=[], packages=["transformers", "bitsandbytes"])
    parity["cost"] = cost(name, merged=before, export=wanted, config=settings, desk=work.desk, seed=work.judge.seed)
    work.snippets[f"The tuned model in {config.method.upper()}, in transformers with bitsandbytes"] = snippet
    return work.keep(name, settings, parity)


def _config(work: Work, settings: ExportConfig) -> QuantizationConfig:
    """The method asked for, with the run's other settings; without one, the run's own method."""
    run = work.spec.quantization
    method = settings.numbers or (run.method if run.method in NUMBERS["bitsandbytes"] else "nf4")
    return dataclasses.replace(run, method=method, double=run.double and method != "int8")


def _originals(work: Work, name: str) -> Path:
    """A folder with the original base and the adapter in one, as peft adds them."""
    from finetune.inference.adapted import free_memory, load_adapter

    if work.merged.adapters:
        raise ExportError(
            f"export.{name}: several adapters were merged into the dequantized base, and rounding that again would lose them; "
            "set merge.choose=original"
        )
    model = load_adapter(_open(work, work.spec.base.folder), work.adapter.adapter, upcast="none").merge_and_unload()
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        model.config.tie_word_embeddings = False  # one of the two was trained: saved as tied, it would be lost
    model.save_pretrained(work.desk / "dense", max_shard_size=SHARD)
    del model
    free_memory()
    return work.desk / "dense"


def _open(work: Work, folder: Path, config: QuantizationConfig | None = None) -> Any:
    """Not `finetune.model.load`: that keeps a quantized base for later starts, and this one is kept anyway."""
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.quantization import loader_arguments
    from finetune.quantization.bnb import prevent_repacking

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, work.merged_dtype),
        attn_implementation=work.spec.placement.attention,
        device_map={"": work.spec.placement.device},
        trust_remote_code=work.spec.config.trust_remote_code,
        **(loader_arguments(config, dtype=work.merged_dtype) if config else {}),
    )
    prevent_repacking(model)  # before the first pass, or an evaluation repacks what is about to be saved
    return model.eval().requires_grad_(False)
