"""The closed-form loss of a head by blocks against all logits at once, forward and backward, across block boundaries; and its order."""

import itertools
import math

import pytest
import torch

from refine_nsp.ops import linear_cross_entropy as ops

ORDERS = [1, 2, 3, 8, math.inf]


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [3, 5, 1000])
@pytest.mark.parametrize("local", [None, "kl", "gain"])
@pytest.mark.parametrize(("K", "order"), [(1, 1), (2, 1), (5, 1), (1, 2), (5, 3), (3, 8), (1, math.inf), (4, math.inf)])
def test_blocks_equal_the_definition(monkeypatch, K, order, local, block):
    monkeypatch.setattr(ops, "block_tokens", lambda vocabulary, device: block)
    n, V, D = 37, 11, 6
    hidden, weight = draw(n, D, seed=1).requires_grad_(), draw(V, D, seed=2).requires_grad_()
    targets = torch.randint(0, V, (n,), generator=torch.Generator().manual_seed(K))
    target_weights, token_weights = draw(n, seed=3).abs(), draw(n, seed=4).abs()
    token_weights[-K:] = token_weights[10:12] = 0.0
    term = ops.SequenceTerm(token_weights, K, order, None if local is None else draw(n, D, seed=5), local == "gain")
    counted = token_weights > 0
    for part in ("loss", "ntp", "policy"):
        found = []
        for function in (ops.naive_linear_next_sequence, ops.linear_next_sequence):
            losses, stats = function(hidden, weight, targets, target_weights, term, 0.7, 2.0)
            value = getattr(losses, part)
            gradients = torch.autograd.grad(value, (hidden, weight))
            known = (losses.token_weights, losses.values * counted, losses.matches * counted, stats.nll, stats.entropy)
            found.append((value.detach(), *gradients, *known))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("K", [1, 3, 5, 12, 20])
def test_coefficients_are_the_derivative_of_the_naive_objective(K, order):
    log_p, token_weights = -draw(12).abs(), draw(12, seed=1).abs()
    x = log_p.clone().requires_grad_()
    log_P = ops.log_matches(x, K)
    naive = log_P if order == math.inf else ops.naive_truncated_log(log_P, order)
    (token_weights * naive.mean(-1)).sum().backward()
    torch.testing.assert_close(ops.match_coefficients(log_p, token_weights, K, order), x.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("M", [1, 2, 3, 8])
@pytest.mark.parametrize("K", [1, 3, 5])
def test_the_slope_is_the_chance_that_one_of_m_rollouts_matches(K, M):
    """By enumeration on a vocabulary of two: all V^K rollouts, and all ways in which M independent ones match or miss."""
    logits = draw(K, 2, seed=K)
    log_p = logits.log_softmax(-1)  # of each token of a rollout as long as those before it matched
    truth = [1, 0, 1, 1, 0][:K]
    for j in range(1, K + 1):
        rollouts = itertools.product(range(2), repeat=j)
        chance = {r: float(sum(log_p[i, r[i]] for i in range(j)).exp()) for r in rollouts}
        assert sum(chance.values()) == pytest.approx(1.0, abs=1e-12)
        match = chance[tuple(truth[:j])]
        miss = sum(c for r, c in chance.items() if r != tuple(truth[:j]))
        one_of_m = sum(
            math.prod(match if hit else miss for hit in hits) for hits in itertools.product([False, True], repeat=M) if any(hits)
        )
        at_target = torch.stack([log_p[i, truth[i]] for i in range(K)])
        log_P = ops.log_matches(at_target, K)[0, j - 1]
        assert float(log_P.exp()) == pytest.approx(match, abs=1e-12)
        assert float(ops.truncated_log_slope(log_P, M)) == pytest.approx(one_of_m, abs=1e-12)


def test_the_ends_of_the_order_are_the_expected_reward_and_the_log_likelihood():
    log_P = -draw(50).abs() * 5
    torch.testing.assert_close(ops.truncated_log(log_P, 1), log_P.exp() - 1)
    assert ops.truncated_log(log_P, math.inf) is log_P
    torch.testing.assert_close(ops.truncated_log_slope(log_P, math.inf), torch.ones_like(log_P))
    by_order = torch.stack([ops.truncated_log(log_P, m) for m in ORDERS])
    assert (by_order.diff(dim=0) < 0).all()  # every further term takes something away, down to the logarithm
    likely = torch.tensor([math.log(0.5)], dtype=torch.float64)
    assert float(ops.truncated_log(likely, 60)) == pytest.approx(math.log(0.5), abs=1e-15)


@pytest.mark.parametrize("M", [1, 2, 8, 64])
def test_neither_end_of_the_probability_loses_digits(M):
    """Against exact fractions: P near 0, where 1 - (1 - P)^M cancels, and near 1, where 1 - P does. In float32 as well."""
    from fractions import Fraction

    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        for x in (-30.0, -12.0, -1.0, -0.69, -1e-3, -1e-7):
            log_P = torch.tensor(x, dtype=dtype)
            P = Fraction(math.exp(float(log_P))) if x < -1e-2 else 1 + Fraction(math.expm1(float(log_P)))
            slope = 1 - (1 - P) ** M
            value = -sum((1 - P) ** k / k for k in range(1, M + 1))
            assert float(ops.truncated_log_slope(log_P, M)) == pytest.approx(float(slope), rel=bound)
            assert float(ops.truncated_log(log_P, M)) == pytest.approx(float(value), rel=bound)
    certain = torch.zeros(1)
    assert float(ops.truncated_log_slope(certain, M)) == 1.0 and float(ops.truncated_log(certain, M)) == 0.0
