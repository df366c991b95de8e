"""What every export's writer is given: the models that it is made from, and how it is checked and kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finetune.console import human_bytes
from finetune.errors import ExportError
from finetune.export.config import ExportConfig
from finetune.model import ModelSpec
from finetune.model.spec import checkpoint_dtype
from finetune.products import MergedModel, PreparedData, Scores, TrainedAdapter

if TYPE_CHECKING:
    from finetune.export.parity import Expected
    from finetune.inference.chat import Chat
    from finetune.inference.generation import Answer
    from finetune.inference.losses import RowLoss

ANSWERED_BESIDE = {"adapter": "adapter", "gguf_lora": "adapter"}
"""Whose answers an export's are held beside, by format; the merged model's otherwise."""


class AnswerSettings(Protocol):
    """How the evaluation measured."""

    max_new_tokens: int
    batch_rows: int
    batch_tokens: int


class Rules(Protocol):
    """What the evaluation measured, and how it scores answers; no stage imports another."""

    @property
    def config(self) -> AnswerSettings: ...
    @property
    def seed(self) -> int: ...
    def losses(self, artifact: str, *, rows: int) -> list[RowLoss]: ...
    def beside(
        self, artifact: str, answers: Sequence[Answer], *, heldout: Path, tokenizer: Any, file: Path
    ) -> dict[str, Any]: ...


@dataclass(kw_only=True)
class Work:
    """The stage's inputs, and what the writers before have made.

    Attributes:
        folder: The stage's folder; an export is kept in it under its name.
        desk: Where exports are written and opened before they count.
        spec: The base as it was loaded for training.
        adapter, merged, scores, data: Products of the stages before.
        judge: Knows the losses and answers that the evaluation measured, and how answers are scored.
        chat: Tokenizer and end tokens.
        exports: Descriptions of what is done; a card describes them.
        snippets: Code that opens them, by title.
        merged_gives: What `expect_merged` found.
    """

    folder: Path
    desk: Path
    spec: ModelSpec
    adapter: TrainedAdapter
    merged: MergedModel
    scores: Scores
    data: PreparedData
    judge: Rules
    chat: Chat
    exports: list[dict[str, Any]] = field(default_factory=list)
    snippets: dict[str, str] = field(default_factory=dict)
    merged_gives: dict[tuple[int, int, int], Expected] = field(default_factory=dict)

    @property
    def merged_dtype(self) -> str:
        """Returns the dtype of the merged model."""
        return checkpoint_dtype(self.merged.folder / "model")

    @property
    def merged_bytes(self) -> int:
        return sum(file.stat().st_size for file in (self.merged.folder / "model").glob("*.safetensors"))

    def need(self, name: str, size: float) -> None:
        """Refuses before anything is written where the disk cannot take it.

        Raises:
            ExportError: Less than ``size`` bytes are free.
        """
        free = shutil.disk_usage(self.desk).free
        if free < size:
            raise ExportError(
                f"export.{name} needs about {human_bytes(size)} of disk in {self.folder} and {human_bytes(free)} are free; free some, "
                "or choose another run.root"
            )

    def expect(self, model: Any, settings: ExportConfig, *, artifact: str | None = None) -> Expected:
        """What the model gives on the golden chats and on the first held-out rows.

        Args:
            model: In this process.
            settings: How many rows.
            artifact: What the evaluation calls this very model; its losses are known then and not taken again.
        """
        from finetune.export.parity import expected
        from finetune.inference.losses import row_losses
        from finetune.inference.rows import read_rows

        rows = read_rows(self.data.folder / "heldout", limit=max(settings.golden_rows, settings.loss_rows))
        prompts = [row["prompt_ids"] for row in rows[: settings.golden_rows]]
        scored = [{key: row[key] for key in ("input_ids", "labels")} for row in rows[: settings.loss_rows]]
        if artifact and scored:
            losses = self.judge.losses(artifact, rows=len(scored))
        else:
            losses = row_losses(model, scored, batch_tokens=self.judge.config.batch_tokens)
        return expected(
            model, self.chat, heldout=prompts, scored=scored, losses=losses, max_new_tokens=settings.max_new_tokens
        )

    def expect_merged(self, settings: ExportConfig) -> Expected:
        """What the merged model gives in its own numbers; asked once for all exports that ask for the same."""
        from finetune.inference.adapted import free_memory

        asked = (settings.golden_rows, settings.loss_rows, settings.max_new_tokens)
        if asked not in self.merged_gives:
            merged = self.spec.dense(self.merged.folder / "model").load()
            self.merged_gives[asked] = self.expect(merged, settings, artifact="merged")
            del merged
            free_memory()
        return self.merged_gives[asked]

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
    ) -> dict[str, Any]:
        """Runs the snippet in a fresh process, beside the export, and compares.

        Args:
            name: The export's; it lies in ``desk/name``.
            settings: Its bounds.
            wanted: From the model that it was made from.
            snippet: Code of the card that opens it, run in ``desk``.
            ends: Tokens that end an answer, where the export does not know them itself.
            packages: What opens it; their versions are recorded.
            runtime: Module that runs the snippet and asks the model that it made.

        Raises:
            ExportError: It cannot be opened, or differs from its model.
        """
        from finetune.export.parity import compare
        from finetune.inference.fresh_process import FreshProcessError, run_in_fresh_process
        from finetune.inference.generation import Answer
        from finetune.inference.rows import read_rows

        heldout, limits, rows = self.data.folder / "heldout", self.judge.config, min(settings.rows, self.scores.rows)
        asked = [row["prompt_ids"] for row in read_rows(heldout, limit=rows)]
        code, logits = self.desk / "snippet.py", self.desk / "logits.npz"
        code.write_text(snippet + "\n", encoding="utf-8")
        request = {
            "folder": self.desk.resolve(), "snippet": code.resolve(), "logits": logits.resolve(), "threads": self.spec.placement.threads,
            "prompts": wanted.prompts, "rows": wanted.rows, "chats": wanted.chats, "ends": ends, "ending": wanted.ending,
            "max_new_tokens": settings.max_new_tokens, "packages": packages, "batch_tokens": limits.batch_tokens,
            "asked": {"prompts": asked, "max_new_tokens": limits.max_new_tokens, "batch_rows": limits.batch_rows},
        }  # fmt: skip
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.spec.placement.device == "cpu" else {}
        try:
            got = run_in_fresh_process(runtime, request, work=self.desk, environment=hidden)
        except FreshProcessError as error:
            raise ExportError(f"export.{name} cannot be opened by {' and '.join(packages)}: {error}") from error
        parity = compare(name, wanted, got, logits, config=settings, seed=self.judge.seed)
        if asked:
            answers = [Answer(**one) for one in got["answers"]]
            place = {
                "heldout": heldout,
                "tokenizer": self.chat.tokenizer,
                "file": self.folder / f"{name}.answers.jsonl",
            }
            judged = self.judge.beside(ANSWERED_BESIDE.get(settings.format, "merged"), answers, **place)
            parity["answers"] = {**judged, "seconds": round(got["answer_seconds"], 1)}
        return parity

    def keep(self, name: str, settings: ExportConfig, parity: dict[str, Any]) -> dict[str, Any]:
        """Puts a finished export in its place and describes it."""
        from finetune.export.manifest import folder_sha256

        made, place = self.desk / name, self.folder / name
        if place.exists():
            shutil.rmtree(place)
        os.replace(made, place)
        size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        return {
            "format": settings.format,
            "path": f"export/{name}",
            "bytes": size,
            "sha256": folder_sha256(place),
            "parity": parity,
        }
