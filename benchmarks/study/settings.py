"""Define the sizes, arms and grids of the study. Every other choice is made by `trial` jobs on sets that are not reported on."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

BASES = {
    "DeltaNet": "refine-nsp/tiny-delta-net",
    "Gated DeltaNet": "refine-nsp/tiny-gated-deltanet",
    "LaCT": "refine-nsp/tiny-lact",
}
MAIN = "DeltaNet"  # all arms, trials, post-training and test time; the others run the arms of the primary test
SPAN = 4  # of the local windows, in all arms that use context scores, so that these are computed once


@dataclass(frozen=True)
class Arm:
    """settings: of a ReFINEConfig. grid: what is chosen on the choosing set, `TRIALS` combinations. phase: a control of `controls.py`."""

    settings: dict[str, Any]
    grid: dict[str, tuple[float, ...]]
    phase: str | None = None

    @property
    def trials(self) -> list[dict[str, float]]:
        """List every combination of the grid."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


RATES = (1e-4, 2e-4)
TRIALS = 6  # of every arm


def _arm(lambdas: tuple[float, ...], **settings: Any) -> Arm:
    return Arm(settings, {"learning_rate": RATES, "lambda_rl": lambdas})


def _scored(lambdas: tuple[float, ...], **settings: Any) -> Arm:
    """Define an arm by context scores of the untouched base."""
    return _arm(lambdas, local_span=SPAN, context_scores="cached", **settings)


NTP, SAME_TIME, EXPECTED, CE = "NTP", "NTP, same wall time", "expected, K 3", "CE at the same weights"
ARMS: dict[str, Arm] = {
    NTP: Arm({"objective": "ntp"}, {"learning_rate": (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3)}),
    "paper": _arm((0.1, 0.2, 0.5), preset="mid_training"),
    "context, N 8": _scored((0.3, 1.0, 3.0), preset="context"),
    "expected, selected positions": _arm((0.3, 1.0, 3.0), preset="expected", token_weights="selected", local_span=2),
    "expected, K 1": _scored((2.0, 4.0, 8.0), preset="expected", rollout_length=1),
    EXPECTED: _scored((2.0, 4.0, 8.0), preset="expected", rollout_length=3),
    "expected, K 5": _scored((2.0, 4.0, 8.0), preset="expected", rollout_length=5),
    CE: _scored((10.0, 30.0, 100.0), preset="likelihood"),
    "LongCE": Arm(
        {"preset": "likelihood", "token_weights": "context_gain", "local_span": SPAN, "context_scores": "cached"},
        {"learning_rate": RATES, "gamma": (2.0, 5.0, 10.0)},
        "long_ce",
    ),
}
PRIMARY = (NTP, CE, EXPECTED)
SHARPENED = (NTP, CE)  # also measured at the temperature that gives their text the entropy of EXPECTED

# Post-training and test-time training: settings of the phases' configurations.
POST: dict[str, dict[str, Any]] = {
    "SFT": {"objective": "none"},
    "Nested SFT": {"objective": "ntp"},
    "Nested ReFINE": {"objective": "refine", "preset": "post_training"},
    "Nested expected": {"objective": "refine", "preset": "expected"},
}
# What follows which mid-training (the control only by what is best after the others), and test time follows every outcome of STARTS.
STARTS = (NTP, EXPECTED)
POST_AFTER: dict[str, tuple[str, ...]] = {NTP: tuple(POST), CE: ("SFT",), EXPECTED: tuple(POST)}
TEST_TIME: dict[str, dict[str, Any]] = {
    "NTP": {"objective": "ntp"},
    "ReFINE": {"objective": "refine", "preset": "test_time"},
    "expected": {"objective": "refine", "preset": "expected"},
}
# Of the rows mid-training reads, by family of generated documents; the other half is plain text.
SHARES = {"facts": 0.05, "needles": 0.2, "listing": 0.1, "chains": 0.075, "paragraphs": 0.075}
TEMPERATURES = (1.0, 0.85, 0.7)
TEXT_LIMIT = 0.02  # nats: a trial that costs more text loss than NTP's best is not chosen
FAR_SHARE = 0.05


@dataclass(frozen=True)
class Scale:
    """Hold the counts of one run of the study; lengths are in tokens."""

    seeds: int = 5  # of the arms of the primary test
    other_seeds: int = 3  # of the other arms
    mid_steps: int = 400
    mid_rows: int = 4
    mid_length: int = 2048
    trial_steps: int = 100
    text_windows: int = 16
    novel_windows: int = 16
    novel_length: int = 4096
    ruler_lengths: tuple[int, ...] = (1024, 2048, 4096)
    ruler_prompts: int = 16
    probe_lengths: tuple[int, ...] = (1024, 2048)
    probes: int = 16
    post_seeds: int = 3
    post_steps: int = 32
    post_prompts: int = 8
    post_length: int = 1024
    post_learning_rate: float = 3e-4
    qa_lengths: tuple[int, ...] = (1024, 2048)
    qa_prompts: int = 64
    test_time_prompts: int = 24
    test_time_learning_rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    bf16: bool = True  # of matrix products in training, for all arms
    families: tuple[str, ...] = field(default=tuple(BASES))


SCALES = {
    "medium": Scale(),
    "small": Scale(
        seeds=3, mid_steps=48, mid_length=512, trial_steps=24, text_windows=32, novel_windows=8, novel_length=1024,
        ruler_lengths=(512, 1024), ruler_prompts=8, probe_lengths=(512, 1024), post_length=512, qa_lengths=(512, 1024),
    ),
    # Minutes, to see that everything runs; its figures mean nothing.
    "smoke": Scale(
        seeds=2, other_seeds=2, mid_steps=2, mid_length=256, trial_steps=1, text_windows=2, novel_windows=2, novel_length=256,
        ruler_lengths=(1024,), ruler_prompts=1, probe_lengths=(256,), probes=2, post_seeds=2, post_steps=2, post_prompts=2, post_length=256,
        qa_lengths=(256,), qa_prompts=4, test_time_prompts=2, test_time_learning_rates=(1e-4,), families=("DeltaNet", "LaCT"),
    ),
}  # fmt: skip
