"""``preview.html``: one page, no network, for a look before training."""

import html
import json
from pathlib import Path
from typing import Any

from finetune.data.config import DataConfig
from finetune.data.row_flags import redact
from finetune.data.show.chart import histogram
from finetune.data.show.documents import Document, SplitFile, decode_spans
from finetune.data.show.ledger_digest import LedgerDigest, digest_ledger
from finetune.products import PreparedData

HELDOUT_SHOWN = 3
LONGEST_SHOWN_CHARACTERS = 6000
STYLE = """
:root{--ink:#1c2430;--soft:#5d6b7c;--line:#dfe5ec;--page:#f6f8fa;--card:#fff;--learn:#c9efd6;--learnink:#0b5a2b;--worse:#fbdcd8;
--worseink:#7a1c10;--bar:#4f7cac;--long:#d08b82;--warn:#fff4d6}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9f0;--soft:#9aa7b6;--line:#2c3642;--page:#12171d;--card:#1a2129;--learn:#174a2c;
--learnink:#b9f2cd;--worse:#4d2320;--worseink:#ffcfc9;--bar:#6fa0d6;--long:#a8605a;--warn:#463a14}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:980px;margin:0 auto;padding:32px 20px}h1{font-size:24px;margin:0 0 4px}h2{font-size:17px;margin:32px 0 10px}
p{margin:6px 0;color:var(--soft)}.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:18px 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px}.card b{display:block;font-size:21px}
.card span{color:var(--soft);font-size:13px}table{border-collapse:collapse;width:100%;background:var(--card);border:1px solid var(--line)}
td,th{padding:6px 10px;border-bottom:1px solid var(--line);text-align:left;font-size:14px}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.warn{background:var(--warn);border-radius:8px;padding:8px 14px;margin:8px 0}
details{background:var(--card);border:1px solid var(--line);border-radius:8px;margin:8px 0}
summary{cursor:pointer;padding:8px 14px;font-size:14px}
summary span{color:var(--soft)}pre{margin:0;padding:12px 14px;border-top:1px solid var(--line);white-space:pre-wrap;overflow-wrap:anywhere;
font:13px/1.55 ui-monospace,Menlo,Consolas,monospace}mark{background:var(--learn);color:var(--learnink);border-radius:2px}
mark.end{text-decoration:underline}.worse mark{background:var(--worse);color:var(--worseink)}.worse i{color:var(--soft)}
svg{width:100%;height:auto;background:var(--card);border:1px solid var(--line);border-radius:8px}svg text{fill:var(--soft);font-size:11px}
svg rect{fill:var(--bar)}svg rect.long{fill:var(--long)}svg line{stroke:#c0392b}
"""


def write_preview(folder: Path, product: PreparedData, config: DataConfig, *, tokenizer: Any) -> None:
    """Summary, warnings, lengths, some rows with the learnt text marked, and some that were left out."""
    train, heldout = (
        SplitFile(folder / name).sample(min(most, config.preview_rows))
        for name, most in (("train", config.preview_rows), ("heldout", HELDOUT_SHOWN))
    )
    lines = digest_ledger(folder, {document.row for document in [*train, *heldout]})
    rendering = json.loads((folder / "rendering.json").read_text(encoding="utf-8"))
    rows = _Rows(lines, tokenizer, rendering["end_of_turn_id"])
    parts = [
        f"<h1>Data preview</h1><p>{html.escape(_what(lines))}</p>",
        _cards(product),
        "".join(f'<div class="warn">{html.escape(warning)}</div>' for warning in product.warnings),
        _sources(lines),
        f"<h2>Lengths</h2>{histogram(product.lengths, limit=config.max_tokens)}",
        _thresholds(product, config),
        f"<h2>Rows to train on</h2>{_legend(train, rendering)}{rows.shown(train)}",
        f"<h2>Held-out rows</h2>{rows.shown(heldout)}" if heldout else "",
        _left_out(product, lines),
    ]
    head = f'<meta charset="utf-8"><title>Data preview</title><style>{STYLE}</style>'
    page = f'<!doctype html><html lang="en">{head}<main>{"".join(parts)}</main></html>'
    (folder / "preview.html").write_text(page, encoding="utf-8", errors="replace")


def _what(lines: LedgerDigest) -> str:
    names = list(lines.sources)
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}: what the model will read, and (marked) what it will learn."


def _sources(lines: LedgerDigest) -> str:
    if len(lines.sources) < 2:
        return ""
    header = "".join(f'<th class="n">{name}</th>' for name in ("rows read", "rows kept", "tokens", "learnt"))
    body = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="n">{counts["read"]:,}</td><td class="n">{counts["kept"]:,}</td>'
        f'<td class="n">{counts["tokens"]:,}</td><td class="n">{counts["trained_tokens"] / max(counts["tokens"], 1):.1%}</td></tr>'
        for name, counts in lines.sources.items()
    )
    return f"<h2>Sources</h2><table><tr><th>source</th>{header}</tr>{body}</table>"


def _legend(documents: list[Document], rendering: dict[str, Any]) -> str:
    """How to read the marks, and whether the token that ends an answer is learnt in what is shown."""
    end = rendering["end_of_turn_id"]
    if end is None or not documents:
        return ""
    learnt = sum(
        any(token == end and mark for token, mark in zip(document.ids, document.trained, strict=True))
        for document in documents
    )
    avoided = any(document.rejected or document.desirable is False for document in documents)
    worse = ' In <span class="worse"><mark>this colour</mark></span> it is the answer to avoid.' if avoided else ""
    return (
        f'<p>{len(documents):,} of them, drawn evenly. <mark>Marked</mark> text is learnt; <mark class="end">'
        f"{html.escape(rendering['end_of_turn'])}</mark> ends a turn, and is learnt in {learnt:,} of these {len(documents):,}.{worse}</p>"
    )


def _cards(product: PreparedData) -> str:
    rows = product.rows
    cards = {
        "rows read": f"{rows['in']:,}",
        "rows to train on": f"{product.train_rows:,}",
        "rows held out": f"{product.heldout_rows:,}",
        "left out": f"{rows['in'] - rows['kept']:,}",
        "truncated": f"{rows['truncated']:,}",
        "tokens to train on": f"{product.tokens:,}",
        "of them learnt": f"{product.trained_tokens / max(product.tokens, 1):.1%}",
    }
    if product.packed_rows != product.train_rows:
        cards["packed rows"] = f"{product.packed_rows:,}"
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{value}</b><span>{name}</span></div>' for name, value in cards.items())
        + "</div>"
    )


def _thresholds(product: PreparedData, config: DataConfig) -> str:
    header = '<tr><th>data.max_tokens</th><th class="n">rows that are longer</th><th class="n">trained tokens in them</th></tr>'
    body = "".join(
        f"<tr><td>{item['max_tokens']:,}{' (now)' if item['max_tokens'] == config.max_tokens else ''}</td>"
        f'<td class="n">{item["rows_share"]:.2%}</td><td class="n">{item["trained_tokens_share"]:.2%}</td></tr>'
        for item in product.lengths["thresholds"]
    )
    return f"<table>{header}{body}</table>"


class _Rows:
    """Documents as text under their places in the files."""

    def __init__(self, lines: LedgerDigest, tokenizer: Any, end: int | None) -> None:
        self.lines, self.tokenizer, self.end = lines, tokenizer, end

    def shown(self, documents: list[Document]) -> str:
        return "".join(self._one(document) for document in documents)

    def _one(self, document: Document) -> str:
        line = self.lines.rows[document.row]
        facts = [f"{len(document.ids):,} tokens, {sum(document.trained):,} of them learnt"]
        facts += [f"truncated by {line['truncated_by']:,}"] if line["truncated_by"] else []
        facts += [f"one of {line['pieces']:,} pieces"] if line["pieces"] > 1 else []
        facts += ["desirable" if document.desirable else "undesirable"] if document.desirable is not None else []
        title = f"{html.escape(line['source'])}:{line['line']} <span>{'; '.join(facts)}</span>"
        worse = ""
        if document.rejected:
            only = document.differing(document.rejected)
            worse = f'<pre class="worse"><i>rejected ({len(document.rejected.ids):,} tokens with the prompt):</i> {self._text(only)}</pre>'
        bad = ' class="worse"' if document.desirable is False else ""
        return f"<details open><summary>{title}</summary><pre{bad}>{self._text(document)}</pre>{worse}</details>"

    def _text(self, document: Document) -> str:
        left, parts = LONGEST_SHOWN_CHARACTERS, []
        end = self.tokenizer.decode([self.end], skip_special_tokens=False) if self.end is not None else None
        for text, learnt in decode_spans(document, self.tokenizer, separate=self.end):
            shown = html.escape(redact(text)[: max(left, 0)])
            left -= len(text)
            kind = ' class="end"' if text == end else ""
            parts.append(f"<mark{kind}>{shown}</mark>" if learnt and shown else shown)
        return "".join(parts) + (f" ... ({-left:,} more characters)" if left < 0 else "")


def _left_out(product: PreparedData, lines: LedgerDigest) -> str:
    lost = {
        **product.rows["dropped"],
        **({"duplicate": product.rows["duplicate"]} if product.rows["duplicate"] else {}),
    }
    if not lost:
        return ""
    table = "".join(
        f'<tr><td>{html.escape(reason)}</td><td class="n">{count:,}</td></tr>' for reason, count in lost.items()
    )
    some = "".join(
        f"<tr><td>{html.escape(line['source'])}:{line['line']}</td><td>{html.escape(reason)}</td>"
        f"<td>{html.escape(redact(line['detail']))}</td></tr>"
        for reason, found in lines.dropped.items()
        for line in found
    )
    first = (
        f"<p>The first ones for each reason:</p><table><tr><th>where</th><th>why</th><th>what</th></tr>{some}</table>"
    )
    return f'<h2>Left out</h2><table><tr><th>why</th><th class="n">rows</th></tr>{table}</table>{first}'
