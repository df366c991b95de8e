"""Compares shares of rows with the thresholds of ``data.checks``, and words the warnings."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from finetune.data.checks.similar import near_duplicates, overlapping_documents
from finetune.data.config import DataConfig
from finetune.data.render import REWRITTEN, THOUGHTS_REMOVED, TRIMMED, WITHOUT_THOUGHTS, Renderer
from finetune.data.row_flags import FLAGS
from finetune.data.select import HELDOUT, TRAIN, Selection
from finetune.data.store import TokenStore
from finetune.data.worker import CHOSEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOTES = (TRIMMED, THOUGHTS_REMOVED, WITHOUT_THOUGHTS)
LABEL_SHARE = 0.1
"""With fewer different answers than this share of the rows, the answers are labels."""


def collect_warnings(
    config: DataConfig,
    store: TokenStore,
    selection: Selection,
    *,
    tokenizer: "PreTrainedTokenizerBase",
    renderer: Renderer,
) -> list[str]:
    """Returns all warnings, the most serious first."""
    return [
        *_mask_warnings(config, store, selection, tokenizer, renderer),
        *_duplicate_warnings(config, store, selection),
        *_label_warnings(config, store, selection),
        *_flag_warnings(config, store, selection),
        *_template_warnings(store, selection, renderer),
    ]


def _mask_warnings(
    config: DataConfig,
    store: TokenStore,
    selection: Selection,
    tokenizer: "PreTrainedTokenizerBase",
    renderer: Renderer,
) -> Iterator[str]:
    kept = selection.split[store.documents["row"]] > 0
    tokens, trained = int(store.documents["length"][kept].sum()), int(store.documents["trained"][kept].sum())
    share = trained / max(tokens, 1)
    if share < config.checks.smallest_trained_share:
        yield (
            f"only {share:.1%} of the tokens are trained on "
            f"(data.checks.smallest_trained_share={config.checks.smallest_trained_share:g}): long prompts with short "
            "answers cost compute and teach little; shorten the system message or the prompts"
        )
    end = renderer.template.end if renderer.template else renderer.eos
    if not end:
        yield "the tokenizer has no end-of-sequence token, so the model never learns to stop after raw text"
    elif tokenizer.pad_token is not None and tokenizer.pad_token == end:
        yield (
            f"the padding token is {end}, which also ends a turn. Masks here are by position, so it is trained on, "
            "but a collator that masks by token id would not train on it"
        )


def _duplicate_warnings(config: DataConfig, store: TokenStore, selection: Selection) -> Iterator[str]:
    rows = max(len(store.rows), 1)
    if selection.duplicates:
        done = "dropped" if config.duplicates == "drop" else "kept because data.duplicates=keep"
        share = _percent(selection.duplicates / rows)
        verb = f"row ({share}) repeats" if selection.duplicates == 1 else f"rows ({share}) repeat"
        yield f"{selection.duplicates:,} {verb} an earlier one exactly; {done}"
    yield from _overlap_warnings(config, store, selection)
    if selection.leaked:
        done = "dropped from training" if config.leaked == "drop" else "kept in training because data.leaked=keep"
        yield f"{selection.leaked:,} training rows are also held-out rows; {done}"


def _overlap_warnings(config: DataConfig, store: TokenStore, selection: Selection) -> Iterator[str]:
    checks = config.checks
    split = selection.split[store.documents["row"]]
    chosen = (store.documents["role"] == CHOSEN) & ~_repeats_its_row(store)
    train, heldout = np.flatnonzero((split == TRAIN) & chosen), np.flatnonzero((split == HELDOUT) & chosen)
    share = near_duplicates(store, train, similarity=checks.near_duplicate_similarity)
    if share > checks.near_duplicate_share:
        yield (
            f"about {share:.0%} of the training documents nearly repeat another one "
            f"({checks.near_duplicate_similarity:.0%} of their 5-grams; "
            f"data.checks.near_duplicate_share={checks.near_duplicate_share:g}): "
            "fewer epochs or fewer rows would teach as much"
        )
    leaked = overlapping_documents(store, train, heldout, share=checks.overlap_share) if len(heldout) else heldout
    if len(leaked) > checks.overlap_rows_share * len(train):
        verb = "document shares" if len(leaked) == 1 else "documents share"
        lines = ", ".join(f"why={row}" for row in store.documents["row"][leaked[:3]])
        yield (
            f"{len(leaked):,} training {verb} at least {checks.overlap_share:.0%} of the 13-grams with held-out rows "
            f"({lines}): held-out scores will look better than they are"
        )


def _repeats_its_row(store: TokenStore) -> np.ndarray:
    """Returns whether each document is an earlier turn of a conversation whose turns are rows of their own."""
    rows = store.documents["row"]
    later = np.concatenate([[False], rows[1:] == rows[:-1]]) if len(rows) else np.zeros(0, bool)
    rewritten: np.ndarray = later & (store.rows["flags"][rows] & FLAGS[REWRITTEN] > 0)
    return rewritten


def _label_warnings(config: DataConfig, store: TokenStore, selection: Selection) -> Iterator[str]:
    answers = store.rows["answer"][selection.split > 0]
    different, counts = np.unique(answers, return_counts=True)
    if len(answers) < 20 or len(different) > LABEL_SHARE * len(answers):
        return
    share = counts.max() / len(answers)
    if share > config.checks.largest_label_share:
        yield (
            f"one of {len(different):,} different answers makes up {share:.0%} of the rows "
            f"(data.checks.largest_label_share={config.checks.largest_label_share:g}): "
            "a model can score well by always giving it"
        )


def _flag_warnings(config: DataConfig, store: TokenStore, selection: Selection) -> Iterator[str]:
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
            rows, verb = ("row", "contains") if count == 1 else ("rows", "contain")
            where = f"{count:,} {rows} ({_percent(count / len(flags))}) {verb}"
            yield f"{where} {name}, which are not shown here; check them before you train on them"
    literal = int((flags & FLAGS["control tokens as text"] > 0).sum())
    in_pieces = int((flags & FLAGS["in pieces"] > 0).sum()) - literal
    if in_pieces > 0:
        yield (
            f"{in_pieces:,} rows have an answer whose beginning would form one token with the end of its prompt; "
            "prompt and answer are tokenized separately there, as serving does"
        )
    if literal:
        yield (
            f"{literal:,} rows contain control tokens in their text, which are read as text "
            "(data.control_tokens=control reads them as control tokens)"
        )


def _template_warnings(store: TokenStore, selection: Selection, renderer: Renderer) -> Iterator[str]:
    counts = {name: int((store.rows["flags"][selection.split > 0] & FLAGS[name] > 0).sum()) for name in NOTES}
    if counts[TRIMMED]:
        yield (
            f"{counts[TRIMMED]:,} rows have an answer that begins or ends with white space, which the chat template "
            "removes, so that it is not trained on"
        )
    if counts[THOUGHTS_REMOVED]:
        yield f"{counts[THOUGHTS_REMOVED]:,} rows have thoughts, which are removed (data.thinking=train trains on them)"
    if counts[WITHOUT_THOUGHTS]:
        other = "data.thinking=off asks for none" if renderer.template and renderer.template.switch else "add thoughts"
        yield (
            f"{counts[WITHOUT_THOUGHTS]:,} rows have an answer without a thought, and the model is asked to think: an "
            f"empty thought is trained on there ({other})"
        )
    heldout = int((store.rows["flags"][selection.split == HELDOUT] & FLAGS[REWRITTEN] > 0).sum())
    if heldout:
        yield (
            f"{heldout:,} held-out conversations are evaluated on their last turn only, since the chat template "
            "rewrites their earlier turns"
        )


def _percent(share: float) -> str:
    return "less than 0.1%" if 0 < share < 0.0005 else f"{share:.1%}"
