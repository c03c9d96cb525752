"""Measure how often 95 % intervals of few examples cover the truth: ours, and percentiles of resampled means (docs/evaluation.md).

python benchmarks/interval_coverage.py --draws 3000
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from refine_nsp.evaluation.statistics import estimate

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Array]

KINDS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "right, p = .3": (lambda rng, n: (rng.random(n) < 0.3).astype(float), 0.3),
    "right, p = .9": (lambda rng, n: (rng.random(n) < 0.9).astype(float), 0.9),
    "share of 4, p = .3": (lambda rng, n: rng.binomial(4, 0.3, n) / 4, 0.3),
    "exponential": (lambda rng, n: rng.exponential(size=n), 1.0),
}


def percentiles(rng: np.random.Generator, x: Array, w: Array, resamples: int = 1000) -> tuple[float, float]:
    """Compute the interval of resampled (weighted) means."""
    rows = rng.integers(0, len(x), (resamples, len(x)))
    low, high = np.percentile((w[rows] * x[rows]).sum(1) / w[rows].sum(1), [2.5, 97.5])
    return float(low), float(high)


def coverage(draw: Draw, truth: float, n: int, draws: int, weighted: bool = False) -> tuple[float, float]:
    """Return the shares of draws of n examples whose intervals hold the truth, for our intervals and for percentiles."""
    rng, ours, theirs = np.random.default_rng(0), 0, 0
    for _ in range(draws):
        x, w = draw(rng, n), rng.lognormal(size=n) if weighted else np.ones(n)
        e = estimate(x.tolist(), w.tolist())
        low, high = percentiles(rng, x, w)
        ours, theirs = ours + (e.low <= truth <= e.high), theirs + (low <= truth <= high)
    return ours / draws, theirs / draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=3000)
    draws = parser.parse_args().draws
    for name, (draw, truth) in KINDS.items():
        print(name, *(f"n={n}: {a:.3f} ({b:.3f})" for n in (5, 10) for a, b in [coverage(draw, truth, n, draws)]), sep="  ")
    normal = KINDS["normal"][0]
    print(
        "weighted", *(f"n={n}: {a:.3f} ({b:.3f})" for n in (5, 10) for a, b in [coverage(normal, 0.0, n, draws, True)]), sep="  "
    )


if __name__ == "__main__":
    main()
