"""Writes the model card in Markdown: base, data, training, evaluation, files, and how to load them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.console import human_bytes
from finetune.export.config import ExportConfig
from finetune.export.context import ExportContext
from finetune.hardware.backends import BACKENDS
from finetune.inference.artifacts import (
    collect_artifacts,
    describe_answer_changes,
    describe_conditions,
    describe_rows,
    metric_names,
    table_cells,
    table_headers,
)
from finetune.jsonable import to_jsonable
from finetune.model import Base
from finetune.products import ExportResult, MergedModel, PreparedData, Scores, TrainedAdapter
from finetune.quantization import QuantizationConfig, spec
from finetune.scores import Parity
from finetune.usage import Use, export_commands

CARD = "README.md"

OWN_TERMS = "The data may add terms of their own."

CHANGE_NAMES = {
    "quantization": "cost of quantization",
    "tuning": "gain of tuning",
    "merge": "cost of the merge",
    "total": "base to merged",
}


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Everything that a card is written from."""

    base: Base
    quantization: QuantizationConfig
    data: PreparedData
    adapter: TrainedAdapter
    merged: MergedModel
    scores: Scores
    exports: Sequence[ExportResult]
    snippets: Mapping[str, str]
    uses: Sequence[Use]


def write(context: ExportContext, name: str, settings: ExportConfig) -> ExportResult:
    """Writes the card next to the exports and into each of them."""
    facts = CardFacts(
        base=context.spec.base,
        quantization=context.spec.quantization,
        data=context.data,
        adapter=context.adapter,
        merged=context.merged,
        scores=context.scores,
        exports=context.exports,
        snippets=context.snippets,
        uses=export_commands(context.folder, [(export.format, Path(export.path).name) for export in context.exports]),
    )
    text = write_card(facts)
    target = context.folder / CARD
    for file in [target, *[context.folder / Path(export.path).name / CARD for export in context.exports]]:
        file.write_text(text, encoding="utf-8")
    size, digest = target.stat().st_size, hashlib.sha256(text.encode()).hexdigest()
    return ExportResult(format=settings.format, path=f"export/{CARD}", bytes=size, sha256=digest)


def write_card(facts: CardFacts) -> str:
    """Returns the card as Markdown, with the front matter that model hubs read."""
    name = short_name(facts.base)
    sections = [
        "\n".join(_front_matter(facts)),
        f"# {name}, tuned",
        f"A LoRA adapter for `{facts.base.public_name}`, trained on a frozen {_quantized(facts.quantization)} base, "
        "and the model that the two merge into.",
        "\n".join(_made_from(facts)),
        "\n".join(_quality(facts)),
        "\n".join(_merge(facts.merged)),
        "\n".join(_files(facts.exports)),
        "\n".join(_loading(facts.uses, facts.snippets)),
        "\n".join(_licence(facts.base)),
    ]
    return "\n\n".join(sections) + "\n"


def short_name(base: Base) -> str:
    """Returns the last part of the base's name."""
    return Path(base.public_name.removeprefix("package:")).name.removesuffix(".gguf")


def _quantized(config: QuantizationConfig) -> str:
    return BACKENDS[config.method].title + (" (double quantization)" if config.double else "")


def _front_matter(facts: CardFacts) -> Iterator[str]:
    yield "---"
    if facts.base.source == "hub":
        yield f"base_model: {facts.base.public_name}"
    licence = licence_of(facts.base.folder)
    if licence:
        yield f"license: {licence}"
    yield from ("library_name: peft", "pipeline_tag: text-generation", "tags: [lora, qlora, finetune]", "---")


def _made_from(facts: CardFacts) -> Iterator[str]:
    base, data, adapter = facts.base, facts.data, facts.adapter
    yield "## Made from\n"
    revision = f" at revision `{base.revision}`" if base.revision else ""
    yield f"- Base: `{base.public_name}`{revision}, weights SHA-256 `{base.sha256}`"
    if base.source == "gguf":
        yield (
            "- The base was a GGUF file; its blocks were dequantized to dense weights, so it is full precision only by "
            "convention"
        )
    settings = ", ".join(f"{key} {value}" for key, value in spec(facts.quantization).items())
    yield f"- Quantization while training: {settings}"
    files = ", ".join(f"`{source}`" for source in data.sources)
    rows = f"{data.train_rows:,} rows trained on, {data.heldout_rows:,} held out"
    tokens = f"{data.tokens:,} tokens of which {data.trained_tokens:,} are trained on"
    yield f"- Data: {files}: {rows}; {tokens}; fingerprint `{data.fingerprint}`"
    sizes = f"{adapter.trained_tokens:,} trained tokens, {adapter.trainable_parameters:,} trainable parameters"
    yield f"- Training: {adapter.steps:,} steps with {adapter.optimizer['used']}, {sizes}"


def _quality(facts: CardFacts) -> Iterator[str]:
    scores = facts.scores
    lines = collect_artifacts(to_jsonable(scores), to_jsonable(facts.merged), to_jsonable(facts.exports))
    names = metric_names(lines)
    yield "## How good it is\n"
    yield describe_rows(lines) + "\n"
    yield from _table(table_headers(lines, str), [table_cells(line, names) for line in lines])
    for text in describe_answer_changes(lines, str):
        yield f"\n{text}"
    for text in describe_conditions(to_jsonable(scores), to_jsonable(facts.merged)):
        yield f"\n{text}"
    figures = [*names, *(["general_loss"] if "general_loss" in scores.changes["merge"] else [])]
    if figures:
        yield "\nChange by step of the answers, and of the loss on general text (`general_loss`), paired by row:\n"
        rows = []
        for step, changes in scores.changes.items():
            rows.append([CHANGE_NAMES[step], *[changes[figure].text(digits=3) for figure in figures]])
        yield from _table(["Step", *figures], rows)


def _merge(merged: MergedModel) -> Iterator[str]:
    yield "## Merge\n"
    tokens = f"{merged.candidates[0].compared_tokens:,} held-out tokens"
    yield f"Kept: `{merged.chosen}`, {merged.rule}. KL and top-1 compare with the trained model, on {tokens}.\n"
    rows = [[entry.name, f"{entry.kl:.5f}", f"{entry.top1_agreement:.3f}"] for entry in merged.candidates]
    yield from _table(["Candidate", "KL", "Top-1"], rows)


def _files(exports: Sequence[ExportResult]) -> Iterator[str]:
    yield "## Files\n"
    rows = []
    for export in exports:
        path, digest = Path(export.path).name, export.sha256[:16]
        size, check = human_bytes(export.bytes), _check_text(export.parity)
        rows.append([f"`{path}`", export.format, size, f"`{digest}`", check])
    yield from _table(["Path", "Format", "Size", "SHA-256", "Opened again and compared"], rows)
    notes = [f"- `{Path(export.path).name}`: {note}" for export in exports for note in export.notes or []]
    yield from ["", *notes] if notes else []


def _check_text(parity: Parity | None) -> str:
    if parity is None:
        return ""
    return f"logits within {parity.max_logit_difference:.4g}, KL {parity.kl:.2g}, in {parity.runtime}"


def _loading(uses: Sequence[Use], snippets: Mapping[str, str]) -> Iterator[str]:
    yield "## How to load\n"
    yield "Paths are relative to the folder that holds the files above."
    if uses:
        commands = "\n".join(f"{use.command}  # {use.title}" for use in uses)
        yield f"\n```sh\n{commands}\n```"
    for title, code in snippets.items():
        yield f"\n### {title}\n\n```python\n{code}\n```"


def _licence(base: Base) -> Iterator[str]:
    licence = licence_of(base.folder)
    yield "## Licence\n"
    if licence:
        yield f"The base states `{licence}`, and weights derived from it are bound by that. {OWN_TERMS}"
    else:
        yield f"The files of the base state no licence; look where `{base.public_name}` was published. {OWN_TERMS}"


def licence_of(folder: Path) -> str | None:
    """Returns the licence in the front matter of the base's own card, if it has one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    text, pattern = card.read_text(encoding="utf-8"), r"\A---\n.*?^license:\s*(\S+)\s*$.*?^---$"
    match = re.search(pattern, text, flags=re.M | re.S)
    return match.group(1) if match else None


def _table(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'|'.join(['---'] * len(header))}|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
