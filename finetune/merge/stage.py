"""The merge stage: records the trained model, builds and measures candidates, and measures the selected one again."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.console import log, table
from finetune.errors import MergeError
from finetune.files import require_disk
from finetune.jsonable import from_json
from finetune.merge.config import MergeConfig
from finetune.merge.select import select_candidate, table_rows
from finetune.model import ModelSpec
from finetune.products import MergedModel, PreparedData, TrainedAdapter
from finetune.scores import CandidateScores, ComparedScores, LossScores

if TYPE_CHECKING:
    from finetune.inference.kl_divergence import KLResult, ReferenceLogits
    from finetune.inference.losses import RowLoss
    from finetune.merge.adapter_deltas import Change
    from finetune.merge.candidates import MergeCandidate


def merge(
    config: MergeConfig, *, folder: Path, spec: ModelSpec, adapter: TrainedAdapter, data: PreparedData, seed: int
) -> MergedModel:
    """Builds the candidates, compares each with the trained model, selects one and measures it again from disk.

    Args:
        config: The merge group.
        folder: The stage's folder.
        spec: The base as it was loaded for training.
        adapter: The trained adapter.
        data: Its held-out rows are in ``data.folder/heldout``.
        seed: Of the intervals.

    Raises:
        MergeError: The adapter cannot be merged or changes nothing, no candidate is good enough, the disk is too small,
            or the written model measures differently when it is loaded again.
    """
    from finetune.inference.chat import load_chat
    from finetune.inference.oom import halve_batches
    from finetune.inference.rows import read_rows, trained_tokens
    from finetune.merge.adapter_deltas import add_changes, read_changes
    from finetune.merge.candidates import write_chat
    from finetune.model.base import weights_sha256

    names = _candidate_names(config, spec)
    rows = read_rows(data.folder / "heldout", limit=config.loss_rows)
    if not any(map(trained_tokens, rows)):
        raise MergeError(
            f"none of the first {len(rows)} held-out rows has a trained token, so merges cannot be compared; check the "
            "ledger in the data folder"
        )
    work = folder / ".candidates"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    _require_disk(spec, folder, candidates=len(names), tokens=config.measure_tokens)
    stage = _Stage(config=config, spec=spec, work=work, rows=rows, seed=seed)
    changes = read_changes(adapter.adapter)
    for further, weight in config.adapters.items():
        changes = add_changes(changes, Path(further).expanduser(), weight=weight)
    with halve_batches("merge") as halvings:
        reference, built = stage.build(adapter.adapter, changes, names=names)
        trained = stage.losses(reference.losses)
        candidates = [stage.measure(candidate, reference) for candidate in built]
    table(
        "merge",
        ["candidate", "KL", "top-1", "loss", "change of loss", "perplexity", "size"],
        table_rows(candidates, trained=trained),
    )
    chosen, rule = select_candidate(candidates, config=config, trained_loss=reference.loss)
    log("merge", f"{chosen.name} is selected: {rule}")
    selected, model = work / chosen.name, folder / "model"
    write_chat(selected, load_chat(spec, data.folder))
    reloaded, halved = stage.reload(selected, chosen, heldout=data.folder / "heldout", reference=reference)
    _publish(selected, model)
    shutil.rmtree(work)
    return MergedModel(
        folder=folder,
        chosen=chosen.name,
        rule=rule,
        loss_rows=len(rows),
        reference=trained,
        candidates=candidates,
        reloaded=reloaded,
        sha256=weights_sha256(model),
        adapters=dict(config.adapters),
        compute_dtype=spec.dense(model).placement.dtype,
        halvings=halvings.count + halved,
    )


def _candidate_names(config: MergeConfig, spec: ModelSpec) -> list[str]:
    if spec.is_prequantized:
        log("merge", "only the candidate dequantized: the base is stored quantized, so there is no original to add to")
        return ["dequantized"]
    if spec.is_rounded_with_adapter:
        log(
            "merge", "only the candidate original: the base is dense, and an export in 4 bits rounds the sum as trained"
        )
        return ["original"]
    if spec.is_quantized:
        return list(config.candidates)
    if config.choose == "dequantized":
        raise MergeError(
            "merge.choose=dequantized, but quantization.method=none, so there is nothing to dequantize; use "
            "merge.choose=original"
        )
    if config.candidates != ["original"]:
        log("merge", "only the candidate original: the base was not quantized, so dequantized would be the same")
    return ["original"]


def _require_disk(spec: ModelSpec, folder: Path, *, candidates: int, tokens: int) -> None:
    import torch

    from finetune.merge.prequantized import dense_bytes, packed_base

    base, packed = spec.base, packed_base(spec)
    weights = sum(file.stat().st_size for file in base.folder.glob("*.safetensors"))
    if packed:
        weights = dense_bytes(base.folder, packed, dtype=getattr(torch, spec.placement.dtype))
    vocabulary = json.loads((base.folder / "config.json").read_text()).get("vocab_size", 0)
    require_disk(
        folder,
        candidates * weights + 4 * tokens * vocabulary,
        "merging",
        remedy="free some space, name one candidate in merge.candidates, or lower merge.measure_tokens",
        error=MergeError,
    )


def _publish(built: Path, target: Path) -> None:
    """Moves the model to its final folder. A folder that exists there is from a stage that was killed."""
    if target.exists():
        os.replace(target, built.parent / "earlier")
    os.replace(built, target)


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """The inputs that every step of the stage needs."""

    config: MergeConfig
    spec: ModelSpec
    work: Path
    rows: list[dict[str, Any]]
    seed: int

    def build(
        self, adapter: Path, changes: dict[str, Change], *, names: list[str]
    ) -> tuple[ReferenceLogits, list[MergeCandidate]]:
        """Records the trained model, frees it, and writes the candidates, layer by layer from disk."""
        import torch

        from finetune.inference.adapted import free_memory, load_adapted_model
        from finetune.inference.dense import place
        from finetune.inference.kl_divergence import record_reference
        from finetune.inference.rows import loss_workload
        from finetune.merge.adapter_deltas import as_trained
        from finetune.merge.candidates import Source, build, from_disk
        from finetune.merge.graph import add_adapters, dequantized
        from finetune.merge.prequantized import packed_base

        placed = place(self.spec, loss_workload(self.rows, batch_tokens=self.config.batch_tokens))
        graph = load_adapted_model(self.spec, adapter, max_memory=placed.max_memory)
        if self.config.adapters:
            add_adapters(graph, self.config.adapters, base_sha256=self.spec.base.sha256)
            further = ", ".join(f"{name} x {weight:g}" for name, weight in self.config.adapters.items())
            log("merge", f"with the run's adapter: {further}")
        reference = record_reference(
            graph,
            self.rows,
            self.work / "reference.f32",
            batch_tokens=self.config.batch_tokens,
            tokens=self.config.measure_tokens,
            progress="trained model",
        )
        log(
            "merge",
            f"the trained model on {len(self.rows)} held-out rows: loss {reference.loss:.4f}; candidates are compared "
            f"with its distributions of {reference.positions:,} trained tokens",
        )
        sources: dict[str, Source] = {"original": from_disk}
        if "dequantized" in names:
            sources["dequantized"] = dequantized(self.spec, graph, work=self.work)
        del graph
        free_memory()
        built, base, dtype = [], self.spec.base.folder, getattr(torch, self.config.dtype)
        packed = packed_base(self.spec)
        changes = as_trained(changes, self.spec, dtype=dtype)
        for name in names:
            built.append(build(base, changes, self.work / name, dtype=dtype, source=sources[name], packed=packed))
            self._require_change(built[-1])
        return reference, built

    def _require_change(self, candidate: MergeCandidate) -> None:
        if candidate.changed == 0:
            raise MergeError(
                f"the adapter changes none of {candidate.adapted:,} weights once they are rounded to "
                f"{self.config.dtype}, so the merged model would be the base; train longer or with a higher learning "
                "rate, or use merge.dtype=float32"
            )

    def losses(self, rows: Sequence[RowLoss]) -> LossScores:
        from finetune.inference.bootstrap import RESAMPLES, Bootstrap, token_loss

        return Bootstrap(len(rows), samples=RESAMPLES, seed=self.seed).loss(token_loss(rows))

    def compared(self, result: KLResult, reference: ReferenceLogits) -> ComparedScores:
        from finetune.inference.bootstrap import RESAMPLES, Bootstrap, token_loss

        bootstrap = Bootstrap(len(self.rows), samples=RESAMPLES, seed=self.seed)
        return ComparedScores(
            **vars(self.losses(result.losses)),
            loss_difference=bootstrap.difference(token_loss(reference.losses), token_loss(result.losses)),
            kl=result.kl,
            top1_agreement=result.top1_agreement,
            max_difference=result.max_difference,
            compared_tokens=result.compared_tokens,
        )

    def measure(self, candidate: MergeCandidate, reference: ReferenceLogits) -> CandidateScores:
        from finetune.inference.adapted import free_memory
        from finetune.inference.dense import load_placed, place
        from finetune.inference.kl_divergence import compare_with_reference
        from finetune.inference.rows import loss_workload

        name, batch_tokens = candidate.folder.name, self.config.batch_tokens
        spec = self.spec.dense(candidate.folder)
        placed = place(spec, loss_workload(self.rows, batch_tokens=batch_tokens))
        model = load_placed(spec, placed, title="merge", name=name, scratch=self.work / "offloaded")
        result = compare_with_reference(model, self.rows, reference, batch_tokens=batch_tokens, progress=name)
        del model
        free_memory()
        return CandidateScores(
            name=name,
            **vars(self.compared(result, reference)),
            bytes=candidate.bytes,
            adapted_weights=candidate.adapted,
            changed_weights=candidate.changed,
        )

    def reload(
        self, selected: Path, before: CandidateScores, *, heldout: Path, reference: ReferenceLogits
    ) -> tuple[ComparedScores, int]:
        """Measures the selected candidate in a fresh process, and refuses it where the figures differ.

        Returns:
            Its scores, and how often batches were halved.
        """
        from finetune.inference.fresh_process import FreshProcessError, run_in_fresh_process
        from finetune.inference.kl_divergence import KLResult

        request = {
            "spec": self.spec.dense(selected.resolve()),
            "heldout": heldout.resolve(),
            "rows": len(self.rows),
            "batch_tokens": self.config.batch_tokens,
            "reference": dataclasses.replace(reference, file=reference.file.resolve(), losses=()),
            "scratch": (self.work / "offloaded").resolve(),
        }
        try:
            answer = run_in_fresh_process("finetune.merge.reload", request, work=self.work)
        except FreshProcessError as error:
            raise MergeError(f"the merged model in {selected} cannot be opened by a fresh process: {error}") from error
        after = self.compared(from_json(KLResult, answer["result"]), reference)
        if max(abs(after.loss - before.loss), abs(after.kl - before.kl)) > self.config.max_reload_difference:
            raise MergeError(
                f"{selected} measures differently in a fresh process: loss {after.loss:.5f} and before "
                f"{before.loss:.5f}, KL {after.kl:.5f} and before {before.kl:.5f}; the bound "
                f"merge.max_reload_difference is {self.config.max_reload_difference}"
            )
        figures = f"loss {after.loss:.4f}, KL {after.kl:.5f}"
        log("merge", f"loaded again by plain transformers in a fresh process: {figures}, as before")
        return after, int(answer["halvings"])
