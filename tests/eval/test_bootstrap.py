"""Intervals cover what they should, and pairing makes them narrow."""

import numpy as np
import pytest

from finetune.inference.bootstrap import Bootstrap, Ratio, mean_of


def test_interval_covers_a_known_mean_about_nineteen_times_in_twenty() -> None:
    generator = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        found = Bootstrap(60, samples=300, seed=trial).level(mean_of(generator.normal(3.0, 2.0, size=60).tolist()))
        covered += found.low <= 3.0 <= found.high
    assert (
        180 <= covered <= 198
    )  # binomial(200, 0.95) is within 184-196 nineteen times in twenty; small samples cover a little less


def test_interval_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(0, 1, size=400)
    found = Bootstrap(400, samples=4000, seed=2).level(mean_of(values.tolist()))
    error = values.std() / 20
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_paired_difference_of_a_constant_shift_has_no_width() -> None:
    values = np.random.default_rng(1).normal(0, 5, size=50)
    found = Bootstrap(50, samples=200, seed=3).difference(mean_of(values.tolist()), mean_of((values + 1).tolist()))
    assert (found.difference, found.low, found.high) == pytest.approx((1, 1, 1))


def test_loss_weighs_every_token_the_same() -> None:
    figure = Ratio(totals=np.array([10.0, 1.0]), weights=np.array([5.0, 1.0]))
    assert figure.value == pytest.approx(11 / 6)


def test_row_without_tokens_does_not_break_the_interval() -> None:
    found = Bootstrap(2, samples=100, seed=1).level(Ratio(totals=np.array([0.0, 3.0]), weights=np.array([0.0, 2.0])))
    assert (found.value, found.low, found.high) == (1.5, 1.5, 1.5)


def test_same_seed_gives_the_same_interval_in_blocks_or_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = mean_of([float(n) for n in range(10)])
    at_once = Bootstrap(10, samples=100, seed=7).level(values)
    monkeypatch.setattr("finetune.inference.bootstrap.BLOCK_CELLS", 30)
    assert Bootstrap(10, samples=100, seed=7).level(values) == at_once
