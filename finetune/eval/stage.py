"""Runs the eval stage: measures four artifacts on the same rows, one model in memory at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.console import log, table
from finetune.errors import EvalError
from finetune.eval.config import ARTIFACTS, EvalConfig
from finetune.eval.harness import Harness, show_harness
from finetune.files import atomic_write_text
from finetune.inference.budget import LONGEST_READ_SECONDS, WeightPlacement, Workload
from finetune.model import ModelSpec
from finetune.products import MergedModel, PreparedData, Scores, TrainedAdapter
from finetune.scores import ArtifactScores, Difference

if TYPE_CHECKING:
    from finetune.eval.figures import Table
    from finetune.eval.records import Record
    from finetune.inference.chat import Chat
    from finetune.inference.rows import Row


def evaluate(
    config: EvalConfig,
    *,
    folder: Path,
    spec: ModelSpec,
    adapter: TrainedAdapter,
    merged: MergedModel,
    data: PreparedData,
    seed: int,
) -> Scores:
    """Measures base, quantized base, adapter and merged model on the same held-out rows.

    Args:
        config: The eval group.
        folder: The stage's folder.
        spec: The base as it was loaded for training.
        adapter: The trained adapter.
        merged: The merged model, in ``merged.folder/model``.
        data: Its held-out rows are in ``data.folder/heldout``.
        seed: Seeds the bootstrap.

    Raises:
        EvalError: There is no held-out row, none with a trained token, one without a column that a metric needs, or no
            general text.
    """
    from finetune.eval.figures import changes, levels, missed_gates, tabulate
    from finetune.eval.general import general_rows
    from finetune.eval.metrics import prepare_rows
    from finetune.inference.chat import load_chat
    from finetune.inference.oom import halve_batches
    from finetune.inference.rows import read_rows, trained_tokens

    heldout = read_rows(data.folder / "heldout", limit=max(config.rows, config.loss_rows))
    loss_rows, rows = heldout[: config.loss_rows], heldout[: config.rows]
    if not any(trained_tokens(row) for row in loss_rows):
        raise EvalError(
            f"none of the first {len(loss_rows)} held-out rows has a trained token; look at the ledger in {data.folder}"
        )
    for key, wanted, available in (("rows", config.rows, len(rows)), ("loss_rows", config.loss_rows, len(loss_rows))):
        if available < wanted:
            log("eval", f"eval.{key}={wanted}, and the held-out split has {available} rows: all of them are used")
    prepare_rows(rows, config.metrics, data.folder / "heldout")
    chat = load_chat(spec, data.folder)
    tokenizer = chat.tokenizer
    models = _Models(spec, adapter=adapter.adapter, merged=merged.folder / "model")
    longest = min(config.batch_tokens, tokenizer.model_max_length)
    general = general_rows(Path(config.general_text), tokenizer, longest=longest) if config.general_text else []
    tasks = Harness(config.harness, samples=config.bootstrap_samples, seed=seed) if config.harness.tasks else None
    measurement = _Measurement(
        config=config, folder=folder, chat=chat, loss_rows=loss_rows, general=general, rows=rows, tasks=tasks
    )
    with halve_batches("eval") as halvings:
        records, left_out = measurement.measure_all(models)
    figures = tabulate(records, rows=rows, metrics=config.metrics, decode=lambda ids: _text(tokenizer, ids))
    artifacts, changed = levels(figures, records, config=config, seed=seed), changes(figures, config=config, seed=seed)
    _write_samples(folder / "samples.jsonl", rows=rows, table=figures, tokenizer=tokenizer, metrics=config.metrics)
    _print_tables(artifacts, changed, config.metrics if rows else [])
    show_harness({name: record.harness for name, record in records.items() if record.harness})
    missed = missed_gates(config.gate, artifacts, changed)
    log("eval", *missed)
    return Scores(
        folder=folder,
        artifacts=artifacts,
        changes=changed,
        rows=len(rows),
        loss_rows=len(loss_rows),
        missed=missed,
        left_out=left_out,
        compute_dtypes={name: models.spec_of(name).placement.dtype for name in records},
        halvings=halvings.count,
    )


@dataclass(frozen=True)
class _Models:
    """Loads the artifacts by name."""

    spec: ModelSpec
    adapter: Path
    merged: Path

    def spec_of(self, name: str) -> ModelSpec:
        """Returns how the artifact is loaded, without its adapter."""
        if name in ("adapter", "base_quantized"):
            return self.spec
        return self.spec.dense(self.merged) if name == "merged" else self.spec.as_stored()

    def place(self, name: str, workload: Workload) -> WeightPlacement:
        """Decides where the artifact's weights lie, by the memory that is free now."""
        from finetune.inference.dense import place

        return place(self.spec_of(name), workload)

    def load(self, name: str, placed: WeightPlacement, *, scratch: Path) -> Any:
        from finetune.inference.adapted import load_adapted_model
        from finetune.inference.dense import load_placed

        if name == "adapter":
            return load_adapted_model(self.spec, self.adapter, max_memory=placed.max_memory)
        return load_placed(self.spec_of(name), placed, title="eval", name=name, scratch=scratch)

    def key(self, name: str) -> str:
        """Identifies the artifact's content: earlier results are reused only with the same key."""
        from finetune.model.base import weights_sha256

        weights = {"adapter": self.adapter, "merged": self.merged}
        parts = [name, self.spec.key(), weights_sha256(weights[name]) if name in weights else None]
        return json.dumps(parts)


@dataclass(frozen=True, kw_only=True)
class _Measurement:
    """Rows and settings that are the same for every artifact."""

    config: EvalConfig
    folder: Path
    chat: Chat
    loss_rows: list[dict[str, Any]]
    general: list[Row]
    rows: list[dict[str, Any]]
    tasks: Harness | None

    def measure_all(self, models: _Models) -> tuple[dict[str, Record], dict[str, str]]:
        """Measures one artifact after another.

        Returns:
            The results by artifact, and why others were left out.
        """
        measured = self.config.measured
        left_out = {name: "eval.artifacts does not name it" for name in ARTIFACTS if name not in measured}
        records: dict[str, Record] = {}
        for name in measured:
            only_base = models.spec.is_prequantized or not models.spec.is_quantized
            if name == "base_quantized" and only_base and "base" in records:
                method = models.spec.quantization.method
                log("eval", f"base_quantized is the base itself (quantization.method={method}); not measured twice")
                records[name] = records["base"]
                continue
            record, reason = self.measure(name, models)
            if record is None:
                log("eval", f"{name} is not measured: {reason}")
                left_out[name] = reason
            else:
                records[name] = record
        return records, left_out

    def measure(self, name: str, models: _Models) -> tuple[Record | None, str]:
        """Measures one artifact, and reuses the results of an interrupted stage.

        Returns:
            The results; or None, and why it is not worth it.
        """
        from finetune.eval.records import RecordFile
        from finetune.inference.adapted import free_memory
        from finetune.inference.dense import describe
        from finetune.inference.generation import stream_answers
        from finetune.inference.losses import row_losses

        results = RecordFile(self.folder / f"{name}.rows.jsonl", key=self._key(models.key(name)))
        unanswered = [number for number in range(len(self.rows)) if number not in results.record.answers]
        needs_tasks = self.tasks is not None and results.record.harness is None
        measured = results.record.losses and len(results.record.general) == len(self.general)
        if measured and not unanswered and not needs_tasks:
            log("eval", f"{name}: reusing earlier results")
            return results.record, ""
        placed = models.place(name, self.workload(unanswered))
        if name == "base" and self.config.may_leave_out_base and placed.read_seconds > LONGEST_READ_SECONDS:
            minutes = f"about {placed.read_seconds / 60:.0f} minutes in all"
            return None, f"{describe(placed)}, {minutes}; name it in eval.artifacts to measure it all the same"
        scratch = self.folder / ".offloaded"
        model, tokenizer = models.load(name, placed, scratch=scratch), self.chat.tokenizer
        batch_tokens = self.config.batch_tokens
        if not results.record.losses:
            losses = row_losses(model, self.loss_rows, batch_tokens=batch_tokens, progress=f"{name}: loss")
            results.add_losses(losses)
        if self.general and not results.record.general:
            losses = row_losses(model, self.general, batch_tokens=batch_tokens, progress=f"{name}: general text")
            results.add_general(losses)
        for index, answer in stream_answers(
            model,
            tokenizer,
            [self.rows[number]["prompt_ids"] for number in unanswered],
            max_new_tokens=self.config.max_new_tokens,
            batch_rows=self.config.fixed_rows,
            ends=self.chat.ends,
            progress=f"{name}: answers" if unanswered else None,
        ):
            results.add_answer(unanswered[index], answer)
        if self.tasks is not None and needs_tasks:
            results.add_harness(self.tasks.measure(model, tokenizer))
        del model
        free_memory()
        shutil.rmtree(scratch, ignore_errors=True)
        return results.record, ""

    def workload(self, unanswered: Sequence[int]) -> Workload:
        """Returns what an artifact will be asked."""
        from finetune.inference.rows import loss_workload

        losses = loss_workload([*self.loss_rows, *self.general], batch_tokens=self.config.batch_tokens)
        prompts = [len(self.rows[number]["prompt_ids"]) for number in unanswered]
        return dataclasses.replace(
            losses,
            rows=len(prompts),
            prompt_tokens=max(prompts, default=0),
            new_tokens=self.config.max_new_tokens,
            batch_rows=self.config.fixed_rows,
        )

    def _key(self, artifact: str) -> str:
        digest = hashlib.sha256(artifact.encode())
        for row in [*self.loss_rows, *self.general]:
            digest.update(json.dumps([row["input_ids"], row["labels"]]).encode())
        for row in self.rows:
            digest.update(json.dumps(row["prompt_ids"]).encode())
        digest.update(json.dumps([self.config.max_new_tokens, self.chat.ends, len(self.general)]).encode())
        digest.update(json.dumps(self.tasks.key if self.tasks else None).encode())
        return digest.hexdigest()


def _text(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


def _write_samples(file: Path, *, rows: list[dict[str, Any]], table: Table, tokenizer: Any, metrics: list[str]) -> None:
    samples = (
        {
            "row": int(row["row"]),
            "prompt": tokenizer.decode(row["prompt_ids"], skip_special_tokens=False),
            "reference": row["reference"],
            **{name: texts[number] for name, texts in table.texts.items()},
            "scores": {name: dict(_row_scores(table, name, metrics, number)) for name in table.texts},
        }
        for number, row in enumerate(rows)
    )
    atomic_write_text(file, (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))


def _row_scores(table: Table, name: str, metrics: list[str], number: int) -> Iterator[tuple[str, float]]:
    for metric in metrics:
        yield metric, float(table.answers[name][metric].totals[number])


def _print_tables(
    artifacts: dict[str, ArtifactScores], changed: dict[str, dict[str, Difference]], metrics: list[str]
) -> None:
    general = ["general_loss"] if artifacts["merged"].general_loss else []
    rows = []
    for name, figures in artifacts.items():
        forgotten = [figures.general_loss.text()] if figures.general_loss else []
        levels = [*forgotten, *[figures.metrics[metric].text() for metric in metrics]]
        stops = [f"{figures.stop_rate:.2f}"] if metrics else []
        rows.append([name, f"{figures.loss:.4f}", f"{figures.perplexity:.2f}", *levels, *stops])
    table("eval", ["artifact", "loss", "perplexity", *general, *metrics, *(["stops"] if metrics else [])], rows)
    differences = []
    for name, changes in changed.items():
        shown = [changes[figure] for figure in ["loss", *general, *metrics]]
        differences.append([name, *[change.text(digits=3) for change in shown]])
    table("eval", ["change", "loss", *general, *metrics], differences)
