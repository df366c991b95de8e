"""``preview.html``: one page without network access, to read before training; ``examples.json`` for the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.config import DataConfig
from finetune.data.row_flags import redact
from finetune.data.show.documents import Document, SplitFile, decode_spans
from finetune.data.show.ledger_digest import LedgerDigest, digest_ledger
from finetune.html import Figure, Table, render
from finetune.html.format import percent
from finetune.html.lengths import length_picture
from finetune.products import PreparedData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELDOUT_SHOWN = 3
EXAMPLES = 2
"""Documents that the report of the run shows."""

LONGEST_SHOWN_CHARACTERS = 6000
SOURCES_NAMED = 3
Fields = dict[str, Any]
"""Values for the template."""


def write_preview(
    folder: Path, product: PreparedData, config: DataConfig, *, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Writes summary, warnings, lengths, some rows with the trained text marked, and some that were left out."""
    train = SplitFile(folder / "train").sample(config.preview_rows)
    heldout = SplitFile(folder / "heldout").sample(min(HELDOUT_SHOWN, config.preview_rows))
    lines = digest_ledger(folder, {document.row for document in [*train, *heldout]})
    rendering = json.loads((folder / "rendering.json").read_text(encoding="utf-8"))
    writer = _DocumentWriter(lines, tokenizer, end=rendering["end_of_turn_id"])
    shown = list(map(writer.write, train))
    (folder / "examples.json").write_text(json.dumps(shown[:EXAMPLES]), encoding="utf-8")
    page = render(
        "preview.html",
        title=_title(lines),
        tiles=_tiles(product),
        warnings=product.warnings,
        sources=_sources(lines),
        lengths=Figure(picture=length_picture(product.lengths["histogram"], limit=config.max_tokens)),
        thresholds=_thresholds(product, config),
        legend=_legend(train, rendering),
        train=shown,
        heldout=list(map(writer.write, heldout)),
        dropped=_dropped(product),
        examples=_examples(lines),
    )
    (folder / "preview.html").write_text(page, encoding="utf-8")


def _title(lines: LedgerDigest) -> str:
    names = list(lines.sources)
    more = f" and {len(names) - SOURCES_NAMED:,} more" if len(names) > SOURCES_NAMED else ""
    return f"{', '.join(names[:SOURCES_NAMED])}{more}"


def _tiles(product: PreparedData) -> list[tuple[str, str]]:
    rows = product.rows
    tiles = {
        "rows read": rows["in"],
        "rows to train on": product.train_rows,
        "rows held out": product.heldout_rows,
        "left out": rows["in"] - rows["kept"],
        "truncated": rows["truncated"],
        "tokens to train on": product.tokens,
    }
    shown = [(name, f"{value:,}") for name, value in tiles.items()]
    shown.append(("of them with loss", _share(product.trained_tokens, product.tokens)))
    if product.packed_rows < product.train_rows:
        shown.append(("packed rows", f"{product.packed_rows:,}"))
    return shown


def _share(part: int, whole: int) -> str:
    return percent(part / max(whole, 1))


def _sources(lines: LedgerDigest) -> Table:
    rows = [
        [
            name,
            *[f"{counts[key]:,}" for key in ("read", "kept", "tokens")],
            _share(counts["trained_tokens"], counts["tokens"]),
        ]
        for name, counts in lines.sources.items()
    ]
    return Table(header=["source", "rows read", "rows kept", "tokens", "with loss"], rows=rows)


def _thresholds(product: PreparedData, config: DataConfig) -> Table:
    rows = [
        [
            f"{item['max_tokens']:,}{' (now)' if item['max_tokens'] == config.max_tokens else ''}",
            percent(item["rows_share"], digits=2),
            percent(item["trained_tokens_share"], digits=2),
        ]
        for item in product.lengths["thresholds"]
    ]
    return Table(header=["data.max_tokens", "longer rows", "trained tokens in them"], rows=rows)


def _legend(documents: Sequence[Document], rendering: dict[str, Any]) -> Fields | None:
    end = rendering["end_of_turn_id"]
    if end is None or not documents:
        return None
    trained = sum(
        any(token == end and mark for token, mark in zip(document.ids, document.trained, strict=True))
        for document in documents
    )
    has_worse = any(document.rejected or document.desirable is False for document in documents)
    return {"end": rendering["end_of_turn"], "trained": trained, "has_worse": has_worse}


class _DocumentWriter:
    """Turns documents into text under their places in the files."""

    def __init__(self, lines: LedgerDigest, tokenizer: PreTrainedTokenizerBase, *, end: int | None) -> None:
        self.lines, self.tokenizer, self.end = lines, tokenizer, end

    def write(self, document: Document) -> Fields:
        line = self.lines.rows[document.row]
        facts = [f"{len(document.ids):,} tokens, {sum(document.trained):,} of them trained on"]
        facts += [f"truncated by {line['truncated_by']:,}"] if line["truncated_by"] else []
        facts += [f"one of {line['pieces']:,} pieces"] if line["pieces"] > 1 else []
        facts += ["desirable" if document.desirable else "undesirable"] if document.desirable is not None else []
        stretches, more = self._text(document)
        return {
            "place": f"{line['source']}:{line['line']}",
            "facts": facts,
            "stretches": stretches,
            "more": more,
            "is_undesirable": document.desirable is False,
            "rejected": self._rejected(document),
        }

    def _rejected(self, document: Document) -> Fields | None:
        if not document.rejected:
            return None
        stretches, more = self._text(document.differing(document.rejected))
        return {"tokens": len(document.rejected.ids), "stretches": stretches, "more": more}

    def _text(self, document: Document) -> tuple[list[Fields], int]:
        """Returns the shown text and the number of characters that were cut off."""
        left, stretches = LONGEST_SHOWN_CHARACTERS, []
        end = self.tokenizer.decode([self.end], skip_special_tokens=False) if self.end is not None else None
        for text, is_trained in decode_spans(document, self.tokenizer, separate=self.end):
            shown = redact(text)[: max(left, 0)]
            stretches.append({"text": shown, "is_trained": is_trained, "is_end": text == end})
            left -= len(text)
        return stretches, max(-left, 0)


def _dropped(product: PreparedData) -> Table:
    duplicates = product.rows["duplicate"]
    reasons = {**product.rows["dropped"], **({"duplicate": duplicates} if duplicates else {})}
    return Table(header=["why", "rows"], rows=[[reason, f"{count:,}"] for reason, count in reasons.items()])


def _examples(lines: LedgerDigest) -> Table:
    rows = [
        [f"{line['source']}:{line['line']}", reason, redact(line["detail"])]
        for reason, examples in lines.dropped.items()
        for line in examples
    ]
    return Table(header=["where", "why", "what"], rows=rows, text_columns=3)
