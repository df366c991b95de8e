"""Suspicious data are named before anybody trains on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.data.shingles import shingles, signatures
from finetune.products import PreparedData
from tests.data.helpers import checks, pair, write_jsonl

WORDS = [
    "river",
    "stone",
    "cloud",
    "lamp",
    "paper",
    "green",
    "seven",
    "quick",
    "train",
    "house",
    "water",
    "glass",
    "north",
    "bread",
    "music",
]


def sentence(number: int, words: int = 40) -> str:
    generator = np.random.default_rng(number)
    return " ".join(generator.choice(WORDS, words))


def different(count: int) -> list[dict[str, str]]:
    return [pair(sentence(number), sentence(number + 1000)) for number in range(count)]


def only(product: PreparedData) -> str:
    (warning,) = product.warnings
    return warning


def test_clean_rows_raise_no_warning(run: Callable[..., PreparedData]) -> None:
    strict = checks(
        near_duplicate_share=0.0,
        overlap_rows_share=0.0,
        control_character_share=0.0,
        secret_share=0.0,
        email_share=0.0,
        largest_label_share=0.5,
    )
    assert run(different(30), checks=strict, heldout_rows=5, max_tokens=512).warnings == []


def test_near_duplicates_are_estimated(run: Callable[..., PreparedData]) -> None:
    rows = different(20)
    near = [pair(row["prompt"] + " indeed", row["completion"]) for row in rows[:10]]
    warning = only(run(rows + near, checks=checks(near_duplicate_share=0.05), max_tokens=512))
    assert "about 33% of the training documents nearly repeat" in warning


def test_training_rows_that_share_long_stretches_with_held_out_ones_are_named(
    run: Callable[..., PreparedData], tmp_path: Path
) -> None:
    rows = different(20)
    held = write_jsonl(
        tmp_path / "held.jsonl", [pair(rows[3]["prompt"] + " truly", rows[3]["completion"]), *different(60)[50:]]
    )
    warning = only(run(rows, heldout_path=str(held), checks=checks(overlap_rows_share=0.0), max_tokens=512))
    assert "1 training document shares at least 50% of the 13-grams with held-out rows (why=3)" in warning


@pytest.mark.parametrize(
    ("text", "what", "threshold"),
    [
        ("write to jane.doe@example.org now", "e-mail addresses", "email_share"),
        ("the key is AKIAABCDEFGHIJKLMNOP", "likely secrets", "secret_share"),
        ("password: hunter2hunter2", "likely secrets", "secret_share"),
        ("a zero\u200bwidth space", "control characters", "control_character_share"),
        ("a bell \x07", "control characters", "control_character_share"),
    ],
)
def test_sensitive_text_is_counted_but_not_printed(
    text: str, what: str, threshold: str, run: Callable[..., PreparedData], capsys: Any
) -> None:
    warning = only(run([pair("q", text)], checks=checks(**{threshold: 0.0})))
    assert f"1 row (100.0%) contains {what}" in warning
    assert text not in capsys.readouterr().out


def test_one_answer_for_most_rows_is_named(run: Callable[..., PreparedData]) -> None:
    rows = [pair(f"q {number}", "yes" if number % 5 else "no") for number in range(50)]
    assert "one of 2 different answers makes up 80% of the rows" in only(
        run(rows, checks=checks(largest_label_share=0.5))
    )


def test_long_prompts_with_short_answers_are_named(run: Callable[..., PreparedData]) -> None:
    assert "of the tokens are trained on" in only(
        run([pair("word " * 50, "a")], checks=checks(smallest_trained_share=0.1), max_tokens=512)
    )


def test_padding_that_ends_a_turn_is_named(run: Callable[..., PreparedData], tokenizer: Any) -> None:
    import copy

    padded = copy.deepcopy(tokenizer)
    padded.pad_token = padded.eos_token
    assert "the padding token is <|im_end|>, which also ends a turn" in only(run([pair()], with_tokenizer=padded))


def test_padding_that_ends_a_turn_does_not_touch_the_mask(run: Callable[..., PreparedData], tokenizer: Any) -> None:
    import copy

    padded = copy.deepcopy(tokenizer)
    padded.pad_token = padded.eos_token
    assert run([pair()], with_tokenizer=padded).trained_tokens == run([pair()]).trained_tokens


def test_shingles_do_not_depend_on_their_surroundings() -> None:
    ids = np.arange(40, dtype=np.int32)
    separate, _ = shingles(ids[10:30], np.array([20]), 5)
    among, counts = shingles(ids, np.array([10, 20, 10]), 5)
    assert counts.tolist() == [6, 16, 6]
    assert among[6:22].tolist() == separate.tolist()


def test_signatures_agree_about_as_often_as_sets_overlap() -> None:
    generator = np.random.default_rng(0)
    agreement = []
    for _ in range(200):
        base = generator.integers(0, 5000, 104)
        other = base.copy()
        other[50:52] = generator.integers(5000, 6000, 2)
        both = signatures(np.concatenate([[7], base, [9], other]).astype(np.int32), np.array([105, 105]))
        agreement.append((both[0] == both[1]).mean())
    assert np.mean(agreement) == pytest.approx(94 / 106, abs=0.03)  # 6 of 100 n-grams differ on each side


def test_preview_redacts_secrets_and_addresses(run: Callable[..., PreparedData]) -> None:
    page = (run([pair("q", "mail jane.doe@example.org, password: hunter2hunter2")]).folder / "preview.html").read_text()
    assert "mail [e-mail address], [likely secret]" in page
    assert "hunter2" not in page


def test_few_held_out_rows_do_not_overlap_by_the_system_message_alone(run: Callable[..., PreparedData]) -> None:
    rows = [pair(f"q{number}", f"a{number}") for number in range(40)]
    system = "You are a helpful assistant who answers every question in one short word and never more."
    assert run(rows, system=system, heldout_rows=1, checks=checks(overlap_rows_share=0.0)).warnings == []


def test_system_message_does_not_make_rows_near_duplicates(run: Callable[..., PreparedData]) -> None:
    same = (
        "please tell me what the weather will be like tomorrow in the small town by the lake "
        "where my old aunt lives with her two dogs"
    )
    rows = [
        pair(f"{number * 7919} and {number * 104729}: {same}", f"{number * 31337} degrees") for number in range(1, 41)
    ]
    system = " ".join(f"Rule {number} is to be polite." for number in range(30))
    assert run(rows, system=system, checks=checks(near_duplicate_share=0.0), max_tokens=1024).warnings == []
