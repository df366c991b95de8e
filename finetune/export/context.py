"""What every export's writer is given: the models that it is made from, and how it is checked and kept."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.console import human_bytes
from finetune.errors import ExportError
from finetune.export.config import ExportConfig
from finetune.export.facts import DataFacts, MergedFacts, Rules, ScoreFacts, TrainedFacts
from finetune.hardware import Placement
from finetune.model import Base, ModelConfig
from finetune.quantization import QuantizationConfig

if TYPE_CHECKING:
    from finetune.export.parity import Expected
    from finetune.inference.chat import Chat

ANSWERED_BESIDE = {"adapter": "adapter", "gguf_lora": "adapter"}
"""Whose answers an export's are held beside, by format; the merged model's otherwise."""


@dataclass(kw_only=True)
class Work:
    """The stage's inputs, and what the writers before have made.

    Attributes:
        folder: The stage's folder; an export is kept in it under its name.
        desk: Where exports are written and opened before they count.
        base, model, quantization, placement: As they were for training.
        adapter: Its plain peft folder is ``adapter.folder/adapter``.
        merged: Its plain transformers folder is ``merged.folder/model``.
        scores, data: Products of evaluation and data; held-out rows are in ``data.folder/heldout``.
        judge: Knows the losses and answers of the models before, and how answers are judged.
        seed: Of the bootstrap.
        chat: Tokenizer and end tokens.
        exports: Descriptions of what is done; a card describes them.
        snippets: Code that opens them, by title.
        merged_gives: What `expect_merged` found.
    """

    folder: Path
    desk: Path
    base: Base
    model: ModelConfig
    quantization: QuantizationConfig
    placement: Placement
    adapter: TrainedFacts
    merged: MergedFacts
    scores: ScoreFacts
    data: DataFacts
    judge: Rules
    seed: int
    chat: Chat
    exports: list[dict[str, Any]] = field(default_factory=list)
    snippets: dict[str, str] = field(default_factory=dict)
    merged_gives: dict[tuple[int, int, int], Expected] = field(default_factory=dict)

    @property
    def merged_dtype(self) -> str:
        settings: dict[str, Any] = json.loads((self.merged.folder / "model" / "config.json").read_text())
        return str(settings["dtype"])

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
        from finetune.inference.adapted import free
        from finetune.model import load

        asked = (settings.golden_rows, settings.loss_rows, settings.max_new_tokens)
        if asked not in self.merged_gives:
            dense = dataclasses.replace(self.quantization, method="none", double=False)
            placement = dataclasses.replace(self.placement, dtype=self.merged_dtype)
            base = dataclasses.replace(self.base, folder=self.merged.folder / "model")
            merged = load(base, self.model, quantization=dense, placement=placement)
            self.merged_gives[asked] = self.expect(merged, settings, artifact="merged")
            del merged
            free()
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
            "folder": self.desk.resolve(), "snippet": code.resolve(), "logits": logits.resolve(), "threads": self.placement.threads,
            "prompts": wanted.prompts, "rows": wanted.rows, "chats": wanted.chats, "ends": ends, "ending": wanted.ending,
            "max_new_tokens": settings.max_new_tokens, "packages": packages, "batch_tokens": limits.batch_tokens,
            "asked": {"prompts": asked, "max_new_tokens": limits.max_new_tokens, "batch_rows": limits.batch_rows},
        }  # fmt: skip
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.placement.device == "cpu" else {}
        try:
            got = run_in_fresh_process(runtime, request, work=self.desk, environment=hidden)
        except FreshProcessError as error:
            raise ExportError(f"export.{name} cannot be opened by {' and '.join(packages)}: {error}") from error
        parity = compare(name, wanted, got, logits, config=settings, seed=self.seed)
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
