"""Checks that the collated batch trains on the text that the data stage recorded in its ledger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow.parquet

from finetune.inference.rows import IGNORED
from finetune.objectives import OBJECTIVES
from finetune.preflight.batch import Document, documents, rejected, trained_tokens, trained_tokens_of_batch
from finetune.preflight.context import CheckContext, CheckResult

LEDGER = "ledger.parquet"
COLUMNS = ["row", "trained_tokens", "pieces", "truncated_by"]
TAIL = 2
"""Trained tokens at the end of a document of which one ends it: some templates write a line break after it."""

Ledger = dict[int, dict[str, int]]
"""``COLUMNS`` of each row, by its number."""


def check_trained_text(context: CheckContext) -> CheckResult:
    """Compares the trained tokens in the model's own inputs with the ledger and the prepared rows."""
    rows, decode = context.rows.micro_batch, context.tokenizer.decode
    objective = OBJECTIVES[context.job.config.objective]
    prepared = documents(rows) + (rejected(rows) if objective.pairs else [])
    owners = [number for row in rows for number in row["rows"]] * (2 if objective.pairs else 1)
    batch = trained_tokens_of_batch(context.trainer.upcoming.collator(rows))
    trained, extra = batch[: len(prepared)], batch[len(prepared) :]
    texts = [decode(tokens) for tokens in trained]
    (context.folder.parent / "trained_text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    differences = [f"{len(extra)} documents too many are trained on"] if any(extra) else []
    for owner, tokens, text, document in zip(owners, trained, texts, prepared, strict=False):
        expected = trained_tokens(document)
        if (tokens != expected and not objective.compares) or not tokens or tokens != expected[-len(tokens) :]:
            differences.append(
                f"row {owner} trains on {text[:60]!r} ({len(tokens)} tokens) instead of {decode(expected)[:60]!r} "
                f"({len(expected)} tokens)"
            )
    ledger = _ledger(context, owners)
    if not objective.compares:
        differences += _other_counts(trained, prepared, owners, ledger)
    differences += [
        f"row {owners[number]} does not train on an end of turn"
        for number in _without_end(context, trained, owners, ledger)
    ]
    if differences:
        figure = f"{len(differences)} differences: {'; '.join(differences[:3])}"
    else:
        figure = f"{sum(map(len, batch))} tokens of {len(prepared)} documents; the first is {texts[0][:60]!r}"
    return CheckResult(passed=not differences, figure=figure, bound="the same text and counts, each with its end")


def _ledger(context: CheckContext, owners: Sequence[int]) -> Ledger:
    file, wanted = context.data.folder / LEDGER, [("row", "in", sorted(set(owners)))]
    entries = pyarrow.parquet.read_table(file, columns=COLUMNS, filters=wanted).to_pylist()
    return {entry["row"]: entry for entry in entries}


def _other_counts(
    trained: list[list[int]], prepared: list[Document], owners: list[int], ledger: Ledger
) -> Iterator[str]:
    """Yields the rows whose number of trained tokens differs from the ledger's.

    The ledger counts labels, and the label of a document's first token trains nothing.
    """
    counts: Counter[int] = Counter()
    pieces = Counter(owners)
    for tokens, document, owner in zip(trained, prepared, owners, strict=False):
        counts[owner] += len(tokens) + (document["labels"][0] != IGNORED)
    for owner, count in counts.items():
        if owner not in ledger:
            yield f"row {owner} is not in the ledger"
        elif pieces[owner] == ledger[owner]["pieces"] and count != ledger[owner]["trained_tokens"]:
            yield f"row {owner} trains on {count} tokens and the ledger has {ledger[owner]['trained_tokens']}"


def _without_end(context: CheckContext, trained: list[list[int]], owners: list[int], ledger: Ledger) -> list[int]:
    """Returns the documents that do not train on an end, except rows that the ledger marks as truncated."""
    whole = [
        not (entry := ledger.get(owner)) or (entry["pieces"] == 1 and not entry["truncated_by"]) for owner in owners
    ]
    ends = context.end_tokens
    return [number for number, tokens in enumerate(trained) if whole[number] and not ends & set(tokens[-TAIL:])]
