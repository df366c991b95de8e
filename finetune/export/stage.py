"""The export stage: each export is written aside, opened by its own runtime, compared, and only then put in its place."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.console import human_bytes, say
from finetune.errors import ExportError
from finetune.export.card import CardFacts, DataFacts, MergedFacts, ScoreFacts, TrainedFacts, write_card
from finetune.export.config import ExportConfig
from finetune.export.snippets import adapter_snippet, finetune_snippet, merged_snippet
from finetune.hardware import Placement
from finetune.model import Base, ModelConfig
from finetune.quantization import QuantizationConfig

if TYPE_CHECKING:
    from finetune.export.parity import Expected
    from finetune.measure import Chat

CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class Exports:
    """What left the house.

    Attributes:
        folder: The stage's folder; each export lies in it under its name.
        exports: ``{"format", "path", "bytes", "sha256", "parity"}`` each; ``path`` is seen from the run folder, and
            ``parity`` holds what its own runtime gave beside the bounds (empty for the card).
    """

    folder: Path
    exports: list[dict[str, Any]]


def export(
    config: dict[str, ExportConfig],
    *,
    folder: Path,
    base: Base,
    model: ModelConfig,
    quantization: QuantizationConfig,
    placement: Placement,
    adapter: TrainedFacts,
    merged: MergedFacts,
    scores: ScoreFacts,
    data: DataFacts,
    seed: int,
) -> Exports:
    """Writes every export and holds each against the model that it was made from.

    Args:
        config: The export group: one entry per export, by the name of its folder.
        folder: The stage's folder.
        base, model, quantization, placement: As they were for training.
        adapter: Its plain peft folder is ``adapter.folder/adapter``.
        merged: Its plain transformers folder is ``merged.folder/model``.
        scores: For the card.
        data: Held-out prompts are in ``data.folder/heldout``.
        seed: Picks the held-out prompts.

    Raises:
        ExportError: An export cannot be opened by its own runtime, or differs from its model.
    """
    from finetune.measure import chat_of

    work = folder / ".work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    chat = chat_of(base, data.folder, trust_remote_code=model.trust_remote_code)
    stage = _Stage(
        folder=folder, work=work, base=base, model=model, quantization=quantization, placement=placement, adapter=adapter, merged=merged,
        scores=scores, data=data, seed=seed, chat=chat,
    )  # fmt: skip
    # The card describes the others, so it comes last wherever it was named.
    for name, settings in sorted(config.items(), key=lambda item: item[1].format == "card"):
        made = WRITERS[settings.format](stage, name, settings)
        stage.exports.append(made)
        say("export", f"{name}: {folder / name}, {human_bytes(made['bytes'])}{_sentence(made['parity'])}")
    shutil.rmtree(work)
    return Exports(folder=folder, exports=stage.exports)


def _sentence(parity: dict[str, Any]) -> str:
    if not parity:
        return ""
    return (
        f"; opened by {parity['runtime']}: {parity['chats']} golden chats give the same token ids, logits of {parity['prompts']} prompts "
        f"within {parity['max_logit_difference']:.4f} (bound {parity['bound']:g}), KL {parity['kl']:.6f}"
    )


@dataclass(kw_only=True)
class _Stage:
    """What every writer needs, and what the ones before it have made."""

    folder: Path
    work: Path
    base: Base
    model: ModelConfig
    quantization: QuantizationConfig
    placement: Placement
    adapter: TrainedFacts
    merged: MergedFacts
    scores: ScoreFacts
    data: DataFacts
    seed: int
    chat: Chat
    exports: list[dict[str, Any]] = field(default_factory=list)
    snippets: dict[str, str] = field(default_factory=dict)

    @property
    def merged_dtype(self) -> str:
        settings: dict[str, Any] = json.loads((self.merged.folder / "model" / "config.json").read_text())
        return str(settings["dtype"])

    def prompts(self, count: int) -> list[list[int]]:
        """Some held-out prompts, the same for a seed."""
        import numpy

        from finetune.measure import open_rows

        rows = open_rows(self.data.folder / "heldout")
        picked = sorted(numpy.random.default_rng(self.seed).permutation(len(rows))[:count].tolist())
        return [rows[number]["prompt_ids"] for number in picked]

    def check(
        self, name: str, settings: ExportConfig, wanted: Expected, *, snippet: str, ends: list[int], packages: list[str]
    ) -> dict[str, Any]:
        """Runs the snippet in a fresh process, beside the export, and compares."""
        from finetune.export.parity import compare
        from finetune.measure import FreshProcessError, run_fresh

        code, logits = self.work / "snippet.py", self.work / "logits.npz"
        code.write_text(snippet + "\n", encoding="utf-8")
        request = {
            "folder": self.work.resolve(), "snippet": code.resolve(), "logits": logits.resolve(), "threads": self.placement.threads,
            "prompts": wanted.prompts, "chats": wanted.chats, "ends": ends, "max_new_tokens": settings.max_new_tokens, "packages": packages,
        }  # fmt: skip
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.placement.device == "cpu" else {}
        try:
            got = run_fresh("finetune.export.runtime", request, work=self.work, environment=hidden)
        except FreshProcessError as error:
            raise ExportError(f"export.{name} cannot be opened by {' and '.join(packages)}: {error}") from error
        return compare(name, wanted, got, logits, config=settings)

    def keep(self, name: str, settings: ExportConfig, parity: dict[str, Any]) -> dict[str, Any]:
        """Puts a finished export in its place and describes it."""
        from finetune.model import weights_sha256

        made, place = self.work / name, self.folder / name
        if place.exists():
            shutil.rmtree(place)
        os.replace(made, place)
        size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        return {"format": settings.format, "path": f"export/{name}", "bytes": size, "sha256": weights_sha256(place), "parity": parity}


def _write_adapter(stage: _Stage, name: str, settings: ExportConfig) -> dict[str, Any]:
    from finetune.export.parity import expected
    from finetune.export.travel import write_record
    from finetune.measure import check_adapter, free, trained_graph

    source, target = stage.adapter.folder / "adapter", stage.work / name
    check_adapter(source)
    target.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(source / file, target / file)
    _point_to_base(target / "adapter_config.json", stage.base)
    stage.chat.tokenizer.save_pretrained(target)
    write_record(
        target, "adapter", base=stage.base, model=stage.model, quantization=stage.quantization, placement=stage.placement, chat=stage.chat
    )  # fmt: skip
    graph = trained_graph(stage.base, stage.model, quantization=stage.quantization, placement=stage.placement, adapter=source)
    wanted = expected(graph, stage.chat, heldout=stage.prompts(settings.golden_rows), max_new_tokens=settings.max_new_tokens)
    del graph
    free()
    snippet = adapter_snippet(
        name, base=stage.base, model=stage.model, quantization=stage.quantization, dtype=stage.placement.dtype, ends=stage.chat.ends
    )  # fmt: skip
    packages = ["peft", "transformers", *(["bitsandbytes"] if stage.quantization.method != "none" else [])]
    parity = stage.check(name, settings, wanted, snippet=snippet, ends=stage.chat.ends, packages=packages)
    stage.snippets["The adapter, in plain peft"] = snippet
    stage.snippets["The adapter, as it was trained, refusing any other base"] = finetune_snippet(name)
    return stage.keep(name, settings, parity)


def _point_to_base(file: Path, base: Base) -> None:
    """The base by the name that others know it by, not by a cache folder of this machine."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = base.name if base.source == "hub" else str(base.folder.resolve())
    settings["revision"] = base.revision
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_safetensors(stage: _Stage, name: str, settings: ExportConfig) -> dict[str, Any]:
    from finetune.export.parity import expected
    from finetune.export.travel import write_record
    from finetune.measure import free
    from finetune.model import load

    source, target = stage.merged.folder / "model", stage.work / name
    target.mkdir()
    for file in source.iterdir():
        _link(file, target / file.name)
    placement = dataclasses.replace(stage.placement, dtype=stage.merged_dtype)
    dense = dataclasses.replace(stage.quantization, method="none", double=False)
    write_record(target, "merged", base=stage.base, model=stage.model, quantization=dense, placement=placement, chat=stage.chat)
    merged = load(dataclasses.replace(stage.base, folder=source), stage.model, quantization=dense, placement=placement)
    wanted = expected(merged, stage.chat, heldout=stage.prompts(settings.golden_rows), max_new_tokens=settings.max_new_tokens)
    del merged
    free()
    snippet = merged_snippet(name, model=stage.model, dtype=stage.merged_dtype)
    parity = stage.check(name, settings, wanted, snippet=snippet, ends=[], packages=["transformers"])
    stage.snippets["The merged model, in plain transformers"] = snippet
    return stage.keep(name, settings, parity)


def _link(file: Path, target: Path) -> None:
    """Weights are linked, since they are large and never written to; everything else is a copy of its own."""
    if file.suffix == ".safetensors":
        try:
            os.link(file, target)
        except OSError:  # another disk, or a file system without links
            shutil.copyfile(file, target)
    else:
        shutil.copyfile(file, target)


def _write_card(stage: _Stage, name: str, settings: ExportConfig) -> dict[str, Any]:
    facts = CardFacts(
        base=stage.base, quantization=stage.quantization, data=stage.data, adapter=stage.adapter, merged=stage.merged, scores=stage.scores,
        exports=stage.exports, snippets=stage.snippets,
    )  # fmt: skip
    text = write_card(facts)
    target = stage.folder / CARD
    for file in [target, *[stage.folder / Path(one["path"]).name / CARD for one in stage.exports]]:
        file.write_text(text, encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"format": settings.format, "path": f"export/{CARD}", "bytes": target.stat().st_size, "sha256": digest, "parity": {}}


WRITERS: dict[str, Callable[[_Stage, str, ExportConfig], dict[str, Any]]] = {
    "adapter": _write_adapter,
    "safetensors": _write_safetensors,
    "card": _write_card,
}
