"""The inputs of every export, and how an export is checked and published."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finetune.console import human_bytes
from finetune.errors import ExportError
from finetune.export.config import ExportConfig
from finetune.files import require_disk
from finetune.model import ModelSpec
from finetune.model.spec import checkpoint_dtype
from finetune.products import ExportResult, MergedModel, PreparedData, Scores, TrainedAdapter

if TYPE_CHECKING:
    from finetune.export.parity import Expected
    from finetune.inference.budget import Workload
    from finetune.inference.chat import Chat
    from finetune.inference.generation import Answer
    from finetune.inference.losses import RowLoss
    from finetune.scores import ExportAnswers, Parity

COMPARED_WITH = {"adapter": "adapter", "gguf_lora": "adapter"}
"""The artifact that an export's answers are compared with, by format; the merged model otherwise."""


class AnswerSettings(Protocol):
    """Settings of the evaluation."""

    max_new_tokens: int
    batch_tokens: int

    @property
    def fixed_rows(self) -> int | None: ...


class Scorer(Protocol):
    """The evaluation's results and rules; a protocol, since no stage imports another."""

    @property
    def config(self) -> AnswerSettings: ...
    @property
    def seed(self) -> int: ...
    def losses(self, artifact: str, *, rows: int) -> list[RowLoss]: ...
    def score_against(
        self, artifact: str, answers: Sequence[Answer], *, heldout: Path, tokenizer: Any, file: Path, seconds: float
    ) -> ExportAnswers: ...


@dataclass(kw_only=True)
class ExportContext:
    """The stage's inputs, and what earlier exports have added.

    Attributes:
        folder: The stage's folder; an export is published in it under its name.
        scratch: Where exports are written and checked before they are published.
        spec: The base as it was loaded for training.
        adapter, merged, scores, data: Products of the stages before.
        scorer: Knows the losses and answers of the evaluation, and scores answers.
        chat: Tokenizer and end tokens.
        exports: Descriptions of finished exports, for the card.
        snippets: Code that loads them, by title.
        merged_expectations: Results of `expected_merged_output`, by settings.
        halvings: How often other processes halved their batches.
    """

    folder: Path
    scratch: Path
    spec: ModelSpec
    adapter: TrainedAdapter
    merged: MergedModel
    scores: Scores
    data: PreparedData
    scorer: Scorer
    chat: Chat
    exports: list[ExportResult] = field(default_factory=list)
    snippets: dict[str, str] = field(default_factory=dict)
    merged_expectations: dict[tuple[int, int, int], Expected] = field(default_factory=dict)
    halvings: int = 0

    @property
    def merged_dtype(self) -> str:
        """Returns the dtype of the merged model."""
        return checkpoint_dtype(self.merged.folder / "model")

    @property
    def merged_bytes(self) -> int:
        """Returns the size of the merged model's weights."""
        return sum(file.stat().st_size for file in (self.merged.folder / "model").glob("*.safetensors"))

    def require_disk(self, name: str, size: float) -> None:
        """Checks the free disk before anything is written.

        Raises:
            ExportError: Less than ``size`` bytes are free.
        """
        require_disk(self.scratch, size, f"export.{name}", error=ExportError)

    def expected_output(self, model: Any, settings: ExportConfig, *, artifact: str | None = None) -> Expected:
        """Runs the model on the reference prompts and on the first held-out rows.

        Args:
            model: In this process.
            settings: The number of rows.
            artifact: Name of this model in the evaluation, whose losses are reused; None computes them.
        """
        from finetune.export.parity import expected
        from finetune.inference.losses import row_losses
        from finetune.inference.rows import read_rows

        rows = read_rows(self.data.folder / "heldout", limit=max(settings.logit_rows, settings.loss_rows))
        prompts = [row["prompt_ids"] for row in rows[: settings.logit_rows]]
        scored = [{key: row[key] for key in ("input_ids", "labels")} for row in rows[: settings.loss_rows]]
        if artifact and scored:
            losses = self.scorer.losses(artifact, rows=len(scored))
        else:
            losses = row_losses(model, scored, batch_tokens=self.scorer.config.batch_tokens)
        limit = settings.max_new_tokens
        return expected(model, self.chat, heldout=prompts, scored=scored, losses=losses, max_new_tokens=limit)

    def load(self, spec: ModelSpec, settings: ExportConfig, *, adapter: Path | None = None) -> Any:
        """Loads a model to compare with, offloaded where its weights do not fit.

        With an adapter on a dense base, whose layers peft replaces, host memory has to hold all of it instead.

        Raises:
            ExportError: Host memory is too small for that.
        """
        from finetune.inference.adapted import load_adapted_model
        from finetune.inference.dense import load_placed, place

        workload = self.workload(settings)
        placed = place(spec, workload)
        if adapter and placed.offloaded_bytes:
            spec = spec.on("cpu")
            placed = place(spec, workload)
            if placed.offloaded_bytes:
                raise ExportError(
                    f"export: comparing the adapter on the dense base takes {human_bytes(placed.offloaded_bytes)} more "
                    "memory than is free; leave out gguf_lora, and export the merged model as gguf"
                )
        scratch = self.scratch / "offloaded"
        if adapter:
            return load_adapted_model(spec, adapter, max_memory=placed.max_memory)
        return load_placed(spec, placed, title="export", name=spec.base.folder.name, scratch=scratch)

    def workload(self, settings: ExportConfig) -> Workload:
        """Returns what a model is asked in a comparison: its losses, its logits and one answer."""
        from finetune.inference.rows import loss_workload, read_rows

        rows = read_rows(self.data.folder / "heldout", limit=max(1, settings.logit_rows, settings.loss_rows))
        losses = loss_workload(rows[: settings.loss_rows], batch_tokens=self.scorer.config.batch_tokens)
        longest = max(len(row["prompt_ids"]) for row in rows)
        return dataclasses.replace(
            losses,
            pass_tokens=max(losses.pass_tokens, longest),
            passes=losses.passes + settings.logit_rows,
            rows=1,
            prompt_tokens=longest,
            new_tokens=settings.max_new_tokens,
            batch_rows=1,
        )

    def expected_merged_output(self, settings: ExportConfig) -> Expected:
        """Runs the merged model in the run's dtype, once for all exports with the same settings."""
        from finetune.inference.adapted import free_memory

        key = (settings.logit_rows, settings.loss_rows, settings.max_new_tokens)
        if key not in self.merged_expectations:
            merged = self.load(self.spec.dense(self.merged.folder / "model"), settings)
            self.merged_expectations[key] = self.expected_output(merged, settings, artifact="merged")
            del merged
            free_memory()
        return self.merged_expectations[key]

    def check(
        self,
        name: str,
        settings: ExportConfig,
        wanted: Expected,
        *,
        snippet: str,
        ends: list[int],
        packages: list[str],
        runtime: str = "finetune.export.runtime",
    ) -> Parity:
        """Runs the snippet in a fresh process and compares the export with its model.

        Args:
            name: Of the export, which is in ``scratch/name``.
            settings: Its bounds.
            wanted: Outputs of the model that it was made from.
            snippet: Code of the card that loads it, run in ``scratch``.
            ends: Tokens that end an answer, if the export does not contain them.
            packages: Packages that load it; their versions are recorded.
            runtime: Module that runs the snippet and queries the model that it loads.

        Raises:
            ExportError: It cannot be opened, or differs from its model.
        """
        from finetune.export.parity import compare
        from finetune.inference.fresh_process import FreshProcessError, run_in_fresh_process
        from finetune.inference.generation import Answer
        from finetune.inference.rows import read_rows

        heldout, limits, rows = self.data.folder / "heldout", self.scorer.config, min(settings.rows, self.scores.rows)
        prompts = [row["prompt_ids"] for row in read_rows(heldout, limit=rows)]
        code, logits = self.scratch / "snippet.py", self.scratch / "logits.npz"
        code.write_text(snippet + "\n", encoding="utf-8")
        request = {
            "folder": self.scratch.resolve(),
            "snippet": code.resolve(),
            "logits": logits.resolve(),
            "threads": self.spec.placement.threads,
            "dtype": wanted.dtype,
            "prompts": wanted.prompts,
            "rows": wanted.rows,
            "chats": wanted.chats,
            "ends": ends,
            "ending": wanted.ending,
            "max_new_tokens": settings.max_new_tokens,
            "packages": packages,
            "batch_tokens": limits.batch_tokens,
            "answers": {"prompts": prompts, "max_new_tokens": limits.max_new_tokens, "batch_rows": limits.fixed_rows},
            "dense": self._dense(name, settings, dtype=wanted.dtype),
        }
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.spec.placement.device == "cpu" else {}
        link = self.scratch / self.spec.base.folder.name  # the snippet names no folder of this machine
        if self.spec.base.source != "hub" and not link.exists():
            link.symlink_to(self.spec.base.folder.resolve())
        try:
            got = run_in_fresh_process(runtime, request, work=self.scratch, environment=hidden)
        except FreshProcessError as error:
            raise ExportError(f"export.{name} cannot be opened by {' and '.join(packages)}: {error}") from error
        finally:
            if link.is_symlink():
                link.unlink()
        self.halvings += got.get("halvings", 0)
        parity = compare(name, wanted, got, logits, config=settings, seed=self.scorer.seed)
        scores = None
        if prompts:
            answers = [Answer(tokens=answer["tokens"], stopped=answer["stopped"]) for answer in got["answers"]]
            artifact, file = COMPARED_WITH.get(settings.format, "merged"), self.folder / f"{name}.answers.jsonl"
            tokenizer, seconds = self.chat.tokenizer, got["answer_seconds"]
            scores = self.scorer.score_against(
                artifact, answers, heldout=heldout, tokenizer=tokenizer, file=file, seconds=seconds
            )
        return dataclasses.replace(parity, answers=scores)

    def _dense(self, name: str, settings: ExportConfig, *, dtype: str) -> dict[str, Any] | None:
        """Returns what decides where a dense model's weights lie; None for others: they are as small as in training,
        or no model of transformers."""
        if settings.format != "safetensors":
            return None
        spec = self.spec.dense((self.scratch / name).resolve(), dtype=dtype)
        scratch = (self.scratch / "offloaded").resolve()
        return {"spec": spec, "workload": self.workload(settings), "scratch": scratch}

    def publish(
        self, name: str, settings: ExportConfig, parity: Parity, *, notes: list[str] | None = None
    ) -> ExportResult:
        """Moves a finished export into the stage's folder and returns its description."""
        from finetune.export.manifest import folder_sha256

        written, place = self.scratch / name, self.folder / name
        if place.exists():
            shutil.rmtree(place)
        os.replace(written, place)
        size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        return ExportResult(
            format=settings.format,
            path=f"export/{name}",
            bytes=size,
            sha256=folder_sha256(place),
            parity=parity,
            notes=notes,
        )
