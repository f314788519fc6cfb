"""Bootstrap intervals and Holm's correction, against closed forms and by hand."""

import numpy as np
import pytest

from xviz_jax.comparison import concentration
from xviz_jax.comparison.resampling import (
    Resamples,
    holm_levels,
    interval,
    p_value,
)

# The standard normal quantile of a 90% interval.
Z_90 = 1.6449


def test_the_spread_of_resampled_means_is_the_closed_form():
    random = np.random.default_rng(0)
    values = random.normal(size=80) ** 3
    means = Resamples.draw(80, 20_000, random).means(values)
    assert means.mean() == pytest.approx(values.mean(), abs=0.05)
    assert means.std() == pytest.approx(values.std() / np.sqrt(80), rel=0.02)
    low, high = interval(means, 0.9)
    half = Z_90 * values.std() / np.sqrt(80)
    assert high - low == pytest.approx(2 * half, rel=0.1)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    # The percentile interval of n normal values is Student's with z in place of t and
    # n in place of n - 1: its coverage is P(|t| < z sqrt((n - 1) / n)), 0.9398 here.
    random, n, trials = np.random.default_rng(1), 40, 2000
    resamples = Resamples.draw(n, 999, random)
    means = resamples.means(random.normal(size=(n, trials)))
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    covered = np.mean((low < 0) & (high > 0))
    assert covered == pytest.approx(0.9398, abs=3 * np.sqrt(0.94 * 0.06 / trials))


def test_pairs_stay_together():
    random = np.random.default_rng(2)
    common = 100 * random.normal(size=50)
    one, two = common + 1.0, common
    resamples = Resamples.draw(50, 500, random)
    difference = resamples.means(one) - resamples.means(two)
    np.testing.assert_allclose(difference, 1.0, rtol=1e-9)
    assert interval(resamples.means(one - two), 0.95) == pytest.approx((1.0, 1.0))


def test_what_is_not_a_number_is_in_no_mean():
    random = np.random.default_rng(3)
    values = np.array([[1.0, np.nan], [2.0, np.nan], [np.nan, np.nan]])
    means = Resamples.draw(3, 200, random).means(values)
    known = means[:, 0][np.isfinite(means[:, 0])]
    assert known.min() >= 1.0
    assert known.max() <= 2.0
    assert np.isnan(means[:, 1]).all()
    assert np.isnan(interval(means[:, 1], 0.95)).all()


def test_p_values():
    assert p_value(np.ones(99)) == 2 / 100
    assert p_value(-np.ones(99)) == 1.0
    assert p_value(np.array([-1.0] * 4 + [1.0] * 95)) == 2 * 5 / 100


def test_holm_by_hand():
    # 0.05 / 3, 0.05 / 2, and the third fails at 0.05 / 2 as well: all are judged on.
    levels = holm_levels(np.array([0.04, 0.001, 0.03]), 0.95)
    np.testing.assert_allclose(1 - levels, [0.025, 0.05 / 3, 0.025])
    # All pass: the last is judged at 0.05.
    levels = holm_levels(np.array([0.04, 0.001, 0.02]), 0.95)
    np.testing.assert_allclose(1 - levels, [0.05, 0.05 / 3, 0.025])
    # The first fails: none is judged more kindly.
    levels = holm_levels(np.array([0.04, 0.02]), 0.95)
    np.testing.assert_allclose(1 - levels, [0.05, 0.025])
    np.testing.assert_allclose(1 - holm_levels(np.array([0.5]), 0.95), [0.05])
    assert holm_levels(np.array([]), 0.95).shape == (0,)


def test_holm_holds_the_error_of_the_family():
    random, tests = np.random.default_rng(4), 8
    wrong = 0
    for _ in range(2000):
        p = random.uniform(size=tests)
        wrong += np.any(p <= 1 - holm_levels(p, 0.95))
    assert wrong / 2000 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)


def test_a_feature_is_raised_where_it_carries_one_slice_alone():
    random = np.random.default_rng(5)
    scores = random.uniform(0.5, 1.5, size=(60, 20))
    slice_ = np.arange(60) < 20
    members = {"odd": slice_, "rest": ~slice_}
    draws = {k: Resamples.draw(int(m.sum()), 400, random) for k, m in members.items()}
    ask = lambda s: concentration.raised(
        concentration.shares(s), members, draws, 0.95, 0.1, 4.0
    )
    assert ask(scores) == []
    marked = scores.copy()
    marked[slice_, 3] = -10.0
    (name, feature, share, elsewhere), *more = ask(marked)
    assert (name, feature, more) == ("odd", 3, [])
    # 10 beside 19 features of 1, and 1 in 20.
    assert share.estimate == pytest.approx(10 / 29, abs=0.02)
    assert elsewhere == pytest.approx(1 / 20, abs=0.005)
    # What carries all records marks none of them.
    everywhere = scores.copy()
    everywhere[:, 3] = 10.0
    assert ask(everywhere) == []


def test_shares_of_nothing_are_undefined():
    found = concentration.shares(np.array([[0.0, 0.0], [1.0, -3.0], [np.nan, 1.0]]))
    np.testing.assert_array_equal(found[1], [0.25, 0.75])
    assert np.isnan(found[[0, 2]]).all()
    np.testing.assert_array_equal(concentration.mean_shares(found), [0.25, 0.75])
