"""One row's fate: where it came from, what became of it, and what training sees of it."""

from pathlib import Path
from typing import Any

from finetune.data import ledger
from finetune.data.select import SPLITS
from finetune.data.show.marked import Document, SplitFile, runs
from finetune.errors import DataError

LEARNT_OPEN, LEARNT_CLOSE = "\u27ea", "\u27eb"
"""Marks around learnt text; they occur in no usual training text."""


def explain(folder: Path, where: str, tokenizer: Any) -> str:
    """The fate of one input row in words, with its text, marks and token ids where it was kept.

    Args:
        folder: A prepared folder.
        where: ``train.jsonl:137``, or the ledger's row number.

    Raises:
        DataError: Nothing was prepared there, or no such row was read.
    """
    if not (folder / ledger.FILE).is_file():
        raise DataError(f"{folder / ledger.FILE} is not there; prepare the data first: finetune data")
    if not where.rpartition(":")[2].isdigit():
        raise DataError(f"data why={where}: give a file and a line, e.g. why=train.jsonl:137, or a row's number")
    found = list(ledger.find(folder, where))
    if not found:
        raise DataError(f"data why={where}: the ledger has no such row; it has {_extent(folder)}")
    return "\n\n".join(_fate(folder, row, tokenizer) for row in found)


def _extent(folder: Path) -> str:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(folder / ledger.FILE, columns=["source", "line"]).combine_chunks()
    last: dict[str, int] = {}
    for source, line in zip(table["source"].to_pylist(), table["line"].to_pylist(), strict=True):
        last[source] = max(line, last.get(source, 0))
    return ", ".join(f"{source}:1 to {line}" for source, line in last.items())


def _fate(folder: Path, row: dict[str, Any], tokenizer: Any) -> str:
    name = f"{row['source']}:{row['line']} (row {row['row']})"
    if row["fate"] == ledger.DUPLICATE:
        original = next(ledger.find(folder, f":{row['duplicate_of']}"))
        return (
            f"{name}: duplicate of {original['source']}:{original['line']} (row {original['row']}), so it was left out"
        )
    if row["fate"] == ledger.DROPPED:
        detail = f" ({row['detail']})" if row["detail"] else ""
        tokens = (
            f"; it had {row['full_tokens']:,} tokens" if row["full_tokens"] and "tokens" not in row["detail"] else ""
        )
        return f"{name}: left out, because: {row['reason']}{detail}{tokens}"
    split = SplitFile(folder / row["split"])
    document = split.at(row["pack"], row["position"])
    pieces = f", the first of {row['pieces']:,} pieces, which is shown here" if row["pieces"] > 1 else ""
    cut = f", truncated by {row['truncated_by']:,} tokens" if row["truncated_by"] else ""
    purpose = "trained on" if row["split"] == SPLITS[1] else "held out"
    marked = {None: "", True: ", as a desirable answer", False: ", as an undesirable answer"}[document.desirable]
    return "\n".join(
        [
            f"{name}: kept and {purpose}{marked}{cut}: {row['tokens']:,} tokens, {row['trained_tokens']:,} of them learnt",
            f"{row['split']} row {row['pack']}, from token {row['position']}{pieces}",
            f"text (learnt between {LEARNT_OPEN} and {LEARNT_CLOSE}):",
            _marked(document, tokenizer),
            f"token ids (learnt between {LEARNT_OPEN} and {LEARNT_CLOSE}):",
            _ids(document),
            *_worse(document, tokenizer),
        ]
    )


def _worse(document: Document, tokenizer: Any) -> list[str]:
    """The rejected answer from where it leaves the chosen one."""
    if document.rejected is None:
        return []
    only = document.differing(document.rejected)
    title = f"rejected answer ({len(document.rejected.ids):,} tokens with the prompt, {sum(document.rejected.learnt):,} of them its own):"
    return [title, _marked(only, tokenizer), "its token ids:", _ids(only)]


def _marked(document: Document, tokenizer: Any) -> str:
    return "".join(
        f"{LEARNT_OPEN}{text}{LEARNT_CLOSE}" if learnt else text for text, learnt in runs(document, tokenizer)
    )


def _ids(document: Document) -> str:
    words: list[str] = []
    before = False
    for token, learnt in zip(document.ids, document.learnt, strict=True):
        if before and not learnt:
            words[-1] += LEARNT_CLOSE
        words.append(f"{LEARNT_OPEN}{token}" if learnt and not before else str(token))
        before = learnt
    return " ".join(words) + (LEARNT_CLOSE if before else "")
