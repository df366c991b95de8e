"""``preview.html``: one page, no network, for a look before training."""

import html
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from finetune.data.config import DataConfig
from finetune.data.describe import delicate
from finetune.data.ledger import FILE, KEPT
from finetune.data.product import PreparedData
from finetune.data.show.chart import histogram
from finetune.data.show.marked import Document, SplitFile, runs

DROPPED_SHOWN = 12
LONGEST_SHOWN_CHARACTERS = 6000
STYLE = """
:root{--ink:#1c2430;--soft:#5d6b7c;--line:#dfe5ec;--page:#f6f8fa;--card:#fff;--learn:#c9efd6;--learnink:#0b5a2b;--bar:#4f7cac;--warn:#fff4d6}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9f0;--soft:#9aa7b6;--line:#2c3642;--page:#12171d;--card:#1a2129;--learn:#174a2c;
--learnink:#b9f2cd;--bar:#6fa0d6;--warn:#463a14}}
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
svg{width:100%;height:auto;background:var(--card);border:1px solid var(--line);border-radius:8px}svg text{fill:var(--soft);font-size:11px}
svg rect{fill:var(--bar)}svg line{stroke:#c0392b}
"""


def write_preview(folder: Path, product: PreparedData, config: DataConfig, *, tokenizer: Any) -> None:
    """Summary, warnings, lengths, some rows with the learnt text marked, and some that were left out."""
    train, heldout = _chosen(folder / "train", config.preview_rows), _chosen(folder / "heldout", min(3, config.preview_rows))
    lines, gone = _lines(folder, {document.row for document in [*train, *heldout]})
    parts = [
        "<h1>Data preview</h1><p>What the model will read, and (marked) what it will learn.</p>",
        _cards(product),
        "".join(f'<div class="warn">{html.escape(warning)}</div>' for warning in product.warnings),
        f"<h2>Lengths</h2>{histogram(product.lengths, limit=config.max_tokens)}",
        _thresholds(product, config),
        f"<h2>Rows to train on</h2>{_rows(train, lines, tokenizer)}",
        f"<h2>Held-out rows</h2>{_rows(heldout, lines, tokenizer)}" if heldout else "",
        _dropped(product, gone),
    ]
    head = f'<meta charset="utf-8"><title>Data preview</title><style>{STYLE}</style>'
    page = f'<!doctype html><html lang="en">{head}<main>{"".join(parts)}</main></html>'
    (folder / "preview.html").write_text(page, encoding="utf-8", errors="replace")


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
        "packed rows": f"{product.packed_rows:,}",
    }
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


def _chosen(folder: Path, wanted: int) -> list[Document]:
    """Documents from all over a split."""
    split = SplitFile(folder)
    packs: Any = np.unique(np.linspace(0, len(split) - 1, min(wanted, len(split))).astype(int)) if len(split) else []
    return [next(split.documents(int(pack))) for pack in packs]


def _lines(folder: Path, wanted: set[int]) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
    """The ledger's lines of some rows, and the first ones of rows that were left out."""
    found: dict[int, dict[str, Any]] = {}
    gone: list[dict[str, Any]] = []
    columns = ["row", "source", "line", "fate", "reason", "detail"]
    for batch in pyarrow.parquet.ParquetFile(folder / FILE).iter_batches(columns=columns):
        rows = batch.column("row").to_numpy()
        for at in np.flatnonzero(np.isin(rows, list(wanted))):
            found[int(rows[at])] = batch.slice(int(at), 1).to_pylist()[0]
        fates = np.array(batch.column("fate").cast("string").to_pylist())
        for at in np.flatnonzero(fates != KEPT)[: DROPPED_SHOWN - len(gone)]:
            gone.append(batch.slice(int(at), 1).to_pylist()[0])
    return found, gone


def _rows(documents: list[Document], lines: dict[int, dict[str, Any]], tokenizer: Any) -> str:
    shown = []
    for document in documents:
        line = lines[document.row]
        counts = f"{len(document.ids):,} tokens, {sum(document.learnt):,} of them learnt"
        title = f"{html.escape(line['source'])}:{line['line']} <span>{counts}</span>"
        shown.append(f"<details open><summary>{title}</summary><pre>{_text(runs(document, tokenizer))}</pre></details>")
    return "".join(shown)


def _text(stretches: list[tuple[str, bool]]) -> str:
    left, parts = LONGEST_SHOWN_CHARACTERS, []
    for text, learnt in stretches:
        shown = html.escape(delicate(text)[: max(left, 0)])
        left -= len(text)
        parts.append(f"<mark>{shown}</mark>" if learnt else shown)
    return "".join(parts) + (f" ... ({-left:,} more characters)" if left < 0 else "")


def _dropped(product: PreparedData, gone: list[dict[str, Any]]) -> str:
    lost = {**product.rows["dropped"], **({"duplicate": product.rows["duplicate"]} if product.rows["duplicate"] else {})}
    if not lost:
        return ""
    table = "".join(f'<tr><td>{html.escape(reason)}</td><td class="n">{count:,}</td></tr>' for reason, count in lost.items())
    some = "".join(
        f"<tr><td>{html.escape(line['source'])}:{line['line']}</td><td>{html.escape(line['reason'] or line['fate'])}</td>"
        f"<td>{html.escape(line['detail'])}</td></tr>"
        for line in gone
    )
    first = f"<p>The first ones:</p><table><tr><th>where</th><th>why</th><th>what</th></tr>{some}</table>"
    return f'<h2>Left out</h2><table><tr><th>why</th><th class="n">rows</th></tr>{table}</table>{first}'
