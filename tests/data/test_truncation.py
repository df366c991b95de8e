"""Documents longer than max_tokens are never cut silently."""

from collections.abc import Callable
from typing import Any

import pytest

from finetune.errors import DataError
from finetune.inference.rows import IGNORED
from finetune.products import PreparedData
from tests.data.helpers import ledger, pair, split, trained_text

SHORT, LONG_PROMPT, LONG_ANSWER = pair("q", "a"), pair("word " * 80 + "end?", "short"), pair("q", "word " * 80)
ROWS = [SHORT, LONG_PROMPT, LONG_ANSWER]


def test_long_rows_are_dropped_and_counted(run: Callable[..., PreparedData]) -> None:
    product = run(ROWS, max_tokens=64)
    assert product.rows["dropped"] == {"longer than max_tokens": 2}


def test_long_rows_are_an_error_with_too_long_error(run: Callable[..., PreparedData]) -> None:
    with pytest.raises(DataError, match=r"2 of 3 rows cannot be used; raise data\.max_tokens"):
        run(ROWS, max_tokens=64, too_long="error")


def test_long_rows_stop_everything_even_where_bad_rows_are_dropped(run: Callable[..., PreparedData]) -> None:
    with pytest.raises(DataError, match=r"longer than max_tokens"):
        run(ROWS, max_tokens=64, too_long="error", bad_rows="drop")


def test_truncated_prompts_keep_the_whole_answer_and_the_template(
    run: Callable[..., PreparedData], tokenizer: Any
) -> None:
    product = run(ROWS, max_tokens=64, too_long="truncate_prompt")
    row = split(product, "train")[1]
    text = tokenizer.decode(row["input_ids"], skip_special_tokens=False)
    assert len(row["input_ids"]) <= 64
    assert text.startswith("<|im_start|>user\n")
    assert "end?<|im_end|>\n" in text
    assert trained_text(row, tokenizer) == "short<|im_end|>"
    assert product.rows["dropped"] == {"longer than max_tokens even without its prompt": 1}


def test_truncation_is_counted_in_tokens(run: Callable[..., PreparedData]) -> None:
    product = run(ROWS, max_tokens=64, too_long="truncate")
    lines = ledger(product)
    assert product.rows["truncated"] == 1
    assert lines[2]["truncated_by"] == lines[2]["full_tokens"] - 64


def test_row_whose_answer_is_cut_off_whole_is_dropped(run: Callable[..., PreparedData]) -> None:
    assert run(ROWS, max_tokens=64, too_long="truncate").rows["dropped"] == {"no trained token is left": 1}


def test_split_raw_text_learns_every_token_but_the_first_once(run: Callable[..., PreparedData]) -> None:
    text = {"text": " ".join(str(number) for number in range(200))}
    product = run([text], max_tokens=50, too_long="split")
    whole = split(run([text], max_tokens=4096), "train")[0]
    trained_ids = [label for row in split(product, "train") for label in row["labels"] if label != IGNORED]
    assert trained_ids == whole["input_ids"][1:]
    assert ledger(product)[0]["pieces"] == product.packed_rows > 1


def test_split_conversations_break_before_user_turns_and_keep_the_system_message(
    run: Callable[..., PreparedData], tokenizer: Any
) -> None:
    turns = [{"role": "system", "content": "be kind"}]
    for number in range(8):
        turns += [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": f"answer {number}"},
        ]
    product = run([{"messages": turns}], max_tokens=80, too_long="split")
    pieces = [tokenizer.decode(row["input_ids"], skip_special_tokens=False) for row in split(product, "train")]
    assert len(pieces) > 1
    assert all(piece.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user") for piece in pieces)
    assert "".join(trained_text(row, tokenizer) for row in split(product, "train")) == "".join(
        f"answer {n}<|im_end|>" for n in range(8)
    )


def test_thresholds_say_what_they_would_cut(run: Callable[..., PreparedData]) -> None:
    product = run(ROWS, max_tokens=64)
    here = next(item for item in product.lengths["thresholds"] if item["max_tokens"] == 64)
    assert here["rows_share"] == pytest.approx(2 / 3, abs=1e-6)
    assert here["trained_tokens_share"] > 0.9


def test_row_that_is_too_long_to_be_tokenized_still_counts_among_the_lengths(run: Callable[..., PreparedData]) -> None:
    product = run([pair(), pair("who?", "word " * 100_000)], max_tokens=64)
    assert product.lengths["longest"] > 1000
    assert next(item for item in product.lengths["thresholds"] if item["max_tokens"] == 64)["rows_share"] == 0.5
    assert sum(product.lengths["histogram"]["rows"]) == 2


def test_error_without_rows_names_the_shortest_length(run: Callable[..., PreparedData]) -> None:
    with pytest.raises(DataError, match=r"the shortest has [\d,]+ tokens or more and data\.max_tokens is 16: raise it"):
        run([pair()], max_tokens=16)
