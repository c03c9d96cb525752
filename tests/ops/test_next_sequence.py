"""The closed-form loss of a head by blocks against all logits at once, forward and backward, across block boundaries."""

import pytest
import torch

from refine_nsp.ops import linear_cross_entropy as ops


@pytest.mark.parametrize("block", [3, 5, 1000])
@pytest.mark.parametrize("local", [None, "kl", "gain"])
@pytest.mark.parametrize(("K", "share"), [(1, 0.0), (2, 0.0), (5, 0.0), (5, 0.3), (4, 1.0)])
def test_blocks_equal_the_definition(monkeypatch, K, share, local, block):
    monkeypatch.setattr(ops, "block_tokens", lambda vocabulary, device: block)
    n, V, D = 37, 11, 6
    g = torch.Generator().manual_seed(K)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    hidden, weight = draw(n, D).requires_grad_(), draw(V, D).requires_grad_()
    targets, token_weights, weights = torch.randint(0, V, (n,), generator=g), draw(n).abs(), draw(n).abs()
    weights[-K:] = weights[10:12] = 0.0
    term = ops.SequenceTerm(weights, K, share, None if local is None else draw(n, D), local == "gain")
    for part in ("loss", "ntp", "policy"):
        found = []
        for function in (ops.naive_linear_next_sequence, ops.linear_next_sequence):
            losses, stats = function(hidden, weight, targets, token_weights, term, 0.7, 2.0)
            value = getattr(losses, part)
            gradients = torch.autograd.grad(value, (hidden, weight))
            found.append((value.detach(), *gradients, losses.weights, losses.values * (weights > 0), stats.nll, stats.entropy))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_coefficients_are_the_derivative_of_the_expected_match():
    log_p = -torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for K in (1, 3, 12, 20):
        x = log_p.clone().requires_grad_()
        (weights * ops.expected_match(x, K, 0.25)).sum().backward()
        torch.testing.assert_close(ops.match_coefficients(log_p, weights, K, 0.25), x.grad, rtol=1e-10, atol=1e-12)
