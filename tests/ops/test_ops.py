"""Every fast op equals its naive form, forward and backward, in float64."""

import pytest
import torch
from safetensors.torch import load_file
from torch.autograd import gradcheck, gradgradcheck

from refine_nsp.ops.delta_rule import delta_rule, naive_delta_rule
from refine_nsp.ops.linear_cross_entropy import BLOCK_LOGITS, linear_cross_entropy, naive_linear_cross_entropy
from refine_nsp.ops.norm import (
    l2_norm,
    naive_l2_norm,
    naive_rms_norm,
    naive_rms_norm_gated,
    rms_norm,
    rms_norm_gated,
)
from refine_nsp.ops.rotary import apply_rotary, naive_apply_rotary, rotary_tables
from refine_nsp.ops.short_conv import naive_short_conv, short_conv
from refine_nsp.ops.swiglu import naive_swiglu, swiglu
from refine_nsp.ops.window_attention import branched_window_attention, naive_window_attention, window_attention


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same(fast, naive, inputs, rtol: float = 1e-9) -> None:
    """Same value and same gradients for a random cotangent."""
    a, b = fast(*inputs), naive(*inputs)
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-11)
    cotangent = torch.randn_like(a)
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    for x, y in zip(torch.autograd.grad(a, leaves, cotangent), torch.autograd.grad(b, leaves, cotangent), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-10)


def delta_inputs(T: int, H: int, HV: int, gated: bool, state: bool, decay: float = 3.0) -> tuple:
    torch.manual_seed(T)
    q = leaf(2, T, H, 6)
    k = torch.nn.functional.normalize(torch.randn(2, T, H, 6, dtype=torch.float64), dim=-1).requires_grad_()
    beta = (2 * torch.rand(2, T, HV, dtype=torch.float64)).requires_grad_()
    g = (-decay * torch.rand(2, T, HV, dtype=torch.float64)).requires_grad_() if gated else None
    return q, k, leaf(2, T, HV, 5), beta, g, leaf(2, HV, 6, 5) if state else None


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize(("T", "H", "HV"), [(1, 2, 2), (5, 1, 2), (16, 2, 2), (32, 2, 4), (37, 2, 2)])
def test_delta_rule_and_its_states_at_every_position(T, H, HV, gated, state):
    inputs = delta_inputs(T, H, HV, gated, state)
    positions = torch.arange(-1, T).expand(2, -1)

    def fast(*x):
        o, states = delta_rule(*x, chunk_size=16)
        return torch.cat([o.flatten(1), states.at(positions).flatten(1)], 1)

    def naive(*x):
        q, k, v, beta, g, s0 = x
        start = v.new_zeros(2, HV, 6, 5) if s0 is None else s0
        found = [start]
        for t in range(T):
            cut = slice(t, t + 1)
            step = [None if y is None else y[:, cut] for y in (q, k, v, beta, g)]
            found.append(naive_delta_rule(*step, found[-1])[1])
        o = naive_delta_rule(*x)[0]
        return torch.cat([o.flatten(1), torch.stack(found, 1).flatten(1)], 1)

    assert_same(fast, naive, inputs)


def test_delta_rule_gradcheck_and_strong_decay():
    assert gradcheck(lambda *x: delta_rule(*x, chunk_size=4)[0], delta_inputs(9, 1, 2, True, True))
    inputs = delta_inputs(40, 1, 1, True, True, decay=500.0)  # exp(-10,000) inside a chunk: must underflow, not overflow
    o, states = delta_rule(*inputs)
    (o.sum() + states.at(torch.tensor([[10], [39]])).sum()).backward()
    assert all(bool(x.grad.isfinite().all()) for x in inputs)
    torch.testing.assert_close(o, naive_delta_rule(*inputs)[0], rtol=1e-9, atol=1e-12)


def test_delta_rule_ignores_tokens_without_weight_and_refuses_odd_heads():
    q, k, v, beta, g, s0 = delta_inputs(20, 2, 2, True, True)
    keep = (torch.arange(20) < 13)[None, :, None]
    states = delta_rule(q, k, v, beta * keep, g * keep, s0)[1]
    cut = delta_rule(q[:, :13], k[:, :13], v[:, :13], beta[:, :13], g[:, :13], s0)[1]
    torch.testing.assert_close(states.at(torch.full((2, 1), 19)), cut.at(torch.full((2, 1), 12)))
    with pytest.raises(ValueError, match="multiple"):
        delta_rule(q, k, leaf(2, 20, 3, 5), leaf(2, 20, 3))


@pytest.mark.parametrize("name", ["delta_rule", "gated_delta_rule"])
def test_delta_rule_against_the_original_kernels(shared, name):
    x = load_file(shared / "fixtures" / "fla" / f"ops_{name}.safetensors")
    gate = {"g": x["g"]} if "g" in x else {}
    for prefix in ("", "with_state."):
        q, k, v, beta = (x[n].clone().requires_grad_() for n in ("q_normalized", "k_normalized", "v", "beta"))
        g = gate["g"].clone().requires_grad_() if gate else None
        s0 = x["initial_state"].clone().requires_grad_() if prefix else None
        o, states = delta_rule(q, k, v, beta, g, s0)
        final = states.at(torch.full((2, 1), 99))[:, 0]
        torch.testing.assert_close(o, x[f"{prefix}o"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(final, x[f"{prefix}final_state"], rtol=1e-4, atol=1e-5)
        ((o * x["do"]).sum() + (final * x["dht"]).sum()).backward()
        grads = (
            {"dq": q, "dk": k, "dv": v, "dbeta": beta} | ({"dg": g} if gate else {}) | ({"dinitial_state": s0} if prefix else {})
        )
        for key, tensor in grads.items():
            torch.testing.assert_close(tensor.grad, x[f"{prefix}{key}"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weight", [True, False])
def test_norms(weight):
    x, w, gate = leaf(3, 4, 6), leaf(6) if weight else None, leaf(3, 4, 6)
    assert_same(lambda *a: rms_norm(*a, 1e-6), lambda *a: naive_rms_norm(*a, 1e-6), (x, w))
    assert_same(l2_norm, naive_l2_norm, (x,))
    if weight:
        assert_same(lambda *a: rms_norm_gated(*a, 1e-6), lambda *a: naive_rms_norm_gated(*a, 1e-6), (x, gate, w))


def test_swiglu():
    assert_same(swiglu, naive_swiglu, (leaf(3, 7), leaf(3, 7)))


@pytest.mark.parametrize("T", [1, 2, 3, 9])
@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", None])
def test_short_conv(T, W, history, bias, activation):
    inputs = (leaf(2, T, 3), leaf(3, W), leaf(3) if bias else None, activation, leaf(2, W - 1, 3) if history else None)
    assert_same(short_conv, naive_short_conv, inputs)


@pytest.mark.parametrize("window", [1, 3, 40, 100, 200, 500])
@pytest.mark.parametrize("slots", [0, 7])
def test_window_attention(window, slots):
    T = 300
    q, k, v = leaf(2, 2, T, 4), leaf(2, 2, slots + T, 4), leaf(2, 2, slots + T, 4)
    past = torch.tensor([min(slots, 2), slots])
    assert_same(lambda *x: window_attention(*x, window, past), lambda *x: naive_window_attention(*x, window, past), (q, k, v))


@pytest.mark.parametrize(("T", "window", "slots"), [(64, 64, 0), (65, 64, 63), (128, 65, 64), (129, 1000, 90), (200, 130, 300)])
@pytest.mark.parametrize("at_once", [1, 3 * 2 * 2 * 64 * 128, 2**30], ids=["a_block", "some_blocks", "all_blocks"])
def test_window_attention_by_hand_however_many_blocks_are_taken_at_once(T, window, slots, at_once, monkeypatch):
    monkeypatch.setattr("refine_nsp.ops.window_attention.LOGITS_AT_ONCE", at_once)
    q, k, v = leaf(2, 2, T, 4), leaf(2, 2, slots + T, 4), leaf(2, 2, slots + T, 6)
    past = torch.tensor([slots // 3, slots])
    assert_same(lambda *x: window_attention(*x, window, past), lambda *x: naive_window_attention(*x, window, past), (q, k, v))


def test_window_attention_by_hand_is_as_close_in_bfloat16_as_the_fused_kernel():
    """Under autocast, from float32 inputs, and as far from float64 results as scaled_dot_product_attention is, up to a factor."""
    exact = [torch.randn(2, 3, 300, 32, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    past, cotangent = torch.zeros(2, dtype=torch.long), torch.randn(2, 3, 300, 32, dtype=torch.float64)

    def results(attend, inputs):
        o = attend(*inputs, 100, past)
        return o.detach(), *torch.autograd.grad(o, inputs, cotangent.to(o.dtype))

    wanted = results(naive_window_attention, exact)
    inputs = [x.detach().float().requires_grad_() for x in exact]
    with torch.autocast("cpu", torch.bfloat16):
        by_hand, fused = (results(attend, inputs) for attend in (window_attention, naive_window_attention))
        assert window_attention(*exact, 100, past).dtype == torch.float64  # which autocast leaves alone
    assert by_hand[0].dtype == fused[0].dtype == torch.bfloat16 and by_hand[1].dtype == torch.float32
    for x, y, z in zip(by_hand, fused, wanted, strict=True):
        assert float((x - z).norm()) < 2 * float((y - z).norm()) < 0.02 * float(z.norm())


def test_rotary():
    tables = rotary_tables(torch.tensor([[0, 1, 5], [700, 701, 702]]), 6, 100.0, torch.float64)
    x = leaf(2, 3, 4, 6)
    assert_same(lambda x: apply_rotary(x, *tables), lambda x: naive_apply_rotary(x, *tables), (x,))
    assert gradgradcheck(lambda x: apply_rotary(x, *tables), (x,))
    narrow = x.detach().bfloat16()
    torch.testing.assert_close(apply_rotary(narrow, *tables), naive_apply_rotary(narrow, *tables))


@pytest.mark.parametrize("window", [1, 3, 9])
def test_branched_window_attention(window):
    S, n, T = 3, 2, 5
    q, k, v = (leaf(S * n, 2, T, 4) for _ in range(3))
    past_k, past_v = leaf(S, 2, window - 1, 4), leaf(S, 2, window - 1, 4)
    past = torch.tensor([0, 1, 8]).clamp(max=window - 1)

    def joined(q, past_k, past_v, k, v):
        again = [x.repeat_interleave(n, 0) for x in (past_k, past_v)]
        whole = [torch.cat(pair, 2) for pair in zip(again, (k, v), strict=True)]
        return naive_window_attention(q, *whole, window, past.repeat_interleave(n))

    assert_same(lambda *x: branched_window_attention(*x, window, past), joined, (q, past_k, past_v, k, v))


def test_window_attention_sees_what_it_should():
    """Query i attends to keys i - window + 1 .. i: with one-hot values the output says which."""
    T, window = 6, 3
    q = k = torch.zeros(1, 1, T, 2, dtype=torch.float64)
    v = torch.eye(T, dtype=torch.float64)[None, None]
    o = window_attention(q, k, v, window, torch.zeros(1, dtype=torch.long))[0, 0]
    for i in range(T):
        seen = range(max(0, i - window + 1), i + 1)
        assert o[i].nonzero()[:, 0].tolist() == list(seen)


@pytest.mark.parametrize("n", [1, 50, 333])
def test_linear_cross_entropy(n, monkeypatch):
    monkeypatch.setattr("refine_nsp.ops.linear_cross_entropy.BLOCK_LOGITS", 19 * 40)  # several blocks
    hidden, weight = leaf(n, 8), leaf(19, 8)
    targets = torch.randint(0, 19, (n,))
    token_weights = torch.rand(n, dtype=torch.float64) * (torch.rand(n) > 0.3)
    assert_same(lambda h, w: 3 * linear_cross_entropy(h, w, targets, token_weights)[0],
                lambda h, w: 3 * naive_linear_cross_entropy(h, w, targets, token_weights)[0], (hidden, weight))  # fmt: skip
    fast, naive = (f(hidden, weight, targets, token_weights)[1] for f in (linear_cross_entropy, naive_linear_cross_entropy))
    for name in ("nll", "entropy", "argmax"):
        torch.testing.assert_close(getattr(fast, name), getattr(naive, name), rtol=1e-9, atol=1e-12)
        assert not getattr(fast, name).requires_grad


def test_linear_cross_entropy_never_holds_all_logits():
    """With a vocabulary of 32,000, 2,000 tokens would be 256 MB of logits; one block is a fraction of it."""
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor))
            return out

    hidden, weight = torch.randn(2000, 4, requires_grad=True), torch.randn(32000, 4, requires_grad=True)
    with Spy():
        loss, _ = linear_cross_entropy(hidden, weight, torch.zeros(2000, dtype=torch.long), torch.ones(2000) / 2000)
        loss.backward()
    assert max(seen) <= BLOCK_LOGITS < 2000 * 32000


def test_without_gradients_the_head_is_multiplied_once_a_block():
    products = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            products.extend([func] if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) else [])
            return func(*args, **(kwargs or {}))

    hidden, weight = leaf(30, 4), leaf(19, 4)
    with torch.no_grad(), Spy():
        linear_cross_entropy(hidden, weight, torch.zeros(30, dtype=torch.long), torch.ones(30))
    assert len(products) == 1


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        (lambda *x: delta_rule(*x)[0], delta_inputs(5, 2, 2, True, False)),
        (rms_norm, (leaf(3, 4), leaf(4), 1e-6)),
        (swiglu, (leaf(3, 4), leaf(3, 4))),
        (lambda x, w: short_conv(x, w, None, "silu", None), (leaf(2, 5, 3), leaf(3, 4))),
        (lambda *x: window_attention(*x, 3, torch.zeros(1, dtype=torch.long)), [leaf(1, 1, 70, 2) for _ in range(3)]),
        (
            lambda h, w: linear_cross_entropy(h, w, torch.tensor([0, 2]), torch.ones(2).double())[0][None],
            (leaf(2, 3), leaf(5, 3)),
        ),
    ],
    ids=["delta_rule", "rms_norm", "swiglu", "short_conv", "window_attention", "linear_cross_entropy"],
)
def test_a_gradient_of_a_gradient_is_refused_not_wrong(op, inputs):
    leaves = [x for x in inputs if isinstance(x, torch.Tensor)]
    first = torch.autograd.grad(op(*inputs).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(x.square().sum() for x in first).backward()
