import pytest

from finetune.html.format import duration, interval, number, signed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (13.63, "13.6"),
        (0, "0"),
        (207_000_000.4, "207,000,000"),
        (0.000081, "0.000081"),
        (3e-9, "3.0e-09"),
        (0.0412, "0.0412"),
        (None, "–"),
    ],
)
def test_numbers_keep_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_durations_and_differences_read_as_words() -> None:
    assert [duration(seconds) for seconds in (3.21, 45, 252, 7380)] == ["3.2 s", "45 s", "4 min 12 s", "2 h 3 min"]
    assert signed(-0.006, share=True) == "−0.6 points"
    assert interval({"low": 0.541, "high": 0.706}, share=True) == "54.1 to 70.6 %"
