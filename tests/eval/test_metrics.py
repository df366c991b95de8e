"""Each metric on rows whose score is known by hand."""

import unicodedata
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import EvalError
from finetune.eval.metrics import METRICS, pass_at_k, prepare_rows, repetition
from finetune.inference.chat import without_thought

ROWS = [
    ("exact_match", " yes\n", "yes", 1.0),
    ("exact_match", "yes.", "yes", 0.0),
    ("token_f1", "the cat sat", "A cat sat down", 2 * 2 / 5),
    ("token_f1", "", "", 0.0),
    ("token_f1", "!!!", "???", 0.0),
    ("token_f1", "我吃苹果。", "我吃梨。", 2 * 2 / 7),
    ("rouge_1", "!!!", "???", 0.0),
    ("rouge_2", "yes", "no", 0.0),
    ("rouge_l", "!!!", "???", 0.0),
    ("code_valid", "", "x", 0.0),
    ("code_valid", "# nothing", "x", 0.0),
    ("label", "-1", "1", 0.0),
    ("label", "C++", "C", 0.0),
    ("label", "?", "!", 0.0),
    ("label", "「正确」。", "正确", 1.0),
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
    ("json_exact", "[" * 900 + "]" * 900, "[" * 900 + "]" * 900, 1.0),
    ("json_fields", '{"a": ' * 900 + "1" + "}" * 900, '{"a": ' * 900 + "2" + "}" * 900, 0.0),
    ("json_valid", "[" * 100_000, "[" * 100_000, 0.0),
    ("number", "so 3 + 4 = 7", "#### 7", 1.0),
    ("number", "it is 1,234.50 dollars", "... #### 1234.5", 1.0),
    ("number", "#### 5 apples of 9", "#### 5", 1.0),
    ("number", "none", "#### 5", 0.0),
    ("label", '"Card_Arrival".', "card_arrival", 1.0),
    ("label", "refund\nbecause", "refund", 1.0),
    ("label", "", "refund", 0.0),
    ("number_given", "about 12 of them", "#### 5", 1.0),
    ("number_given", "a dozen", "#### 5", 0.0),
    ("code_valid", "Here it is:\n```python\ndef f():\n    return 1\n```\nDone.", "", 1.0),
    ("code_valid", "Here it is: f returns 1", "", 0.0),
]
ROUGE = [
    ("police killed the gunman", "police kill the gunman", 0.75, 0.333333, 0.75),
    (
        "The quick brown fox jumps over the lazy dog.",
        "A quick brown fox jumped over the lazy dog!",
        0.777778,
        0.625,
        0.777778,
    ),
    (
        "It's 3.5 km (about two miles) to the snake_case river-bank.",
        "It is 3.5 km - about 2 miles - to the snake case river bank",
        0.857143,
        0.692308,
        0.857143,
    ),
    ("the the the the", "the cat sat on the mat", 0.4, 0.0, 0.4),
    ("a b c a b c", "c b a c b a", 1.0, 0.0, 0.5),
    ("word", "other words", 0.0, 0.0, 0.0),
    ("", "word", 0.0, 0.0, 0.0),
]
"""rouge1, rouge2 and rougeL F-measures of rouge-score 0.1.2, ``use_stemmer=False``, to six digits."""


@pytest.mark.parametrize(("metric", "answer", "reference", "score"), ROWS)
def test_metric_scores_what_a_reader_would(metric: str, answer: str, reference: str, score: float) -> None:
    assert judged(metric, answer, reference=reference) == pytest.approx(score)


@pytest.mark.parametrize(("answer", "reference", "one", "two", "longest"), ROUGE)
def test_rouge_is_that_of_the_package(answer: str, reference: str, one: float, two: float, longest: float) -> None:
    found = [judged(metric, answer, reference=reference) for metric in ("rouge_1", "rouge_2", "rouge_l")]
    assert found == pytest.approx([one, two, longest], abs=1e-6)


def test_rouge_keeps_letters_that_are_not_english() -> None:
    assert judged("rouge_1", "Käse über Brot", reference="käse ueber brot") == pytest.approx(2 / 3)


def test_known_label_is_one_of_the_held_out_answers(heldout: Any) -> None:
    rows: list[dict[str, Any]] = [{"row": 0, "reference": "x"}]
    prepare_rows(rows, ["label_known"], heldout.folder / "heldout")
    assert len(rows[0]["classes"]) == 10
    assert METRICS["label_known"]('{"intent": "alarm", "time": "03:00"}', rows[0]) == 1.0
    assert METRICS["label_known"]('{"intent": "alarm", "time": "17:00"}', rows[0]) == 0.0


def test_code_passes_when_the_rows_tests_do() -> None:
    answer = "Sure:\n```python\ndef twice(x):\n    return 2 * x\n```"
    assert judged("pass_at_1", answer, tests="assert twice(4) == 8") == 1.0
    assert judged("pass_at_1", answer, tests="assert twice(4) == 9") == 0.0
    assert judged("pass_at_1", "def twice(x): return 2 * x", tests="assert twice(4) == 8") == 1.0


def test_code_without_tests_is_refused_before_anything_is_written() -> None:
    rows = [{"row": 7, "reference": "x", "tests": "assert True"}, {"row": 9, "reference": "y", "tests": None}]
    with pytest.raises(
        EvalError, match=r"pass_at_1 needs 'tests' in every held-out row, and 1 have none \(the first is row 9\)"
    ):
        prepare_rows(rows, ["pass_at_1"], Path("unread"))


@pytest.mark.parametrize(
    ("samples", "passed", "k", "chance"),
    [(1, 1, 1, 1.0), (10, 3, 1, 0.3), (5, 2, 2, 1 - 3 / 10), (200, 199, 10, 1.0), (4, 0, 3, 0.0)],
)
def test_pass_at_k_is_the_chance_that_one_of_k_drawn_samples_passed(
    samples: int, passed: int, k: int, chance: float
) -> None:
    assert pass_at_k(samples, passed, k) == pytest.approx(chance)


def test_deeply_nested_answer_is_no_json_rather_than_a_crash() -> None:
    assert judged("json_valid", "[" * 200_000, reference="") == 0.0
    assert judged("code_valid", "(" * 200_000, reference="") == 0.0


def test_loop_repeats_and_fresh_text_does_not() -> None:
    assert repetition(list(range(20))) == 0.0
    assert repetition([1, 2] * 20) > 0.9
    assert repetition([1]) == 0.0


def judged(metric: str, answer: str, **row: Any) -> float:
    return METRICS[metric](answer, row)


@pytest.mark.parametrize(
    "text", ["yes", "<think>\nIs it?\n</think>\n\nyes", "Is it?\n</think>\n\nyes", "<think>\n\n</think>\n\nyes"]
)
def test_answers_are_scored_without_their_thoughts(text: str) -> None:
    assert without_thought(text) == "yes"


SCRIPTS = {
    "English": ("The cat sat on the mat, twice.", "A cat sat twice on a mat!", "13a"),
    "German": ("Die Katze saß über dem Bach.", "Über dem Bach saß eine Katze.", "intl"),
    "Russian": ("Кошка сидела на ковре, мама.", "Мама, кошка на ковре сидела!", "intl"),
    "Greek": ("Η γάτα κάθισε στο χαλί.", "Στο χαλί κάθισε μια γάτα.", "intl"),
    "Arabic": ("جلست القطة على السجادة.", "القطة جلست على السجادة", "intl"),
    "Hindi": ("बिल्ली चटाई पर बैठी है।", "चटाई पर बिल्ली बैठी थी।", "intl"),
    "Korean": ("고양이가 매트 위에 앉았다.", "고양이가 매트 위에 있다.", "intl"),
    "Chinese": ("猫坐在垫子上，看iPhone。", "一只猫坐在垫子上。", "zh"),
    "Japanese": ("ねこはスーパーにいる。", "ねこがスーパーにいた。", "char"),
    "Thai": ("แมวนั่งบนเสื่อ", "แมวนอนบนเสื่อ", "char"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_rouge_is_that_of_the_package_with_the_words_of_sacrebleu(script: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import _get_tokenizer

    answer, reference, name = SCRIPTS[script]
    tokenizer = _get_tokenizer(name)()

    class Words:
        def tokenize(self, text: str) -> list[str]:
            return [word for word in tokenizer(text.lower()).split() if any(map(str.isalnum, word))]

    if name == "char":  # sacrebleu also splits off marks, which are no words of their own
        Words.tokenize = lambda self, text: [c for c in tokenizer(text).split() if unicodedata.category(c)[0] in "LMN"]
    expected = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Words()).score(reference, answer)
    found = {kind: judged(metric, answer, reference=reference) for kind, metric in ROUGE_NAMES.items()}
    assert found == pytest.approx({kind: score.fmeasure for kind, score in expected.items()})
    assert 0 < found["rouge2"] < 1


@pytest.mark.parametrize("text", ["", "!!!", "😀", "yes"])
def test_rouge_of_texts_with_few_words_is_that_of_the_package(text: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    expected = RougeScorer(list(ROUGE_NAMES)).score(text, text)
    found = {kind: judged(metric, text, reference=text) for kind, metric in ROUGE_NAMES.items()}
    assert found == {kind: score.fmeasure for kind, score in expected.items()}


ROUGE_NAMES = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}
