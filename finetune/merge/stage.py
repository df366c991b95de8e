"""The merge stage: reference, candidates, choice, and a fresh look at what was written."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.console import human_bytes, log, table
from finetune.errors import MergeError
from finetune.merge.config import MergeConfig
from finetune.merge.select import choose, table_rows
from finetune.model import Base, ModelSpec
from finetune.products import MergedModel, PreparedData, TrainedAdapter

if TYPE_CHECKING:
    from finetune.inference.kl_divergence import KLResult, ReferenceLogits
    from finetune.inference.losses import RowLoss
    from finetune.merge.adapter_deltas import Change
    from finetune.merge.candidates import Built


def merge(
    config: MergeConfig, *, folder: Path, spec: ModelSpec, adapter: TrainedAdapter, data: PreparedData, seed: int
) -> MergedModel:
    """Builds the candidates, measures each against the trained graph, keeps one and measures that again from disk.

    Args:
        config: The merge group.
        folder: The stage's folder.
        spec: The base as it was loaded for training.
        adapter: The trained adapter.
        data: Its held-out rows are in ``data.folder/heldout``.
        seed: Seeds the intervals.

    Raises:
        MergeError: Nothing can be merged, the adapter changes nothing, no candidate is good enough, the disk is too
            small, or the written model measures differently when it is opened again.
    """
    from finetune.inference.chat import load_chat
    from finetune.inference.rows import read_rows, trained_tokens
    from finetune.merge.adapter_deltas import add_changes, read_changes
    from finetune.merge.candidates import write_chat
    from finetune.model.base import weights_sha256

    names = _candidates(config, spec)
    rows = read_rows(data.folder / "heldout", limit=config.loss_rows)
    if not any(map(trained_tokens, rows)):
        raise MergeError(
            f"none of the first {len(rows)} held-out rows has a trained token, so merges cannot be compared; look at the ledger in the "
            "data folder"
        )
    work = folder / ".candidates"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    _check_disk(spec.base, folder, candidates=len(names), tokens=config.measure_tokens)
    stage = _Stage(config=config, spec=spec, work=work, rows=rows, seed=seed)
    changes = read_changes(adapter.adapter)
    for further, weight in config.adapters.items():
        changes = add_changes(changes, Path(further).expanduser(), weight=weight)
    reference, built = stage.build(adapter.adapter, changes, names=names)
    trained, figures = stage.losses(reference.losses), [stage.measure(one, reference) for one in built]
    table(
        "merge",
        ["candidate", "KL", "top-1", "loss", "change of loss", "perplexity", "size"],
        table_rows(figures, trained=trained),
    )
    chosen, rule = choose(figures, config=config, trained_loss=reference.loss)
    log("merge", f"{chosen['name']} is kept: {rule}")
    chat = load_chat(spec, data.folder)
    write_chat(work / chosen["name"], chat)
    reloaded = stage.reload(work / chosen["name"], chosen, heldout=data.folder / "heldout", reference=reference)
    kept = _publish(work / chosen["name"], folder / "model")
    shutil.rmtree(work)
    return MergedModel(
        folder=folder,
        chosen=chosen["name"],
        rule=rule,
        loss_rows=len(rows),
        reference=trained,
        candidates=figures,
        reloaded=reloaded,
        sha256=weights_sha256(kept),
        adapters=dict(config.adapters),
    )


def _candidates(config: MergeConfig, spec: ModelSpec) -> list[str]:
    if spec.is_quantized:
        return list(config.candidates)
    if config.choose == "dequantized":
        raise MergeError(
            "merge.choose=dequantized, but quantization.method=none, so there is nothing to dequantize; use merge.choose=original"
        )
    if config.candidates != ["original"]:
        log("merge", "only the candidate original: the base was not quantized, so dequantized would be the same")
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
    """Puts the model in its place, whole. What stood there was of a stage that never ended: one that did is redone in another folder."""
    if target.exists():
        os.replace(target, built.parent / "earlier")
    os.replace(built, target)
    return target


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """What every step of the stage needs."""

    config: MergeConfig
    spec: ModelSpec
    work: Path
    rows: list[dict[str, Any]]
    seed: int

    def build(
        self, adapter: Path, changes: dict[str, Change], *, names: list[str]
    ) -> tuple[ReferenceLogits, list[Built]]:
        """Records the trained graph, then writes the candidates; the graph is gone before the first one is loaded."""
        import torch

        from finetune.inference.adapted import free_memory, load_adapted_model
        from finetune.inference.kl_divergence import record_reference
        from finetune.merge.candidates import build, from_disk
        from finetune.merge.graph import add_adapters, dequantized

        graph = load_adapted_model(self.spec, adapter)
        if self.config.adapters:
            add_adapters(graph, self.config.adapters, base_sha256=self.spec.base.sha256)
            log(
                "merge",
                "with the run's adapter: "
                + ", ".join(f"{name} x {weight:g}" for name, weight in self.config.adapters.items()),
            )
        reference = record_reference(
            graph, self.rows, self.work / "reference.f32", batch_tokens=self.config.batch_tokens, tokens=self.config.measure_tokens,
            progress="trained graph",
        )  # fmt: skip
        log("merge", f"the trained graph on {len(self.rows)} held-out rows: loss {reference.loss:.4f}; the distributions of "
            f"{reference.positions:,} trained tokens are kept to compare with")  # fmt: skip
        built = []
        for name in names:
            source = dequantized(graph) if name == "dequantized" else from_disk
            built.append(
                build(
                    self.spec.base.folder,
                    changes,
                    self.work / name,
                    dtype=getattr(torch, self.config.dtype),
                    source=source,
                )
            )
            self._check_not_inert(built[-1])
        del graph, source
        free_memory()
        return reference, built

    def _check_not_inert(self, built: Built) -> None:
        if built.changed == 0:
            raise MergeError(
                f"the adapter changes none of {built.adapted:,} weights once they are rounded to {self.config.dtype}, so the merged model "
                "would be the base; train longer or with a higher learning rate, or use merge.dtype=float32"
            )

    def losses(self, rows: Sequence[RowLoss]) -> dict[str, Any]:
        from finetune.inference.bootstrap import RESAMPLES, Bootstrap, token_loss

        return Bootstrap(len(rows), samples=RESAMPLES, seed=self.seed).loss(token_loss(rows))

    def figures(self, found: KLResult, reference: ReferenceLogits) -> dict[str, Any]:
        from finetune.inference.bootstrap import RESAMPLES, Bootstrap, token_loss

        draw = Bootstrap(len(self.rows), samples=RESAMPLES, seed=self.seed)
        difference = draw.difference(token_loss(reference.losses), token_loss(found.losses))
        return {**self.losses(found.losses), "loss_difference": difference.change, **found.distances}

    def measure(self, built: Built, reference: ReferenceLogits) -> dict[str, Any]:
        from finetune.inference.adapted import free_memory
        from finetune.inference.kl_divergence import compare_with_reference

        name = built.folder.name
        merged = self.spec.dense(built.folder).load()
        found = compare_with_reference(
            merged, self.rows, reference, batch_tokens=self.config.batch_tokens, progress=name
        )
        del merged
        free_memory()
        sizes = {"bytes": built.bytes, "adapted_weights": built.adapted, "changed_weights": built.changed}
        return {"name": name, **self.figures(found, reference), **sizes}

    def reload(self, kept: Path, first: dict[str, Any], *, heldout: Path, reference: ReferenceLogits) -> dict[str, Any]:
        from finetune.inference.fresh_process import FreshProcessError, run_in_fresh_process
        from finetune.inference.kl_divergence import KLResult
        from finetune.inference.losses import RowLoss

        request = {
            "folder": kept.resolve(), "dtype": self.config.dtype, "attention": self.spec.placement.attention, "device": self.spec.placement.device,
            "threads": self.spec.placement.threads, "remote_code": self.spec.config.remote_code, "heldout": heldout.resolve(),
            "rows": len(self.rows), "batch_tokens": self.config.batch_tokens,
            "reference": dataclasses.replace(reference, file=reference.file.resolve(), losses=()),
        }  # fmt: skip
        try:
            got = run_in_fresh_process("finetune.merge.reload", request, work=self.work)
        except FreshProcessError as error:
            raise MergeError(f"the merged model in {kept} cannot be opened by a fresh process: {error}") from error
        again = self.figures(KLResult(**{**got, "losses": [RowLoss(**row) for row in got["losses"]]}), reference)
        furthest = max(abs(again["loss"] - first["loss"]), abs(again["kl"] - first["kl"]))
        if furthest > self.config.max_reload_difference:
            raise MergeError(
                f"{kept} measures differently in a fresh process: loss {again['loss']:.5f} after {first['loss']:.5f}, KL {again['kl']:.5f} "
                f"after {first['kl']:.5f}; the bound merge.max_reload_difference is {self.config.max_reload_difference}"
            )
        log(
            "merge",
            f"opened again by plain transformers in a fresh process: loss {again['loss']:.4f}, KL {again['kl']:.5f}, as before",
        )
        return again
