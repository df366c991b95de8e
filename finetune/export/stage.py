"""Runs the export stage: writes each export to a scratch folder, checks it in its own runtime, then publishes it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from finetune.console import human_bytes, log
from finetune.export import adapter as adapters
from finetune.export import bitsandbytes, card, finished, fp8, gguf, gguf_lora, hub, onnx, packed, safetensors
from finetune.export.config import ExportConfig
from finetune.export.context import ExportContext, Scorer
from finetune.model import ModelSpec
from finetune.products import ExportResult, Exports, MergedModel, PreparedData, Scores, TrainedAdapter
from finetune.scores import ExportAnswers, Parity

WRITERS: dict[str, Callable[[ExportContext, str, ExportConfig], ExportResult]] = {
    "adapter": adapters.write,
    "safetensors": safetensors.write,
    "bitsandbytes": bitsandbytes.write,
    "gptq": packed.write,
    "awq": packed.write,
    "fp8": fp8.write,
    "gguf": gguf.write,
    "gguf_lora": gguf_lora.write,
    "onnx": onnx.write,
    "card": card.write,
    "hub": hub.write,
}
"""In the order of writing: a card describes the other exports, and a push uploads them."""


def export(
    config: dict[str, ExportConfig],
    *,
    folder: Path,
    spec: ModelSpec,
    adapter: TrainedAdapter,
    merged: MergedModel,
    scores: Scores,
    data: PreparedData,
    scorer: Scorer,
) -> Exports:
    """Writes every export and compares each with the model that it was made from.

    Args:
        config: The export group: one entry per export, by the name of its folder.
        folder: The stage's folder.
        spec, adapter, merged, scores, data, scorer: See `ExportContext`.

    Raises:
        ExportError: An export cannot be opened by its own runtime, or differs from its model.
    """
    from finetune.inference.chat import load_chat
    from finetune.inference.oom import halve_batches

    scratch = folder / ".work"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    chat = load_chat(spec, data.folder)
    context = ExportContext(
        folder=folder,
        scratch=scratch,
        spec=spec,
        adapter=adapter,
        merged=merged,
        scores=scores,
        data=data,
        scorer=scorer,
        chat=chat,
    )
    order = list(WRITERS)
    for name, settings in sorted(config.items(), key=lambda item: order.index(item[1].format)):
        earlier, snippets = finished.find(context, name, settings), len(context.snippets)
        if earlier is not None:
            log("export", f"{name}: done before: {folder / name} is used as it is")
            context.exports.append(earlier)
            continue
        with halve_batches("export") as halvings:
            written = WRITERS[settings.format](context, name, settings)
        context.halvings += halvings.count
        context.exports.append(written)
        finished.remember(context, name, settings, written, since=snippets)
        path, size = folder / Path(written.path).name, human_bytes(written.bytes)
        log("export", f"{name}: {path}, {size}{_parity_text(written.parity)}")
    shutil.rmtree(scratch)
    finished.forget(folder)
    return Exports(folder=folder, exports=context.exports, halvings=context.halvings)


def _answers_text(answers: ExportAnswers) -> str:
    model = answers.model.metrics
    figures = [f"{name} {level.value:.3f} ({model[name].value:.3f})" for name, level in answers.metrics.items()]
    seconds = f"{answers.seconds:.0f} s"
    return f"; {answers.rows} held-out answers in {seconds}: {', '.join(figures)}, the model's in brackets"


def _parity_text(parity: Parity | None) -> str:
    if parity is None:
        return ""
    parts = [
        f"; opened by {parity.runtime}: {parity.chats} reference prompts give the same token ids, logits of "
        f"{parity.prompts} prompts within {parity.max_logit_difference:.4f} (bound {parity.bound:g}), "
        f"KL {parity.kl:.6f}"
    ]
    if parity.rows:
        parts.append(f", held-out loss {parity.loss:.4f} (model {parity.model_loss:.4f})")
    if parity.answers:
        parts.append(_answers_text(parity.answers))
    if parity.cost:
        parts.append(f"; {parity.cost.note}")
    return "".join(parts)
