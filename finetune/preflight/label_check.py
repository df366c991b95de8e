"""The first proof: what the collated batch teaches is what the data room wrote down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow.parquet

from finetune.inference.rows import IGNORED
from finetune.preflight.batch import collated_learnt, documents, learnt, rejected
from finetune.preflight.context import CheckContext, CheckResult
from finetune.preflight.stop_tokens import end_tokens_of

LEDGER = "ledger.parquet"
COLUMNS = ["row", "trained_tokens", "pieces", "truncated_by"]
TAIL = 2
"""Trained tokens at the end of a document of which one ends it: some templates write a line break after it."""


def trained_text_is_the_ledgers(context: CheckContext) -> CheckResult:
    """Decoded from the very tensors that the model is given, and compared with ledger and prepared rows."""
    batch = context.trainer.look[0](context.rows)
    is_pair = context.job.config.objective != "sft"
    prepared = documents(context.rows) + (rejected(context.rows) if is_pair else [])
    owners = [number for row in context.rows for number in row["rows"]] * (2 if is_pair else 1)
    given = collated_learnt(batch)
    text = [context.tokenizer.decode(tokens) for tokens in given[: len(prepared)]]
    (context.folder.parent / "trained_text.txt").write_text("\n\n".join(text), encoding="utf-8")
    wrong = [
        f"{len(given) - len(prepared)} documents too many are trained" for tokens in given[len(prepared) :] if tokens
    ][:1]
    for number, (tokens, document) in enumerate(zip(given, prepared, strict=False)):
        meant = learnt(document)
        if (tokens != meant and not is_pair) or not tokens or tokens != meant[-len(tokens) :]:
            was = context.tokenizer.decode(meant)
            wrong.append(
                f"row {owners[number]} trains {text[number][:60]!r} ({len(tokens)} tokens) for {was[:60]!r} ({len(meant)} tokens)"
            )
    ledger = _ledger(context, owners)
    if not is_pair:
        wrong += list(_miscounted(given, prepared, owners, ledger))
    wrong += [
        f"row {owners[number]} trains no end of turn"
        for number in _endless(context, given[: len(prepared)], owners, ledger)
    ]
    total = sum(map(len, given))
    return CheckResult(
        passed=not wrong,
        figure=f"{len(wrong)} differences: {'; '.join(wrong[:3])}"
        if wrong
        else f"{total} tokens of {len(prepared)} documents; the first trains {text[0][:60]!r}",
        bound="the same text and counts, each with its end",
    )


def _ledger(context: CheckContext, owners: Sequence[int]) -> dict[int, dict[str, int]]:
    table = pyarrow.parquet.read_table(
        context.data.folder / LEDGER, columns=COLUMNS, filters=[("row", "in", sorted(set(owners)))]
    )
    return {line["row"]: line for line in table.to_pylist()}


def _miscounted(
    given: list[list[int]], prepared: list[Any], owners: list[int], ledger: dict[int, dict[str, int]]
) -> Any:
    """Rows whose trained tokens are not the ledger's; the first token of a document trains nothing, labelled or not."""
    count: Counter[int] = Counter()
    pieces = Counter(owners)
    for tokens, document, owner in zip(given, prepared, owners, strict=False):
        count[owner] += len(tokens) + (document["labels"][0] != IGNORED)
    for owner, found in count.items():
        if owner not in ledger:
            yield f"row {owner} is not in the ledger"
        elif pieces[owner] == ledger[owner]["pieces"] and found != ledger[owner]["trained_tokens"]:
            yield f"row {owner} trains {found} tokens and the ledger says {ledger[owner]['trained_tokens']}"


def _endless(
    context: CheckContext, given: list[list[int]], owners: list[int], ledger: dict[int, dict[str, int]]
) -> list[int]:
    """Documents that do not train an end, rows apart that the ledger knows to be cut."""
    ends = end_tokens_of(context)
    whole = [not (line := ledger.get(owner)) or (line["pieces"] == 1 and not line["truncated_by"]) for owner in owners]
    return [number for number, tokens in enumerate(given) if whole[number] and not ends & set(tokens[-TAIL:])]
