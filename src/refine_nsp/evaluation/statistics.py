"""Means with their uncertainty, and paired comparisons: bootstrap intervals and a sign-flip test, seeded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
TWO_SIDED_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Estimate:
    """A mean over n examples: standard error (0 with one example) and 95 % bootstrap interval (percentile)."""

    mean: float
    stderr: float
    low: float
    high: float
    n: int


def estimate(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> Estimate:
    """Mean of values, weighted where examples count differently (tokens of a document). The examples are what is resampled."""
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    n, mean = len(x), float((w * x).sum() / w.sum())
    if n == 1:
        return Estimate(mean, 0.0, mean, mean, 1)
    # Of a ratio of sums; with equal weights it is the usual standard deviation / sqrt(n).
    stderr = float(np.sqrt(n / (n - 1) * np.square(w * (x - mean)).sum()) / w.sum())
    rows = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    means = (w[rows] * x[rows]).sum(1) / w[rows].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(mean, stderr, float(low), float(high), n)


def t_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean of a few differences (one a seed) and half the width of its 95 % t-interval, nan with one."""
    x = np.asarray(differences, dtype=np.float64)
    n = len(x)
    half = TWO_SIDED_95.get(n - 1, 1.96) * float(x.std(ddof=1)) / n**0.5 if n > 1 else float("nan")
    return float(x.mean()), half


@dataclass(frozen=True)
class Comparison:
    """b - a over the same n examples: mean, 95 % bootstrap interval, two-sided p of the sign-flip test, examples won and lost."""

    difference: float
    low: float
    high: float
    p_value: float
    won: int
    lost: int
    n: int


def compare_pairs(a: Sequence[float], b: Sequence[float], seed: int = 0, flips: int = 10_000) -> Comparison:
    """Paired comparison. Under the null hypothesis the sign of each difference is a coin toss; p counts the observed assignment,
    so it is never 0."""
    d = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    difference = estimate(d.tolist(), seed=seed)
    rng, moved = np.random.default_rng(seed), d[d != 0]
    reached, done = 0, 0
    while done < flips and len(moved):
        block = min(flips - done, max(1, 2_000_000 // len(moved)))
        sums = rng.choice((-1.0, 1.0), (block, len(moved))) @ moved
        reached += int((np.abs(sums) >= abs(moved.sum()) - 1e-12).sum())
        done += block
    p = (reached + 1) / (done + 1) if done else 1.0
    return Comparison(difference.mean, difference.low, difference.high, p, int((d > 0).sum()), int((d < 0).sum()), len(d))
