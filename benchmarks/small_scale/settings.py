"""Sizes and arms of the study. Every choice that could be tuned is here, fixed before the reported sets were looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BASES = {"DeltaNet": "refine-nsp/tiny-delta-net", "LaCT": "refine-nsp/tiny-lact"}
OURS: dict[str, Any] = {"preset": "context"}
NTP, PAPER, CONTEXT = "NTP", "ReFINE, paper", "ReFINE, context_kl"
SAME_TIME, EXTRA = "NTP, same wall time", "NTP, extra CE at context_kl"

# Mid-training arms: settings of a ReFINEConfig. All see the same rows in the same order.
MID: dict[str, dict[str, Any]] = {
    NTP: {"objective": "ntp"},
    PAPER: {"preset": "mid_training"},
    "ReFINE, uniform": {**OURS, "selection": "uniform"},
    "ReFINE, entropy": {**OURS, "selection": "entropy"},
    "ReFINE, context_gain": {**OURS, "selection": "context_gain"},
    CONTEXT: OURS,
    EXTRA: OURS,
}
# Around the recommended preset (K 5, P 8, hybrid, context_kl), one setting changed at a time.
ABLATIONS: dict[str, dict[str, Any]] = {
    **{f"K = {k}": {**OURS, "rollout_length": k} for k in (1, 3, 7)},
    **{f"P = {p}": {**OURS, "positions_per_sequence": p} for p in (2, 4)},
    **{f"reward {r}": {**OURS, "reward_funcs": [r]} for r in ("cosine", "exact_match")},
    **{f"selection {s}": {**OURS, "selection": s} for s in ("argmax", "argmin")},
}
# Post-training goes on from two of the arms; test-time training from every outcome of that.
MID_OF_TABLE_4 = {"NTP": NTP, "ReFINE": CONTEXT}
POST = {"SFT": "none", "Nested SFT": "ntp", "Nested ReFINE": "refine"}
TEST_TIME = ("ntp", "refine")


@dataclass(frozen=True)
class Scale:
    """Counts of one run of the study; lengths in tokens."""

    seeds: int = 3
    mid_steps: int = 48
    mid_rows: int = 4
    mid_length: int = 512
    mid_learning_rate: float = 3e-4
    recall_share: float = 0.5
    curve_every: int = 12
    text_windows: int = 32
    needle_lengths: tuple[int, ...] = (256, 512, 1024)
    needles: int = 16
    needle_prompts: int = 32
    recall_prompts: int = 64
    post_steps: int = 32
    post_prompts: int = 8
    post_length: int = 512
    post_learning_rate: float = 3e-4
    qa_lengths: tuple[int, ...] = (512, 1024)
    qa_prompts: int = 64
    test_time_prompts: int = 24
    test_time_learning_rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)


SCALES = {
    "small": Scale(),
    # Minutes, to see that everything runs; its figures mean nothing.
    "smoke": Scale(
        seeds=2, mid_steps=2, mid_length=256, curve_every=1, text_windows=4, needle_lengths=(256,), needles=4, needle_prompts=4,
        recall_prompts=4, post_steps=2, post_prompts=2, post_length=256, qa_lengths=(256,), qa_prompts=4, test_time_prompts=2,
        test_time_learning_rates=(1e-4,),
    ),
}  # fmt: skip
