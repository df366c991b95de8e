"""Explains the fate of one input row: its source, what was done with it, and what training sees of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.ledger import DROPPED, DUPLICATE, FILE, find_rows
from finetune.data.select import SPLITS, TRAIN
from finetune.data.show.documents import Document, SplitFile, decode_spans
from finetune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINED_OPEN, TRAINED_CLOSE = "\u27ea", "\u27eb"
"""Marks around trained text; they do not occur in usual training text."""


def explain_row(folder: Path, where: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Describes what happened to an input row, with its text, marks and token ids where it was kept.

    Args:
        folder: A prepared folder.
        where: ``train.jsonl:137``, or the ledger's row number.

    Raises:
        DataError: The folder has no prepared data, or there is no such row.
    """
    if not (folder / FILE).is_file():
        raise DataError(f"{folder / FILE} does not exist; prepare the data first: finetune data")
    if not where.rpartition(":")[2].isdigit():
        raise DataError(f"data why={where}: give a file and a line, e.g. why=train.jsonl:137, or the number of a row")
    rows = list(find_rows(folder, where))
    if not rows:
        raise DataError(f"data why={where}: the ledger has no such row; it has {_row_ranges(folder)}")
    return "\n\n".join(_describe(folder, row, tokenizer) for row in rows)


def _row_ranges(folder: Path) -> str:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(folder / FILE, columns=["source", "line"]).combine_chunks()
    last: dict[str, int] = {}
    for source, line in zip(table["source"].to_pylist(), table["line"].to_pylist(), strict=True):
        last[source] = max(line, last.get(source, 0))
    return ", ".join(f"{source}:1 to {line}" for source, line in last.items())


def _describe(folder: Path, row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> str:
    name = f"{row['source']}:{row['line']} (row {row['row']})"
    if row["fate"] == DUPLICATE:
        original = next(find_rows(folder, f":{row['duplicate_of']}"))
        return f"{name}: dropped as a duplicate of {original['source']}:{original['line']} (row {original['row']})"
    if row["fate"] == DROPPED:
        detail = f" ({row['detail']})" if row["detail"] else ""
        known = row["full_tokens"] and "tokens" not in row["detail"]
        tokens = f"; it had {row['full_tokens']:,} tokens" if known else ""
        return f"{name}: dropped, because: {row['reason']}{detail}{tokens}"
    document = SplitFile(folder / row["split"]).at(row["pack"], row["position"])
    pieces = f", the first of {row['pieces']:,} pieces, which is shown here" if row["pieces"] > 1 else ""
    cut = f", truncated by {row['truncated_by']:,} tokens" if row["truncated_by"] else ""
    purpose = "trained on" if row["split"] == SPLITS[TRAIN] else "held out"
    label = {None: "", True: ", as a desirable answer", False: ", as an undesirable answer"}[document.desirable]
    counts = f"{row['tokens']:,} tokens, {row['trained_tokens']:,} of them trained on"
    return "\n".join(
        [
            f"{name}: kept and {purpose}{label}{cut}: {counts}",
            f"{row['split']} row {row['pack']}, from token {row['position']}{pieces}",
            f"text (trained on between {TRAINED_OPEN} and {TRAINED_CLOSE}):",
            _marked_text(document, tokenizer),
            f"token ids (trained on between {TRAINED_OPEN} and {TRAINED_CLOSE}):",
            _marked_ids(document),
            *_rejected(document, tokenizer),
        ]
    )


def _rejected(document: Document, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Returns the rejected answer from where it differs from the chosen one."""
    if document.rejected is None:
        return []
    tokens, trained = len(document.rejected.ids), sum(document.rejected.trained)
    title = f"rejected answer ({tokens:,} tokens with the prompt, {trained:,} without):"
    different = document.differing(document.rejected)
    return [title, _marked_text(different, tokenizer), "its token ids:", _marked_ids(different)]


def _marked_text(document: Document, tokenizer: "PreTrainedTokenizerBase") -> str:
    spans = decode_spans(document, tokenizer)
    return "".join(f"{TRAINED_OPEN}{text}{TRAINED_CLOSE}" if trained else text for text, trained in spans)


def _marked_ids(document: Document) -> str:
    words: list[str] = []
    before = False
    for token, trained in zip(document.ids, document.trained, strict=True):
        if before and not trained:
            words[-1] += TRAINED_CLOSE
        words.append(f"{TRAINED_OPEN}{token}" if trained and not before else str(token))
        before = trained
    return " ".join(words) + (TRAINED_CLOSE if before else "")
