"""The merge stage: reference, candidates, choice, and a fresh look at what was written."""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.console import human_bytes, say, table
from finetune.errors import MergeError
from finetune.hardware import Placement
from finetune.measure.stage import StageProduct
from finetune.merge.choice import choose, table_rows
from finetune.merge.config import MergeConfig
from finetune.model import Base, ModelConfig
from finetune.quantization import QuantizationConfig

if TYPE_CHECKING:
    from finetune.measure import Reference
    from finetune.merge.candidates import Built
    from finetune.merge.changes import Change


@dataclass(frozen=True, kw_only=True)
class MergedModel:
    """One plain model, made of base and adapter.

    Attributes:
        folder: The stage's folder; the model is in ``folder/model``, with its tokenizer.
        chosen: Name of the candidate that was kept.
        rule: Why that one.
        reference: The trained graph itself: ``{"loss", "perplexity", "tokens"}``.
        candidates: ``{"name", "kl", "top1_agreement", "max_difference", "loss", "perplexity", "tokens", "bytes",
            "adapted_weights", "changed_weights"}`` each; ``changed_weights`` differ from the base after rounding.
        reloaded: The chosen one again, measured by a fresh process from the files that were kept.
        sha256: Over the weight files of ``folder/model``.
        adapters: Weights of further adapters that are in it too, by folder.
    """

    folder: Path
    chosen: str
    rule: str
    reference: dict[str, Any]
    candidates: list[dict[str, Any]]
    reloaded: dict[str, Any]
    sha256: str
    adapters: dict[str, float] = field(default_factory=dict)


def merge(
    config: MergeConfig,
    *,
    folder: Path,
    base: Base,
    model: ModelConfig,
    quantization: QuantizationConfig,
    placement: Placement,
    adapter: StageProduct,
    data: StageProduct,
) -> MergedModel:
    """Builds the candidates, measures each against the trained graph, keeps one and measures that again from disk.

    Args:
        config: The merge group.
        folder: The stage's folder.
        base, model, quantization, placement: As they were for training.
        adapter: Its plain peft folder is ``adapter.folder/adapter``.
        data: Its held-out rows are in ``data.folder/heldout``.

    Raises:
        MergeError: Nothing can be merged, the adapter changes nothing, no candidate is good enough, the disk is too
            small, or the model that was written measures differently when it is opened again.
    """
    from finetune.measure import chat_of, open_rows, pick_rows
    from finetune.merge.candidates import write_chat
    from finetune.merge.changes import add_changes, read_changes
    from finetune.model import weights_sha256

    names = _candidates(config, quantization)
    heldout = open_rows(data.folder / "heldout")
    picked = pick_rows(heldout, tokens=config.measure_tokens)
    if not picked:
        raise MergeError("no held-out row has a trained token, so merges cannot be compared; look at the ledger in the data folder")
    work = folder / ".candidates"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    _check_disk(base, folder, candidates=len(names), tokens=config.measure_tokens)
    stage = _Stage(config=config, base=base, model=model, quantization=quantization, placement=placement, work=work)
    rows = [heldout[number] for number in picked]
    changes = read_changes(adapter.folder / "adapter")
    for further, weight in config.adapters.items():
        changes = add_changes(changes, Path(further).expanduser(), weight=weight)
    reference, built = stage.build(adapter.folder / "adapter", changes, rows=rows, names=names)
    figures = [stage.measure(one, rows=rows, reference=reference) for one in built]
    table("merge", ["candidate", "KL", "top-1", "loss", "perplexity", "size"], table_rows(figures, trained=reference.loss))
    chosen, rule = choose(figures, config=config, trained_loss=reference.loss)
    say("merge", f"{chosen['name']} is kept: {rule}")
    chat = chat_of(base, data.folder, trust_remote_code=model.trust_remote_code)
    write_chat(work / chosen["name"], chat)
    reloaded = stage.reload(work / chosen["name"], chosen, heldout=data.folder / "heldout", picked=picked, reference=reference)
    kept = _publish(work / chosen["name"], folder / "model")
    shutil.rmtree(work)
    return MergedModel(
        folder=folder,
        chosen=chosen["name"],
        rule=rule,
        reference={"loss": reference.loss, "perplexity": _perplexity(reference.loss), "tokens": reference.positions},
        candidates=figures,
        reloaded=reloaded,
        sha256=weights_sha256(kept),
        adapters=dict(config.adapters),
    )


def _candidates(config: MergeConfig, quantization: QuantizationConfig) -> list[str]:
    if quantization.method != "none":
        return list(config.candidates)
    if config.choose == "dequantized":
        raise MergeError(
            "merge.choose=dequantized, but quantization.method=none, so there is nothing to dequantize; use merge.choose=original"
        )
    if config.candidates != ["original"]:
        say("merge", "only the candidate original: the base was not quantized, so dequantized would be the same")
    return ["original"]


def _check_disk(base: Base, folder: Path, *, candidates: int, tokens: int) -> None:
    import json

    weights = sum(file.stat().st_size for file in base.folder.glob("*.safetensors"))
    vocabulary = json.loads((base.folder / "config.json").read_text()).get("vocab_size", 0)
    need, free = candidates * weights + 4 * tokens * vocabulary, shutil.disk_usage(folder).free
    if free < need:
        raise MergeError(
            f"merging needs {human_bytes(need)} of disk beside {folder} ({candidates} candidates and the reference) and "
            f"{human_bytes(free)} are free; free some, name one candidate in merge.candidates, or lower merge.measure_tokens"
        )


def _publish(built: Path, target: Path) -> Path:
    """Two renames: whoever looks, or is interrupted, finds the earlier model or the new one, whole."""
    if target.exists():
        os.replace(target, built.parent / "earlier")
    os.replace(built, target)
    return target


def _perplexity(loss: float) -> float:
    import math

    return math.exp(min(loss, 700.0))


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """What every step of the stage needs."""

    config: MergeConfig
    base: Base
    model: ModelConfig
    quantization: QuantizationConfig
    placement: Placement
    work: Path

    def build(self, adapter: Path, changes: dict[str, Change], *, rows: list[Any], names: list[str]) -> tuple[Reference, list[Built]]:
        """Records the trained graph, then writes the candidates; the graph is gone before the first one is loaded."""
        import torch

        from finetune.measure import free, reference_logprobs, trained_graph
        from finetune.merge.candidates import build, from_disk
        from finetune.merge.graph import add_adapters, dequantized

        graph = trained_graph(self.base, self.model, quantization=self.quantization, placement=self.placement, adapter=adapter)
        if self.config.adapters:
            add_adapters(graph, self.config.adapters, base_sha256=self.base.sha256)
            say("merge", "with the run's adapter: " + ", ".join(f"{name} x {weight:g}" for name, weight in self.config.adapters.items()))
        reference = reference_logprobs(
            graph, rows, self.work / "reference.f32", batch_tokens=self.config.batch_tokens, progress="trained graph"
        )  # fmt: skip
        say("merge", f"the trained graph on {len(rows)} held-out rows, {reference.positions:,} trained tokens: loss {reference.loss:.4f}")
        built = []
        for name in names:
            source = dequantized(graph) if name == "dequantized" else from_disk
            built.append(build(self.base.folder, changes, self.work / name, dtype=getattr(torch, self.config.dtype), source=source))
            self._check_not_inert(built[-1])
        del graph, source
        free()
        return reference, built

    def _check_not_inert(self, built: Built) -> None:
        if built.changed == 0:
            raise MergeError(
                f"the adapter changes none of {built.adapted:,} weights once they are rounded to {self.config.dtype}, so the merged model "
                "would be the base; train longer or with a higher learning rate, or use merge.dtype=float32"
            )

    def measure(self, built: Built, *, rows: list[Any], reference: Reference) -> dict[str, Any]:
        from finetune.measure import agreement, free
        from finetune.model import load

        name = built.folder.name
        merged = load(
            dataclasses.replace(self.base, folder=built.folder),
            self.model,
            quantization=dataclasses.replace(self.quantization, method="none", double=False),
            placement=dataclasses.replace(self.placement, dtype=self.config.dtype),
        )
        found = agreement(merged, rows, reference, batch_tokens=self.config.batch_tokens, progress=name)
        del merged
        free()
        sizes = {"bytes": built.bytes, "adapted_weights": built.adapted, "changed_weights": built.changed}
        return {"name": name, **dataclasses.asdict(found), **sizes}

    def reload(self, kept: Path, first: dict[str, Any], *, heldout: Path, picked: list[int], reference: Reference) -> dict[str, Any]:
        from finetune.measure import FreshProcessError, run_fresh

        request = {
            "folder": kept.resolve(), "dtype": self.config.dtype, "attention": self.placement.attention, "device": self.placement.device,
            "threads": self.placement.threads, "remote_code": self.model.remote_code, "heldout": heldout.resolve(),
            "rows": picked, "batch_tokens": self.config.batch_tokens,
            "reference": {**dataclasses.asdict(reference), "file": reference.file.resolve()},
        }  # fmt: skip
        try:
            again = run_fresh("finetune.merge.reload", request, work=self.work)
        except FreshProcessError as error:
            raise MergeError(f"the merged model in {kept} cannot be opened by a fresh process: {error}") from error
        furthest = max(abs(again["loss"] - first["loss"]), abs(again["kl"] - first["kl"]))
        if furthest > self.config.max_reload_difference:
            raise MergeError(
                f"{kept} measures differently in a fresh process: loss {again['loss']:.5f} after {first['loss']:.5f}, KL {again['kl']:.5f} "
                f"after {first['kl']:.5f}; the bound merge.max_reload_difference is {self.config.max_reload_difference}"
            )
        say("merge", f"opened again by plain transformers in a fresh process: loss {again['loss']:.4f}, KL {again['kl']:.5f}, as before")
        return again
