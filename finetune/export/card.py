"""The model card: what it is, what it was made from, how good it is, and how to load it, in Markdown."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.console import change_text, human_bytes
from finetune.export.config import ExportConfig
from finetune.export.context import Work
from finetune.hardware.backends import BACKENDS
from finetune.inference.artifacts import (
    collect_artifacts,
    describe_answer_changes,
    describe_rows,
    metric_names,
    table_cells,
    table_headers,
)
from finetune.model import Base
from finetune.products import MergedModel, PreparedData, Scores, TrainedAdapter
from finetune.quantization import QuantizationConfig, spec

CARD = "README.md"

WORDS = {
    "quantization": "cost of quantization", "tuning": "gain of tuning", "merge": "cost of the merge", "total": "base to merged",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """All that a card is written from."""

    base: Base
    quantization: QuantizationConfig
    data: PreparedData
    adapter: TrainedAdapter
    merged: MergedModel
    scores: Scores
    exports: Sequence[Mapping[str, Any]]
    snippets: Mapping[str, str]


def write(work: Work, name: str, settings: ExportConfig) -> dict[str, Any]:
    """Writes the card beside the exports and into each of them."""
    facts = CardFacts(
        base=work.spec.base, quantization=work.spec.quantization, data=work.data, adapter=work.adapter, merged=work.merged, scores=work.scores,
        exports=work.exports, snippets=work.snippets,
    )  # fmt: skip
    text = write_card(facts)
    target = work.folder / CARD
    for file in [target, *[work.folder / Path(one["path"]).name / CARD for one in work.exports]]:
        file.write_text(text, encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {
        "format": settings.format,
        "path": f"export/{CARD}",
        "bytes": target.stat().st_size,
        "sha256": digest,
        "parity": {},
    }


def write_card(facts: CardFacts) -> str:
    """The card as Markdown, with the front matter that model hubs read."""
    name = short_name(facts.base)
    sections = [
        "\n".join(_front_matter(facts)),
        f"# {name}, tuned",
        f"A LoRA adapter for `{facts.base.name}`, trained on a frozen {_quantized(facts.quantization)} base, "
        "and the model that the two merge into.",
        "\n".join(_made_from(facts)),
        "\n".join(_quality(facts)),
        "\n".join(_merge(facts.merged)),
        "\n".join(_files(facts.exports)),
        "\n".join(_loading(facts.snippets)),
        "\n".join(_licence(facts.base)),
    ]
    return "\n\n".join(sections) + "\n"


def short_name(base: Base) -> str:
    return Path(base.name.removeprefix("package:")).name.removesuffix(".gguf")


def _quantized(config: QuantizationConfig) -> str:
    return BACKENDS[config.method].title + (" (double quantization)" if config.double else "")


def _front_matter(facts: CardFacts) -> Iterator[str]:
    yield "---"
    if facts.base.source == "hub":
        yield f"base_model: {facts.base.name}"
    licence = licence_of(facts.base.folder)
    if licence:
        yield f"license: {licence}"
    yield from ("library_name: peft", "pipeline_tag: text-generation", "tags: [lora, qlora, finetune]", "---")


def _made_from(facts: CardFacts) -> Iterator[str]:
    base, data, adapter = facts.base, facts.data, facts.adapter
    yield "## Made from\n"
    yield (
        f"- Base: `{base.name}`"
        + (f" at revision `{base.revision}`" if base.revision else "")
        + f", weights SHA-256 `{base.sha256}`"
    )
    if base.source == "gguf":
        yield "- The base was a GGUF file; its blocks were turned into dense weights, so it is full precision only by convention"
    settings = ", ".join(f"{key} {value}" for key, value in spec(facts.quantization).items())
    yield f"- Quantization while training: {settings}"
    learnt = f"{data.tokens:,} tokens of which {data.trained_tokens:,} are learnt"
    read = ", ".join(f"`{source}`" for source in data.sources)
    yield f"- Data: {read}: {data.train_rows:,} rows trained on, {data.heldout_rows:,} held out; {learnt}; fingerprint `{data.fingerprint}`"
    sizes = f"{adapter.trained_tokens:,} trained tokens, {adapter.trainable_parameters:,} trainable parameters"
    yield f"- Training: {adapter.steps:,} steps with {adapter.optimizer['used']}, {sizes}"


def _quality(facts: CardFacts) -> Iterator[str]:
    scores, merged = facts.scores, facts.merged
    lines = collect_artifacts(
        {"artifacts": scores.artifacts, "changes": scores.changes, "rows": scores.rows, "loss_rows": scores.loss_rows},
        {"candidates": merged.candidates, "chosen": merged.chosen, "loss_rows": merged.loss_rows},
        facts.exports,
    )
    names = metric_names(lines)
    yield "## How good it is\n"
    yield describe_rows(lines) + "\n"
    yield from _table(table_headers(lines, str), [table_cells(line, names) for line in lines])
    for text in describe_answer_changes(lines, str):
        yield f"\n{text}"
    figures = [*names, *(["general_loss"] if "general_loss" in scores.changes["total"] else [])]
    if figures:
        yield "\nWhat each step changed in the answers, and in the loss on general text (`general_loss`), paired by row:\n"
        rows = [
            [WORDS[name], *[change_text(one[figure], digits=3) for figure in figures]]
            for name, one in scores.changes.items()
        ]
        yield from _table(["Step", *figures], rows)


def _merge(merged: MergedModel) -> Iterator[str]:
    yield "## Merge\n"
    tokens = f"{merged.candidates[0]['compared_tokens']:,} held-out tokens"
    yield f"Kept: `{merged.chosen}`, {merged.rule}. KL and top-1 compare with the graph that was trained, on {tokens}.\n"
    rows = [[one["name"], f"{one['kl']:.5f}", f"{one['top1_agreement']:.3f}"] for one in merged.candidates]
    yield from _table(["Candidate", "KL", "Top-1"], rows)


def _files(exports: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "## Files\n"
    rows = []
    for one in exports:
        parity = one["parity"]
        proof = (
            f"logits within {parity['max_logit_difference']:.4g}, KL {parity['kl']:.2g}, in {parity['runtime']}"
            if parity
            else ""
        )
        rows.append(
            [f"`{Path(one['path']).name}`", one["format"], human_bytes(one["bytes"]), f"`{one['sha256'][:16]}`", proof]
        )
    yield from _table(["Path", "Format", "Size", "SHA-256", "Opened again and compared"], rows)
    notes = [f"- `{Path(one['path']).name}`: {note}" for one in exports for note in one.get("notes", [])]
    yield from ["", *notes] if notes else []


def _loading(snippets: Mapping[str, str]) -> Iterator[str]:
    yield "## How to load\n"
    yield "Paths are seen from the folder that holds the files above."
    for title, code in snippets.items():
        yield f"\n### {title}\n\n```python\n{code}\n```"


def _licence(base: Base) -> Iterator[str]:
    licence = licence_of(base.folder)
    yield "## Licence\n"
    if licence:
        yield f"The base states `{licence}`, and weights derived from it are bound by that. The data may add terms of their own."
    else:
        yield f"The files of the base state no licence; look where `{base.name}` was published. The data may add terms of their own."


def licence_of(folder: Path) -> str | None:
    """The licence in the front matter of the base's own card, if it has one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    found = re.search(r"\A---\n.*?^license:\s*(\S+)\s*$.*?^---$", card.read_text(encoding="utf-8"), flags=re.M | re.S)
    return found.group(1) if found else None


def _table(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'|'.join(['---'] * len(header))}|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
