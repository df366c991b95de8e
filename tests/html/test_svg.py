import pytest

from finetune.html.svg import Scale, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 2.6, [0, 1, 2, 3]), (0, 130, [0, 50, 100, 150]), (-0.2, 0.9, [-0.5, 0, 0.5, 1]), (0, 0, [0, 1])],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, expected: list[float]) -> None:
    values = ticks(low, high, wanted=3)
    assert values[0] <= low
    assert values[-1] >= high
    if high > low:
        assert values == expected


def test_log_scale_spaces_decades_evenly() -> None:
    scale = Scale(low=1e-4, high=1, start=0, end=400, log=True)
    assert [scale(value) for value in (1e-4, 1e-3, 1e-2, 1)] == [0, 100, 200, 400]
