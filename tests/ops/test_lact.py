"""LaCT's chunk loop equals the token-by-token definition, forward and backward, in float64: outputs, and the state at every position."""

import pytest
import torch

from refine_nsp.ops.lact import Tokens, lact, lact_branches, naive_lact
from refine_nsp.ops.lact_update import (
    Triple,
    UpdateRule,
    gated,
    hidden_terms,
    naive_hidden_terms,
    naive_with_row_norms,
    with_row_norms,
)

H, D, DH, C = 2, 4, 6, 5
RULES = {
    "plain": UpdateRule(False, None, False),
    "momentum": UpdateRule(True, None, False),
    "prenorm": UpdateRule(True, None, True),
    "muon": UpdateRule(True, torch.float32, False),
}


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def pass_of(rows: int, T: int, momentum: bool) -> tuple[torch.Tensor, Tokens]:
    lr = torch.rand(rows, H, T, 3, dtype=torch.float64, requires_grad=True)
    m = torch.rand(rows, H, T, 1, dtype=torch.float64, requires_grad=True) if momentum else None
    return leaf(rows, H, T, D), Tokens(leaf(rows, H, T, D), leaf(rows, H, T, D), lr, m)


def initial_weights() -> Triple:
    return Triple(leaf(1, H, DH, D), leaf(1, H, D, DH), leaf(1, H, DH, D))


def leaves_of(*things) -> list[torch.Tensor]:
    flat = [x for thing in things for x in (thing if isinstance(thing, tuple) else (thing,))]
    return [x for x in flat if x is not None and x.requires_grad]


def assert_same(fast: list, naive: list, leaves: list[torch.Tensor]) -> None:
    """Same tensors, and the same gradients for random cotangents."""
    for a, b in zip(fast, naive, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    cotangents = [torch.randn_like(a) for a in fast]
    sums = [sum((x * c).sum() for x, c in zip(xs, cotangents, strict=True)) for xs in (fast, naive)]
    gradients = [torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True) for total in sums]
    for x, y in zip(*gradients, strict=True):
        zero = torch.zeros(()) if x is None and y is None else torch.zeros_like(x if x is not None else y)
        torch.testing.assert_close(zero if x is None else x, zero if y is None else y, rtol=1e-8, atol=1e-10)


def test_the_elementwise_parts_of_an_update():
    torch.manual_seed(0)
    x, dhidden = leaf(2, H, 2 * DH, C), leaf(2, H, DH, C)
    hidden, dgate, dup = naive_hidden_terms(*x.chunk(2, -2), dhidden)
    assert_same([gated(x)], [hidden], [x])
    for width in (1, DH):
        lr = torch.rand(2, H, 3 * width, C, dtype=torch.float64, requires_grad=True)
        of_w0, of_w1, of_w2 = lr.chunk(3, -2)
        dx = torch.cat([dgate * of_w0, dup * of_w2], -2) if width == 1 else torch.cat([dgate, dup], -2)
        assert_same(list(hidden_terms(x, dhidden, lr)), [hidden * of_w1, dx], [x, dhidden, lr])
    w, norms = leaf(2, H, DH, D), leaf(1, H, DH, 1)
    with torch.no_grad():
        w[0, 0, 0] = 0.0  # has no direction, so it stays
    assert_same([with_row_norms(w, norms)], [naive_with_row_norms(w, norms)], [w, norms])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("T", [1, 4, 5, 6, 10, 13])
def test_the_chunk_loop_and_its_states_at_every_position(rule, T):
    torch.manual_seed(T)
    q, tokens = pass_of(2, T, RULES[rule].momentum)
    initial = initial_weights()
    o, states = lact(q, tokens, initial, RULES[rule], C)
    naive_o, _ = naive_lact(q, tokens, initial, RULES[rule], C)
    at = states.at(torch.arange(-1, T).expand(2, -1))
    fast, naive = [o], [naive_o]
    for t in range(T):
        _, cut = naive_lact(q[:, :, : t + 1], tokens.cut(slice(t + 1)), initial, RULES[rule], C)
        for b in range(2):
            for name, x in cut[b].items():
                there = at[name][b : b + 1, t + 1]
                if name.startswith("open_"):
                    assert not there[:, :, x.shape[2] :].any()  # zeros behind the open tokens
                    there = there[:, :, : x.shape[2]]
                fast.append(there)
                naive.append(x)
    assert_same(fast, naive, leaves_of(q, tokens, initial))


@pytest.mark.parametrize("rule", RULES)
def test_rows_go_on_from_states_of_different_fill_with_lengths_of_their_own(rule):
    """Rows at several phases of their chunk, so that chunks are no common slices; one ends early, one is empty."""
    torch.manual_seed(0)
    before, T = torch.tensor([[4], [2], [9], [-1]]), 12
    lengths = torch.tensor([12, 7, 3, 0])
    q0, tokens0 = pass_of(4, 10, RULES[rule].momentum)
    q, tokens = pass_of(4, T, RULES[rule].momentum)
    initial = initial_weights()
    _, states = lact(q0, tokens0, initial, RULES[rule], C)
    state, seen = {name: x[:, 0] for name, x in states.at(before).items()}, before[:, 0] + 1
    o, after = lact(q, tokens, initial, RULES[rule], C, state, seen, lengths)
    real = (torch.arange(T) < lengths[:, None])[:, None, :, None]
    naive_o, naive_states = naive_lact(q, tokens, initial, RULES[rule], C, state, seen, lengths)
    last = after.at(lengths[:, None] - 1)
    fast, naive = [o * real], [naive_o]
    for b in range(4):
        for name, x in naive_states[b].items():
            there = last[name][b : b + 1, 0]
            fast.append(there[:, :, : x.shape[2]] if name.startswith("open_") else there)
            naive.append(x)
    assert_same(fast, naive, leaves_of(q0, tokens0, q, tokens, initial))


@pytest.mark.parametrize("T", [1, 3, 5])
def test_branches_equal_rows_with_a_state_each(T):
    torch.manual_seed(T)
    rule, n = RULES["prenorm"], 3
    q0, tokens0 = pass_of(2, 9, True)
    q, tokens = pass_of(2 * n, T, True)
    initial = initial_weights()
    before = torch.tensor([[1], [7]])
    _, states = lact(q0, tokens0, initial, rule, C)
    state, seen = {name: x[:, 0] for name, x in states.at(before).items()}, before[:, 0] + 1
    shared = lact_branches(q, tokens, initial, rule, C, state, seen)
    own = {name: x.repeat_interleave(n, 0) for name, x in state.items()}
    alone, _ = naive_lact(q, tokens, initial, rule, C, own, seen.repeat_interleave(n))
    assert_same([shared], [alone], leaves_of(q0, tokens0, q, tokens, initial))


@pytest.mark.parametrize("T", [2, 5])
def test_learning_rates_and_momentum_take_part_where_nothing_is_learned(T):
    """At most a chunk: no update. Distributed training waits for the gradient of every parameter, in every pass."""
    q, tokens = pass_of(2, T, True)
    o, _ = lact(q, tokens, initial_weights(), RULES["momentum"], C)
    o.sum().backward()
    assert not tokens.lr.grad.any() and not tokens.momentum.grad.any()
