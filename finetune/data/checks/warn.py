"""Shares of rows against the thresholds of ``data.checks``; one sentence where one is passed."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from finetune.data.checks.similar import near_duplicates, overlapping
from finetune.data.config import DataConfig
from finetune.data.render import Renderer
from finetune.data.row_flags import FLAGS
from finetune.data.select import HELDOUT, TRAIN, Selection
from finetune.data.store import Store
from finetune.data.worker import CHOSEN

LABELS_REPEAT = 0.1
"""Fewer different answers than this share of the rows, and they are taken for labels."""


def warnings_of(
    config: DataConfig, store: Store, selection: Selection, *, tokenizer: Any, renderer: Renderer
) -> list[str]:
    """All warnings, the gravest first."""
    return [
        *_masks(config, store, selection, tokenizer, renderer),
        *_copies(config, store, selection),
        *_labels(config, store, selection),
        *_flags(config, store, selection),
    ]


def _masks(config: DataConfig, store: Store, selection: Selection, tokenizer: Any, renderer: Renderer) -> Iterator[str]:
    kept = selection.split[store.documents["row"]] > 0
    tokens, trained = int(store.documents["length"][kept].sum()), int(store.documents["trained"][kept].sum())
    share = trained / max(tokens, 1)
    if share < config.checks.smallest_trained_share:
        yield (
            f"only {share:.1%} of the tokens are trained (data.checks.smallest_trained_share={config.checks.smallest_trained_share:g}): "
            "long prompts with short answers cost compute without teaching; shorten the system message or the prompts"
        )
    end = renderer.template.end_of_turn if renderer.template else renderer.eos
    if not end:
        yield "the tokenizer has no end-of-sequence token, so raw text ends without one and the model will not learn to stop"
    elif tokenizer.pad_token is not None and tokenizer.pad_token == end:
        yield (
            f"the padding token is {end}, which also ends a turn; masks here are by position, so it is trained, "
            "but a collator that masks by token id would undo that"
        )


def _copies(config: DataConfig, store: Store, selection: Selection) -> Iterator[str]:
    rows = max(len(store.rows), 1)
    if selection.duplicates:
        done = "dropped" if config.duplicates == "drop" else "kept, as data.duplicates=keep asks"
        share = _percent(selection.duplicates / rows)
        verb = f"row ({share}) repeats" if selection.duplicates == 1 else f"rows ({share}) repeat"
        yield f"{selection.duplicates:,} {verb} an earlier one exactly; {done}"
    yield from _near(config, store, selection)
    if selection.leaked:
        done = "left out of training" if config.leaked == "drop" else "kept in training, as data.leaked=keep asks"
        yield f"{selection.leaked:,} training rows are held-out rows too; {done}"


def _near(config: DataConfig, store: Store, selection: Selection) -> Iterator[str]:
    checks = config.checks
    split = selection.split[store.documents["row"]]
    chosen = store.documents["role"] == CHOSEN
    train, heldout = np.flatnonzero((split == TRAIN) & chosen), np.flatnonzero((split == HELDOUT) & chosen)
    share = near_duplicates(store, train, similarity=checks.near_duplicate_similarity)
    if share > checks.near_duplicate_share:
        yield (
            f"about {share:.0%} of the training documents nearly repeat another one ({checks.near_duplicate_similarity:.0%} of their "
            f"5-grams; data.checks.near_duplicate_share={checks.near_duplicate_share:g}): fewer epochs or fewer of them would teach as much"
        )
    leaking = overlapping(store, train, heldout, share=checks.overlap_share) if len(heldout) else heldout
    if len(leaking) > checks.overlap_rows_share * len(train):
        verb = "document shares" if len(leaking) == 1 else "documents share"
        lines = ", ".join(f"why={row}" for row in store.documents["row"][leaking[:3]])
        yield (
            f"{len(leaking):,} training {verb} at least {checks.overlap_share:.0%} of the 13-grams with held-out rows "
            f"({lines}): held-out scores will look better than they are"
        )


def _labels(config: DataConfig, store: Store, selection: Selection) -> Iterator[str]:
    answers = store.rows["answer"][selection.split > 0]
    different, counts = np.unique(answers, return_counts=True)
    if len(answers) < 20 or len(different) > LABELS_REPEAT * len(answers):
        return
    share = counts.max() / len(answers)
    if share > config.checks.largest_label_share:
        yield (
            f"one answer makes up {share:.0%} of the rows and there are {len(different):,} different ones "
            f"(data.checks.largest_label_share={config.checks.largest_label_share:g}): a model can look good by always giving it"
        )


def _flags(config: DataConfig, store: Store, selection: Selection) -> Iterator[str]:
    kept = selection.split > 0
    flags = store.rows["flags"][kept]
    thresholds = {
        "control characters": config.checks.control_character_share,
        "likely secrets": config.checks.secret_share,
        "e-mail addresses": config.checks.email_share,
    }
    for name, threshold in thresholds.items():
        count = int((flags & FLAGS[name] > 0).sum())
        if count > threshold * len(flags):
            rows, verb = ("row", "holds") if count == 1 else ("rows", "hold")
            where = f"{count:,} {rows} ({_percent(count / len(flags))}) {verb}"
            yield f"{where} {name}, which are not shown here; look at them before you train on them"
    apart = int((flags & FLAGS["in pieces"] > 0).sum()) - int((flags & FLAGS["control tokens as text"] > 0).sum())
    if apart > 0:
        yield (
            f"{apart:,} rows have an answer whose beginning would melt with its prompt into one token; "
            "they are tokenised apart there, as serving does"
        )
    literal = int((flags & FLAGS["control tokens as text"] > 0).sum())
    if literal:
        yield f"{literal:,} rows write control tokens in their text; they are read as text (data.control_tokens=control would obey them)"


def _percent(share: float) -> str:
    return "less than 0.1%" if 0 < share < 0.0005 else f"{share:.1%}"
