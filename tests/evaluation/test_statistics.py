"""Estimates, intervals and tests: textbook values, and how often they cover the truth with few examples."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from refine_nsp.errors import RefineError
from refine_nsp.evaluation.run import as_json, summarise
from refine_nsp.evaluation.statistics import UNBOUNDED, compare_pairs, estimate, share_interval, t_interval
from refine_nsp.evaluation.tasks import Row


def test_an_estimate_equals_the_textbook_s():
    x = np.random.default_rng(0).normal(2.0, 3.0, 400)
    e = estimate(x.tolist())
    assert e.mean == pytest.approx(x.mean()) and e.stderr == pytest.approx(x.std(ddof=1) / 20)
    assert (e.low, e.high) == pytest.approx(stats.t.interval(0.95, 399, x.mean(), x.std(ddof=1) / 20), rel=1e-4)
    assert estimate([1.0, 4.0], [3, 1]).mean == 1.75
    assert estimate([0.5]).stderr == 0


def test_a_share_has_clopper_and_pearsons_interval():
    for right, n in ((0, 5), (3, 10), (10, 10), (1, 1), (37, 100)):
        ci = stats.binomtest(right, n).proportion_ci(0.95, method="exact")
        assert share_interval(right, n) == pytest.approx((ci.low, ci.high))
        e = estimate([1.0] * right + [0.0] * (n - right))
        assert (e.low, e.high) == pytest.approx((ci.low, ci.high))


@pytest.mark.parametrize("n", [5, 10])
@pytest.mark.parametrize(
    ("draw", "mean", "least"),
    [
        (lambda rng, n: rng.normal(size=n), 0.0, 0.935),
        (lambda rng, n: (rng.random(n) < 0.3).astype(float), 0.3, 0.95),
        (lambda rng, n: (rng.random(n) < 0.9).astype(float), 0.9, 0.95),
        (lambda rng, n: rng.binomial(4, 0.3, n) / 4, 0.3, 0.92),  # shares of four references
        (lambda rng, n: rng.exponential(size=n), 1.0, 0.87),  # what any symmetric interval loses to skewness
    ],
)
def test_intervals_of_few_examples_cover_the_truth_as_often_as_they_say(n, draw, mean, least):
    """Resampled percentiles covered the mean of normal data in .82 and .89, of shares of .9 in .42 and .63 of cases."""
    rng = np.random.default_rng(1)
    found = [estimate(draw(rng, n).tolist()) for _ in range(1500)]
    covered = np.mean([e.low <= mean <= e.high for e in found])
    assert covered >= least, covered
    assert all(e.high > e.low for e in found)


def test_intervals_of_weighted_means_cover_the_truth():
    """Documents of very different lengths: the jackknife, with the degrees of freedom of as many equal ones."""
    rng, hits = np.random.default_rng(2), 0
    for _ in range(600):
        w = rng.lognormal(0, 1.5, 8)
        e = estimate(rng.normal(3.0, 1.0, 8).tolist(), w.tolist())
        hits += e.low <= 3.0 <= e.high
    assert 560 <= hits <= 595


def test_no_interval_has_zero_width_by_accident():
    for value in (0.0, 1.0, 0.5):
        for n in (1, 2, 5, 10):
            e = estimate([value] * n)
            assert e.low < e.high and e.low <= value <= e.high, (value, n)
    assert estimate([0.5] * 3, bounds=(0, 1)).high == pytest.approx(1 - 0.5 * 0.025 ** (1 / 3))
    # Losses: nothing says how far others may be.
    assert math.isnan(estimate([2.0, 2.0]).low) and math.isnan(estimate([0.5], bounds=UNBOUNDED).high)
    same = compare_pairs([1, 0, 1], [1, 0, 1], bounds=(0, 1))
    assert same.difference == 0 and same.low == -same.high < 0 and same.p_value == 1


def test_intervals_stay_within_what_is_possible():
    e = estimate([1.0, 1.0, 0.25], bounds=(0, 1))
    assert e.high == 1 and e.low >= 0


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ([], None, "nothing to estimate"),
        ([1.0, 2.0], [1.0], "weights must be a positive number for each of the 2 values"),
        ([1.0, 2.0], [1.0, 0.0], "weights must be a positive number"),
    ],
)
def test_what_cannot_be_estimated_is_refused(values, weights, message):
    with pytest.raises(RefineError, match=message):
        estimate(values, weights)
    with pytest.raises(RefineError, match=message):
        compare_pairs(values, values, weights)


def test_pairs_of_different_lengths_are_refused():
    with pytest.raises(RefineError, match="as many values in both runs, got 1 and 2"):
        compare_pairs([1.0], [1.0, 2.0])


@pytest.mark.parametrize("n", [2, 3, 10, 11, 20, 31, 101])
def test_t_intervals_have_the_quantile_of_their_degrees_of_freedom(n):
    x = np.random.default_rng(n).normal(size=n)
    mean, half = t_interval(x.tolist())
    assert mean == pytest.approx(x.mean())
    assert half == pytest.approx(round(stats.t.ppf(0.975, n - 1), 3) * x.std(ddof=1) / n**0.5)


# --- comparisons ------------------------------------------------------------------------------------------------------


def test_a_weighted_comparison_is_that_of_the_weighted_means():
    """Two documents of 10 and 1,000 targets: the long one decides."""
    a, b, weights = [3.0, 2.0], [2.0, 2.1], [10, 1000]
    found = compare_pairs(a, b, weights)
    assert found.difference == pytest.approx(estimate(b, weights).mean - estimate(a, weights).mean)
    assert found.difference == pytest.approx((-10 + 100) / 1010)
    assert found.low < 0 < found.high and (found.won, found.lost, found.n) == (1, 1, 2)
    assert found.p_value == 1  # of +-10 +-100 every sum is as far from 0 as 90


def test_the_interval_of_a_weighted_comparison_is_that_of_its_differences():
    rng = np.random.default_rng(3)
    a, b, w = rng.normal(size=12), rng.normal(size=12), rng.integers(1, 100, 12)
    found, d = compare_pairs(a.tolist(), b.tolist(), w.tolist()), estimate((b - a).tolist(), w.tolist())
    assert (found.difference, found.low, found.high) == pytest.approx((d.mean, d.low, d.high))
    even = compare_pairs(a.tolist(), b.tolist())
    assert (even.low, even.high) == pytest.approx(stats.ttest_rel(b, a).confidence_interval(0.95), rel=1e-3)


@pytest.mark.parametrize("weights", [None, [1, 5, 2, 40, 3]])
def test_sign_flip_test_counts_all_assignments_of_few_pairs(weights):
    a, b = [0.0, 0.0, 1.0, 0.0, 0.2], [1.0, 0.5, 0.6, 0.9, 0.4]
    d = (np.array(b) - np.array(a)) * (weights or 1)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1).T
    exact = (np.abs(signs @ d) >= abs(d.sum()) - 1e-12).mean()
    found = compare_pairs(a, b, weights)
    assert found.p_value == exact == compare_pairs(a, b, weights, seed=1).p_value
    assert (found.won, found.lost, found.n) == (4, 1, 5)
    assert compare_pairs([1, 0, 1], [1, 0, 1]).p_value == 1


def test_sampled_signs_agree_with_counted_ones(monkeypatch):
    rng = np.random.default_rng(4)
    a, b, w = rng.normal(size=14).tolist(), rng.normal(0.6, 1, 14).tolist(), rng.integers(1, 9, 14).tolist()
    counted = compare_pairs(a, b, w).p_value
    monkeypatch.setattr("refine_nsp.evaluation.statistics.EXACT_PAIRS", 0)
    assert compare_pairs(a, b, w, flips=40_000).p_value == pytest.approx(counted, abs=0.01)


@pytest.mark.parametrize("weighted", [False, True])
def test_p_values_are_uniform_under_the_null(weighted):
    rng = np.random.default_rng(2)
    p = [
        compare_pairs(
            rng.normal(size=20).tolist(),
            rng.normal(size=20).tolist(),
            rng.lognormal(size=20).tolist() if weighted else None,
            flips=500,
        ).p_value
        for _ in range(200)
    ]
    assert 2 <= sum(x < 0.05 for x in p) <= 22


def test_what_is_unknown_is_null_in_a_results_file():
    rows = [Row("ntp-0", "", [], {"loss": 2.0}, 9.0)]
    kept = json.loads(json.dumps(as_json(summarise("ntp", rows)), allow_nan=False))
    assert kept["estimates"]["loss"] == {"mean": 2.0, "stderr": 0.0, "low": None, "high": None, "n": 1}
