"""The export stage: each export is written aside, opened by its own runtime, compared, and only then put in its place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.console import human_bytes, log
from finetune.export import adapter as adapters
from finetune.export import bitsandbytes, card, gguf, gguf_lora, hub, onnx, safetensors
from finetune.export.config import ExportConfig
from finetune.export.context import Rules, Work
from finetune.model import ModelSpec
from finetune.products import Exports, MergedModel, PreparedData, Scores, TrainedAdapter

WRITERS: dict[str, Callable[[Work, str, ExportConfig], dict[str, Any]]] = {
    "adapter": adapters.write,
    "safetensors": safetensors.write,
    "bitsandbytes": bitsandbytes.write,
    "gguf": gguf.write,
    "gguf_lora": gguf_lora.write,
    "onnx": onnx.write,
    "card": card.write,
    "hub": hub.write,
}
"""In the order in which they are made: a card describes the others, and a push sends them."""


def export(
    config: dict[str, ExportConfig],
    *,
    folder: Path,
    spec: ModelSpec,
    adapter: TrainedAdapter,
    merged: MergedModel,
    scores: Scores,
    data: PreparedData,
    judge: Rules,
) -> Exports:
    """Writes every export and compares each with the model that it was made from.

    Args:
        config: The export group: one entry per export, by the name of its folder.
        folder: The stage's folder.
        spec, adapter, merged, scores, data, judge: See `Work`.

    Raises:
        ExportError: An export cannot be opened by its own runtime, or differs from its model.
    """
    from finetune.inference.chat import load_chat

    desk = folder / ".work"
    shutil.rmtree(desk, ignore_errors=True)
    desk.mkdir(parents=True)
    chat = load_chat(spec, data.folder)
    work = Work(
        folder=folder,
        desk=desk,
        spec=spec,
        adapter=adapter,
        merged=merged,
        scores=scores,
        data=data,
        judge=judge,
        chat=chat,
    )
    order = list(WRITERS)
    for name, settings in sorted(config.items(), key=lambda item: order.index(item[1].format)):
        made = WRITERS[settings.format](work, name, settings)
        work.exports.append(made)
        log(
            "export",
            f"{name}: {folder / Path(made['path']).name}, {human_bytes(made['bytes'])}{_sentence(made['parity'])}",
        )
    shutil.rmtree(desk)
    return Exports(folder=folder, exports=work.exports)


def _answers(answers: dict[str, Any]) -> str:
    figures = ", ".join(
        f"{name} {one['value']:.3f} ({answers['model']['metrics'][name]['value']:.3f})"
        for name, one in answers["metrics"].items()
    )
    return f"; {answers['rows']} held-out answers in {answers['seconds']:.0f} s: {figures}, in brackets the model's"


def _sentence(parity: dict[str, Any]) -> str:
    if not parity:
        return ""
    loss = (
        f", held-out loss {parity['loss']:.4f} where the model has {parity['model_loss']:.4f}" if parity["rows"] else ""
    )
    loss += _answers(parity["answers"]) if "answers" in parity else ""
    cost = f"; {parity['cost']['note']}" if "cost" in parity else ""
    return (
        f"; opened by {parity['runtime']}: {parity['chats']} golden chats give the same token ids, logits of {parity['prompts']} prompts "
        f"within {parity['max_logit_difference']:.4f} (bound {parity['bound']:g}), KL {parity['kl']:.6f}{loss}{cost}"
    )
