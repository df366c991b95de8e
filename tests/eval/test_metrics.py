"""Each metric on rows whose score is known by hand."""

import pytest

from finetune.eval.metrics import METRICS, repetition

ROWS = [
    ("exact_match", " yes\n", "yes", 1.0),
    ("exact_match", "yes.", "yes", 0.0),
    ("token_f1", "the cat sat", "A cat sat down", 2 * 2 / 5),
    ("token_f1", "", "", 1.0),
    ("token_f1", "", "word", 0.0),
    ("rouge_l", "police killed the gunman", "police kill the gunman", 0.75),
    ("rouge_l", "gunman the killed police", "police killed the gunman", 0.25),
    ("json_valid", '{"a": 1}', "", 1.0),
    ("json_valid", '{"a": 1', "", 0.0),
    ("json_fields", '{"a": 1, "b": 2, "c": 3}', '{"a": 1, "b": 3}', 0.5),
    ("json_fields", '{"a": {"x": 1, "y": 0}}', '{"a": {"x": 1, "y": 2}}', 0.5),
    ("json_fields", '{"a": true}', '{"a": 1}', 0.0),
    ("json_fields", "{}", "{}", 1.0),
    ("json_fields", "not json", '{"a": 1}', 0.0),
    ("json_exact", '{"b": [1, 2], "a": null}', '{"a": null, "b": [1, 2]}', 1.0),
    ("json_exact", '{"a": 1, "b": 2}', '{"a": 1}', 0.0),
    ("number", "so 3 + 4 = 7", "#### 7", 1.0),
    ("number", "it is 1,234.50 dollars", "... #### 1234.5", 1.0),
    ("number", "#### 5 apples of 9", "#### 5", 1.0),
    ("number", "none", "#### 5", 0.0),
    ("label", '"Card_Arrival".', "card_arrival", 1.0),
    ("label", "refund\nbecause", "refund", 1.0),
    ("label", "", "refund", 0.0),
]


@pytest.mark.parametrize(("metric", "answer", "reference", "score"), ROWS)
def test_metric_scores_what_a_reader_would(metric: str, answer: str, reference: str, score: float) -> None:
    assert METRICS[metric](answer, reference) == pytest.approx(score)


def test_deeply_nested_answer_is_no_json_rather_than_a_crash() -> None:
    assert METRICS["json_valid"]("[" * 200_000, "") == 0.0


def test_loop_repeats_and_fresh_text_does_not() -> None:
    assert repetition(list(range(20))) == 0.0
    assert repetition([1, 2] * 20) > 0.9
    assert repetition([1]) == 0.0
