"""Fast forms against naive ones, and padding, over shapes, lengths, positions and settings that nobody chose (hypothesis).

Every property is tried on a few cases in each run of the tests, and on many by those marked `slow`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from refine_nsp.config import NSPConfig
from refine_nsp.nsp.module import ReFINEStep
from refine_nsp.nsp.records import Batch
from refine_nsp.nsp.selection import count_positions, select_positions
from refine_nsp.ops import linear_cross_entropy as ops
from refine_nsp.ops.delta_rule import delta_rule, naive_delta_rule
from refine_nsp.ops.lact import Tokens, lact, naive_lact
from refine_nsp.ops.lact_update import Triple, UpdateRule
from tests.models.families import ALL_VARIANTS, build
from tests.nsp.schedules import assert_same_gradients, assert_schedules_agree, gradients
from tests.settings import fitting

FEW, MANY = 30, 500
# The same cases on every machine: what fails once fails again.
COMMON: dict[str, Any] = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
# By the dtype of the inputs: of values, which are formed in float32 or better, and of gradients, which come back in that dtype.
TOLERANCES = {torch.float64: (1e-9, 1e-9), torch.float32: (2e-4, 2e-3), torch.bfloat16: (2e-4, 2e-2)}
dtypes, seeds, yes = st.sampled_from(list(TOLERANCES)), st.integers(0, 2**31), st.booleans()


def few_of(low: int, high: int, rows: int = 3) -> st.SearchStrategy[list[int]]:
    """One to three numbers."""
    return st.lists(st.integers(low, high), min_size=1, max_size=rows)


def assert_near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Within a share of the greatest entry, or of 1."""
    assert found.shape == wanted.shape and bool(found.isfinite().all())
    if wanted.numel():
        assert float((found.double() - wanted).detach().abs().max()) <= tolerance * max(1.0, float(wanted.detach().abs().max()))


def assert_same(fast: Callable, naive: Callable, inputs: dict[str, Tensor], dtype: torch.dtype, factor: float = 1.0) -> None:
    """Values, and gradients of a random cotangent, of `fast` in `dtype` and of `naive` on the same numbers in float64. factor: how much
    more than elsewhere rounding grows."""
    given_ = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    wide = {name: x.detach().double().requires_grad_() for name, x in given_.items()}
    found, wanted = fast(given_), naive(wide)
    cotangents = [torch.randn_like(x) for x in wanted]
    of_value, of_gradient = (factor * tolerance for tolerance in TOLERANCES[dtype])
    for a, b in zip(found, wanted, strict=True):
        assert_near(a, b, of_value)
    sums = [sum((x * c.to(x.dtype)).sum() for x, c in zip(xs, cotangents, strict=True)) for xs in (found, wanted)]
    ours, theirs = (
        torch.autograd.grad(total, list(xs.values()), allow_unused=True) for total, xs in zip(sums, (given_, wide), strict=True)
    )
    for a, b, x in zip(ours, theirs, wide.values(), strict=True):
        assert_near(torch.zeros_like(x) if a is None else a, torch.zeros_like(x) if b is None else b, of_gradient)


# --- operations -------------------------------------------------------------------------------------------------------


def delta_rule_is_its_definition(seed, sizes, T, heads, group, widths, gated, with_state, chunk, dtype) -> None:
    """Also at pads, and its state after any token of any row."""
    torch.manual_seed(seed)
    B, (Dk, Dv), HV = len(sizes), widths, heads * group
    lengths = torch.tensor([min(n, T) for n in sizes])
    real = (torch.arange(T) < lengths[:, None])[..., None]
    inputs = {
        "q": torch.randn(B, T, heads, Dk),
        "k": torch.nn.functional.normalize(torch.randn(B, T, heads, Dk), dim=-1) * 0.95,  # rounded, still no longer than 1
        "v": torch.randn(B, T, HV, Dv),
        "beta": 1.9 * torch.rand(B, T, HV),
    }
    inputs |= {"g": -3 * torch.rand(B, T, HV)} if gated else {}
    inputs |= {"state": torch.randn(B, HV, Dk, Dv)} if with_state else {}
    positions = torch.stack([torch.randint(-1, int(n), (3,)) if n else torch.full((3,), -1) for n in lengths])

    def arguments(x: dict[str, Tensor]) -> tuple:
        return x["q"], x["k"], x["v"], x["beta"] * real, x["g"] * real if gated else None, x.get("state")

    def fast(x: dict[str, Tensor]) -> list[Tensor]:
        o, states = delta_rule(*arguments(x), chunk_size=chunk, lengths=lengths)
        return [o * real[..., None], states.at(positions)]

    def naive(x: dict[str, Tensor]) -> list[Tensor]:
        *tokens, start = arguments(x)
        start = torch.zeros(B, HV, Dk, Dv, dtype=torch.float64) if start is None else start
        states = [start]
        for t in range(T):
            states.append(naive_delta_rule(*(None if z is None else z[:, t : t + 1] for z in tokens), states[-1])[1])
        rows = torch.arange(B)[:, None]
        return [naive_delta_rule(*tokens, start)[0] * real[..., None], torch.stack(states, 1)[rows, positions + 1]]

    assert_same(fast, naive, inputs, dtype)


def lact_is_its_definition(seed, before, sizes, chunk, momentum, muon, prenorm) -> None:
    """Rows that go on from states of any fill, each with a length of its own."""
    torch.manual_seed(seed)
    rows = min(len(before), len(sizes))
    seen, lengths, H, D, Dh = torch.tensor(before[:rows]), torch.tensor(sizes[:rows]), 2, 4, 3
    rule = UpdateRule(momentum, torch.float32 if muon else None, prenorm)
    inputs = {"w0": torch.randn(1, H, Dh, D), "w1": torch.randn(1, H, D, Dh), "w2": torch.randn(1, H, Dh, D)}
    for part, T in (("first", max(1, int(seen.max()))), ("then", max(1, int(lengths.max())))):
        inputs |= {f"{part} {name}": torch.randn(rows, H, T, D) for name in ("q", "k", "v")}
        inputs |= {f"{part} lr": torch.rand(rows, H, T, 3)}
        inputs |= {f"{part} momentum": torch.rand(rows, H, T, 1)} if momentum else {}
    T = inputs["then q"].shape[2]
    real = (torch.arange(T) < lengths[:, None])[:, None, :, None]

    def run(x: dict[str, Tensor], function: Callable) -> tuple[Tensor, Any]:
        first, then = (Tokens(*(x.get(f"{part} {name}") for name in ("k", "v", "lr", "momentum"))) for part in ("first", "then"))
        initial = Triple(x["w0"], x["w1"], x["w2"])
        state = lact(x["first q"], first, initial, rule, chunk)[1].at(seen[:, None] - 1)
        own = {name: z[:, 0] for name, z in state.items()}
        return function(x["then q"], then, initial, rule, chunk, own, seen, lengths)

    def naive(x: dict[str, Tensor]) -> list[Tensor]:
        o, states = run(x, naive_lact)
        return [o, *(z for state in states for z in state.values() if z.numel())]

    def fast(x: dict[str, Tensor]) -> list[Tensor]:
        o, states = run(x, lact)
        last, known = states.at(lengths[:, None] - 1), run(x, naive_lact)[1]
        # Behind a row's own open tokens there are zeros, as far as the row with most of them.
        own = [last[name][b : b + 1, 0] for b in range(rows) for name in known[b] if known[b][name].numel()]
        wanted = [z for state in known for z in state.values() if z.numel()]
        return [o * real, *(z[:, :, : w.shape[2]] if z.shape != w.shape else z for z, w in zip(own, wanted, strict=True))]

    # Newton-Schulz makes small singular values a thousand times larger, and a chunk of few tokens has none but rounding's.
    assert_same(fast, naive, inputs, torch.float64, 1e4 if muon else 1.0)


def cross_entropy_by_blocks_is_that_of_all_logits(seed, n, V, D, block, dtype) -> None:
    torch.manual_seed(seed)
    targets, weights = torch.randint(0, V, (n,)), torch.rand(n) * (torch.rand(n) < 0.8)
    inputs = {"hidden": torch.randn(n, D), "weight": torch.randn(V, D)}

    def by(function: Callable) -> Callable:
        def run(x: dict[str, Tensor]) -> list[Tensor]:
            loss, stats = function(x["hidden"], x["weight"], targets, weights.to(x["hidden"].dtype))
            return [loss, stats.nll, stats.entropy]

        return run

    with in_blocks(block):
        assert_same(by(ops.linear_cross_entropy), by(ops.naive_linear_cross_entropy), inputs, dtype)


def closed_form_by_blocks_is_that_of_all_logits(seed, n, V, D, block, K, order, local, part) -> None:
    torch.manual_seed(seed)
    targets, token_weights = torch.randint(0, V, (n,)), torch.rand(n).double()
    weights = torch.rand(n).double() * (torch.rand(n) < 0.8)
    weights[max(0, n - K) :] = 0.0
    other = torch.randn(n, D).double() if local else None
    term = ops.SequenceTerm(weights, K, order, other, local == "gain")
    inputs = {"hidden": torch.randn(n, D), "weight": torch.randn(V, D)}

    def by(function: Callable) -> Callable:
        def run(x: dict[str, Tensor]) -> list[Tensor]:
            losses, _ = function(x["hidden"], x["weight"], targets, token_weights, term, 0.7, 2.0)
            return [getattr(losses, part)]

        return run

    with in_blocks(block):
        assert_same(by(ops.linear_next_sequence), by(ops.naive_linear_next_sequence), inputs, torch.float64)


@contextmanager
def in_blocks(tokens: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "block_tokens", lambda vocabulary, device: tokens)
        yield


# --- the method -------------------------------------------------------------------------------------------------------


def positions_are_one_a_chunk(seed, sizes, P, K, min_prefix, draw) -> None:
    """Admissible tokens of their own chunk, -1 only where there is none, as many as counted; the greatest and the least as by hand."""
    torch.manual_seed(seed)
    config = NSPConfig(positions_per_sequence=P, rollout_length=K, min_prefix=min_prefix, draw=draw)
    B, T = len(sizes), max(sizes)
    batch, scores = Batch.of(torch.zeros(B, T, dtype=torch.long), torch.tensor(sizes)), torch.randn(B, T)
    chosen = select_positions(scores, batch, torch.rand(B, P, dtype=torch.float64), config)
    assert (chosen >= 0).sum(1).tolist() == count_positions(batch.lengths, config).tolist()
    for b, n in enumerate(sizes):
        size = max(1, n // P)
        for p in range(P):
            end = n if p == P - 1 else min(n, (p + 1) * size)
            there = [t for t in range(p * size, end) if t >= min_prefix and t + K <= n - 1]
            t = int(chosen[b, p])
            assert t in there if there else t == -1
            if there and draw != "sample":
                of = max if draw == "greatest" else min
                assert t == of(there, key=lambda t, row=scores[b]: float(row[t]))


def model_and_rows(seed: int, variant: int, sizes: list[int]) -> tuple[Any, Tensor, Tensor]:
    family, _, fields = ALL_VARIANTS[variant]
    ids = torch.randint(0, 64, (len(sizes), max(sizes)), generator=torch.Generator().manual_seed(seed))
    return build(family, **fields).train(), ids, torch.tensor(sizes)


def schedules_are_one_step(seed, variant, sizes, P, N, K, selection, scale, baseline) -> None:
    """States handed over give the loss and the gradients of prefixes that are run again."""
    model, ids, lengths = model_and_rows(seed, variant, sizes)
    assert_schedules_agree(
        model, ids, lengths, positions_per_sequence=P, num_generations=N, rollout_length=K, selection=selection, reward_funcs="hybrid",
        min_prefix=3, advantage_scale=scale, baseline=baseline, **({"local_window": 4} if selection.startswith("context") else {}),
    )  # fmt: skip


def pads_are_nothing(seed, variant, sizes, P, N, K, estimator, selection, schedule) -> None:
    """A batch of several lengths is its sequences one by one, whatever stands at the pads."""
    model, ids, lengths = model_and_rows(seed, variant, sizes)
    config = fitting(
        estimator=estimator, selection=selection, schedule=schedule, positions_per_sequence=P, num_generations=N, rollout_length=K,
        min_prefix=3, local_window=4, reward_funcs="hybrid" if estimator == "sampled" else "prefix_match",
    )  # fmt: skip
    step = ReFINEStep(model, config)
    together = step(ids, lengths, generator=torch.Generator().manual_seed(seed))
    together.loss.backward()
    found, g, loss = gradients(model), torch.Generator().manual_seed(seed), 0.0
    by = dict(ntp_normalizer=max(together.num_targets, 1), policy_normalizer=max(together.num_rollout_tokens, 1))
    for b, n in enumerate(sizes):
        alone = step(ids[b : b + 1, :n], generator=g, **by)
        alone.loss.backward()
        loss = loss + alone.loss.detach()
        if estimator == "sampled":
            assert torch.equal(alone.positions[0], together.positions[b])
            assert torch.equal(alone.rollouts[0][alone.positions[0] >= 0], together.rollouts[b][alone.positions[0] >= 0])
    assert_near(together.loss.detach(), torch.as_tensor(loss), 1e-9)
    assert_same_gradients(found, gradients(model))


OF_A_STEP = dict(
    seed=seeds, variant=st.integers(0, len(ALL_VARIANTS) - 1), P=st.integers(1, 5), N=st.integers(1, 3), K=st.integers(1, 5),
    sizes=few_of(7, 50),
)  # fmt: skip
SELECTIONS = st.sampled_from(["entropy", "context_kl", "context_gain", "uniform", "argmax", "argmin"])
PROPERTIES: dict[str, tuple[Callable, dict[str, st.SearchStrategy]]] = {
    "delta rule": (delta_rule_is_its_definition, dict(
        seed=seeds, sizes=few_of(0, 70), T=st.integers(1, 70), heads=st.integers(1, 2), group=st.integers(1, 2),
        widths=st.tuples(st.integers(1, 9), st.integers(1, 9)), gated=yes, with_state=yes, chunk=st.sampled_from([None, 4, 16]),
        dtype=dtypes,
    )),
    "lact": (lact_is_its_definition, dict(
        seed=seeds, before=few_of(0, 20), sizes=few_of(0, 20), chunk=st.integers(1, 12), momentum=yes, muon=yes, prenorm=yes,
    )),
    "cross-entropy": (cross_entropy_by_blocks_is_that_of_all_logits, dict(
        seed=seeds, n=st.integers(1, 40), V=st.integers(1, 30), D=st.integers(1, 8), block=st.integers(1, 50),
        dtype=st.sampled_from([torch.float64, torch.float32]),
    )),
    "closed form": (closed_form_by_blocks_is_that_of_all_logits, dict(
        seed=seeds, n=st.integers(1, 40), V=st.integers(1, 30), D=st.integers(1, 8), block=st.integers(1, 50), K=st.integers(1, 8),
        order=st.sampled_from([1, 2, 5, math.inf]), local=st.sampled_from([None, "kl", "gain"]),
        part=st.sampled_from(["loss", "ntp", "policy"]),
    )),
    "selection": (positions_are_one_a_chunk, dict(
        seed=seeds, sizes=few_of(1, 60), P=st.integers(1, 9), K=st.integers(1, 7), min_prefix=st.integers(1, 25),
        draw=st.sampled_from(["sample", "greatest", "least"]),
    )),
    "schedules": (schedules_are_one_step, dict(
        **OF_A_STEP, selection=SELECTIONS, scale=st.sampled_from(["std", "global", "none"]),
        baseline=st.sampled_from(["mean", "leave_one_out"]),
    )),
    "padding": (pads_are_nothing, dict(
        **OF_A_STEP, estimator=st.sampled_from(["sampled", "closed_form"]), selection=SELECTIONS,
        schedule=st.sampled_from(["auto", "fused", "snapshot", "reprefill"]),
    )),
}  # fmt: skip


def try_cases(name: str, cases: int) -> None:
    function, drawn = PROPERTIES[name]
    settings(max_examples=cases, **COMMON)(given(**drawn)(function))()


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_few_cases(name):
    try_cases(name, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_many_cases(name):
    try_cases(name, MANY)
