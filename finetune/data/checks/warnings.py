"""Compares shares of rows with the thresholds of ``data.checks``, and words the warnings."""

from collections import Counter
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
    flagged, heldout, kept = Counter[str](), Counter[str](), 0
    for part in store.row_slices():
        flags, split = store.rows["flags"][part], selection.split[part]
        kept += int((split > 0).sum())
        for name, flag in FLAGS.items():
            flagged[name] += int((flags[split > 0] & flag > 0).sum())
            heldout[name] += int((flags[split == HELDOUT] & flag > 0).sum())
    return [
        *_mask_warnings(config, store, selection, tokenizer, renderer),
        *_duplicate_warnings(config, store, selection),
        *_label_warnings(config, store, selection),
        *_flag_warnings(config, flagged, kept),
        *_template_warnings(flagged, renderer, heldout=heldout[REWRITTEN]),
    ]


def _mask_warnings(
    config: DataConfig,
    store: TokenStore,
    selection: Selection,
    tokenizer: "PreTrainedTokenizerBase",
    renderer: Renderer,
) -> Iterator[str]:
    tokens = trained = 0
    for part in store.document_slices():
        documents = store.documents[part]
        kept = documents[selection.split[documents["row"]] > 0]
        tokens, trained = tokens + int(kept["length"].sum()), trained + int(kept["trained"].sum())
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
    train, heldout = (store.collect(_compared(store, selection, split)) for split in (TRAIN, HELDOUT))
    share = near_duplicates(store, train, similarity=checks.near_duplicate_similarity)
    if share > checks.near_duplicate_share:
        yield (
            f"about {share:.0%} of the training documents nearly repeat another one "
            f"({checks.near_duplicate_similarity:.0%} of their 5-grams; "
            f"data.checks.near_duplicate_share={checks.near_duplicate_share:g}): "
            "fewer epochs or fewer rows would teach as much"
        )
    overlapping = overlapping_documents(store, train, heldout, share=checks.overlap_share)
    leaked = store.collect(overlapping if len(heldout) else iter(()))
    if len(leaked) > checks.overlap_rows_share * len(train):
        verb = "document shares" if len(leaked) == 1 else "documents share"
        lines = ", ".join(f"why={row}" for row in store.documents["row"][leaked[:3]])
        yield (
            f"{len(leaked):,} training {verb} at least {checks.overlap_share:.0%} of the 13-grams with held-out rows "
            f"({lines}): held-out scores will look better than they are"
        )


def _compared(store: TokenStore, selection: Selection, split: int) -> Iterator[np.ndarray]:
    """Yields the documents of a split without earlier turns of conversations whose turns are rows of their own."""
    for part in store.document_slices():
        documents, numbers = store.documents[part], np.arange(part.start, part.stop)
        rows = documents["row"]
        later = numbers > store.first_documents[rows]
        repeats = later & (store.rows["flags"][rows] & FLAGS[REWRITTEN] > 0)
        yield numbers[(selection.split[rows] == split) & (documents["role"] == CHOSEN) & ~repeats]


def _label_warnings(config: DataConfig, store: TokenStore, selection: Selection) -> Iterator[str]:
    different = most = answers = 0
    with store.keys() as keys:
        for part in store.row_slices():
            rows = part.start + np.flatnonzero(selection.split[part] > 0)
            keys.add(rows, store.rows["answer"][rows])
            answers += len(rows)
        for _, _, counts in keys.groups():
            different, most = different + len(counts), max(most, int(counts.max()))
    if answers < 20 or different > LABEL_SHARE * answers:
        return
    share = most / answers
    if share > config.checks.largest_label_share:
        yield (
            f"one of {different:,} different answers makes up {share:.0%} of the rows "
            f"(data.checks.largest_label_share={config.checks.largest_label_share:g}): "
            "a model can score well by always giving it"
        )


def _flag_warnings(config: DataConfig, flagged: Counter[str], rows: int) -> Iterator[str]:
    thresholds = {
        "control characters": config.checks.control_character_share,
        "likely secrets": config.checks.secret_share,
        "e-mail addresses": config.checks.email_share,
    }
    for name, threshold in thresholds.items():
        count = flagged[name]
        if count > threshold * rows:
            noun, verb = ("row", "contains") if count == 1 else ("rows", "contain")
            where = f"{count:,} {noun} ({_percent(count / rows)}) {verb}"
            yield f"{where} {name}, which are not shown here; check them before you train on them"
    literal = flagged["control tokens as text"]
    in_pieces = flagged["in pieces"] - literal
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


def _template_warnings(flagged: Counter[str], renderer: Renderer, *, heldout: int) -> Iterator[str]:
    if flagged[TRIMMED]:
        yield (
            f"{flagged[TRIMMED]:,} rows have an answer that begins or ends with white space, which the chat template "
            "removes, so that it is not trained on"
        )
    if flagged[THOUGHTS_REMOVED]:
        count = flagged[THOUGHTS_REMOVED]
        yield f"{count:,} rows have thoughts, which are removed (data.thinking=train trains on them)"
    if flagged[WITHOUT_THOUGHTS]:
        other = "data.thinking=off asks for none" if renderer.template and renderer.template.switch else "add thoughts"
        yield (
            f"{flagged[WITHOUT_THOUGHTS]:,} rows have an answer without a thought, and the model is asked to think: an "
            f"empty thought is trained on there ({other})"
        )
    if heldout:
        yield (
            f"{heldout:,} held-out conversations are evaluated on their last turn only, since the chat template "
            "rewrites their earlier turns"
        )


def _percent(share: float) -> str:
    return "less than 0.1%" if 0 < share < 0.0005 else f"{share:.1%}"
