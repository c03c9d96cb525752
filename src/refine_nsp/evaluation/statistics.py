"""Estimate means with their uncertainty, and compare runs in pairs, for few examples as well as for many.

An interval of 5 or 10 examples has to cover the truth as often as it says. So none is a percentile of resampled means, which cover it in
.82 and .89 of cases there (normal data): shares of right and wrong take Clopper and Pearson's interval, everything else Student's t. Where
examples count differently (documents by their tokens), the mean is a ratio of sums. Its standard error is the jackknife's, and its degrees
of freedom are those of as many equal examples as would be as uncertain (Kish's effective number).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from refine_nsp.errors import RefineError

Bounds = tuple[float, float]
Array = NDArray[np.float64]

ALPHA = 0.05  # every interval of this module is two-sided, at 95 %
UNBOUNDED = (-math.inf, math.inf)
EXACT_PAIRS = 16  # up to so many pairs, every assignment of signs is counted instead of sampled
# Figures that are shares of 1, and figures in nats. Bounds of any other figure (those of lm-eval's tasks) are read from its values.
SHARES = frozenset(
    "any_match fraction_match exact_match f1 rouge_l similarity accuracy sampled_accuracy acc acc_norm match_random "
    "match_high_entropy".split()
)
NATS = frozenset(("loss", "entropy", "log_p"))


@dataclass(frozen=True)
class Estimate:
    """Hold a mean over n examples, its standard error (0 with one example), and its 95 % interval (nan where so few do not tell it)."""

    mean: float
    stderr: float
    low: float
    high: float
    n: int


def bounds_of(figure: str) -> Bounds | None:
    """Return the least and the greatest value that a figure can have, by its name; None where the name does not say."""
    return (0.0, 1.0) if figure in SHARES else UNBOUNDED if figure in NATS else None


def t_quantile(degrees_of_freedom: float) -> float:
    """Return the two-sided 95 % quantile of Student's t, to the three decimals that tables print."""
    from scipy.special import stdtrit

    return round(float(stdtrit(degrees_of_freedom, 1 - ALPHA / 2)), 3)


def estimate(values: Sequence[float], weights: Sequence[float] | None = None, bounds: Bounds | None = None) -> Estimate:
    """Estimate a mean from examples, weighted where they count differently (the tokens of a document).

    `bounds`, the least and the greatest possible value, cut the interval. By default it is not cut, and values that all lie between 0 and 1
    are taken for shares. A RefineError says that there is no value, or not one positive weight for each.
    """
    x, w = _checked(values, weights)
    n, mean = len(x), float(w @ x / w.sum())
    stderr, effective = _jackknife(x, w, mean), float(w.sum() ** 2 / (w @ w))
    low, high = bounds or ((0.0, 1.0) if x.min() >= 0 and x.max() <= 1 else UNBOUNDED)
    if (low, high) == (0, 1) and np.isin(x, (0, 1)).all() and np.ptp(w) == 0:
        return Estimate(mean, stderr, *share_interval(int(x.sum()), n), n)
    if n == 1 or np.ptp(x) == 0:
        return Estimate(mean, stderr, *_interval_without_spread(mean, effective, (low, high)), n)
    half = t_quantile(max(1.0, effective - 1)) * stderr
    if bounds is None:
        low, high = UNBOUNDED
    return Estimate(mean, stderr, max(low, mean - half), min(high, mean + half), n)


def _checked(values: Sequence[float], weights: Sequence[float] | None) -> tuple[Array, Array]:
    x = np.asarray(values, dtype=np.float64)
    if len(x) == 0:
        raise RefineError("there is nothing to estimate: no example was given; expected at least one")
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != x.shape or not (w > 0).all():
        raise RefineError(f"weights must be a positive number for each of the {len(x)} values, got {np.round(w, 3).tolist()[:5]}")
    return x, w


def _jackknife(x: Array, w: Array, mean: float) -> float:
    """Compute the standard error of a weighted mean; with equal weights it is the standard deviation / sqrt(n)."""
    n = len(x)
    if n == 1:
        return 0.0
    moved = w * (x - mean) / (w.sum() - w)  # how far the mean moves when an example is left out
    return float(np.sqrt((n - 1) / n * (moved @ moved)))


def share_interval(right: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of which `right` of n examples were seen (Clopper and Pearson, 1934)."""
    from scipy.special import betaincinv

    low = float(betaincinv(right, n - right + 1, ALPHA / 2)) if right else 0.0
    high = float(betaincinv(right + 1, n - right, 1 - ALPHA / 2)) if right < n else 1.0
    return low, high


def _interval_without_spread(value: float, n: float, bounds: Bounds) -> tuple[float, float]:
    """Return the interval of a mean where all examples have one value, which says nothing about spread.

    Other values may make up to 1 - p of all, p^n = .025, without showing among n examples; they may be anything that is possible. At a
    bound this is Clopper and Pearson's interval. nan where anything is possible.
    """
    p = (ALPHA / 2) ** (1 / n)
    if not all(map(math.isfinite, bounds)):
        return math.nan, math.nan
    return p * value + (1 - p) * bounds[0], p * value + (1 - p) * bounds[1]


def t_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the mean of a few differences (one for each seed) and half the width of its 95 % t-interval, nan with one difference."""
    x, _ = _checked(differences, None)
    half = t_quantile(len(x) - 1) * float(x.std(ddof=1)) / len(x) ** 0.5 if len(x) > 1 else math.nan
    return float(x.mean()), half


@dataclass(frozen=True)
class Comparison:
    """Hold b - a over the same n examples, its 95 % interval, the two-sided p of the sign-flip test, and in how many b won and lost."""

    difference: float
    low: float
    high: float
    p_value: float
    won: int
    lost: int
    n: int


def compare_pairs(
    a: Sequence[float], b: Sequence[float], weights: Sequence[float] | None = None, bounds: Bounds | None = None,
    seed: int = 0, flips: int = 10_000,
) -> Comparison:  # fmt: skip
    """Compare two runs over the same examples; with weights, the difference is that of the weighted means.

    Under the null hypothesis the sign of each difference is a coin toss. Up to 16 pairs every assignment of signs is counted, beyond
    that `flips` are drawn; the observed one is among them, so p is never 0.

    `bounds` are the least and the greatest value of one run's figure, so that its differences are bounded too. A RefineError says that
    there is no pair, or that runs or weights are of different lengths.
    """
    if len(a) != len(b):
        raise RefineError(f"pairs need as many values in both runs, got {len(a)} and {len(b)}")
    d = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    width = bounds[1] - bounds[0] if bounds else math.inf
    e = estimate(d.tolist(), weights, (-width, width))
    moved = d if weights is None else d * np.asarray(weights, dtype=np.float64)
    p = _sign_flip_p(moved[moved != 0], seed, flips)
    return Comparison(e.mean, e.low, e.high, p, int((d > 0).sum()), int((d < 0).sum()), len(d))


def _sign_flip_p(moved: Array, seed: int, flips: int) -> float:
    """Return the share of the assignments of signs whose sum is as far from 0 as the observed one."""
    n = len(moved)
    bar = abs(moved.sum()) - 1e-9 * np.abs(moved).sum()  # sums that differ from the observed one by rounding alone count too
    if n <= EXACT_PAIRS:
        signs = 1.0 - 2.0 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
        return float((np.abs(signs @ moved) >= bar).mean())
    rng, reached, done = np.random.default_rng(seed), 0, 0
    while done < flips:
        block = min(flips - done, max(1, 2_000_000 // n))
        reached += int((np.abs(rng.choice((-1.0, 1.0), (block, n)) @ moved) >= bar).sum())
        done += block
    return (reached + 1) / (done + 1)
