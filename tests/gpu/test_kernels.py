"""Every kernel path against PyTorch's operations: values, gradients, states at any position, going on."""

import pytest
import torch

from refine_nsp.ops import kernels
from refine_nsp.ops.delta_rule import OneToken, delta_rule
from refine_nsp.ops.norm import l2_norm, rms_norm, rms_norm_gated
from refine_nsp.ops.short_conv import short_conv
from refine_nsp.ops.swiglu import swiglu

pytestmark = pytest.mark.gpu
# Shares of the largest value: float32 differs by the order of sums, bfloat16 by what kernels store in it between their stages.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    scale = b.abs().max().item()
    error = (a.float() - b.float()).abs().max().item()
    assert a.shape == b.shape and error <= factor * TOLERANCE[dtype] * scale, f"{error:.2e} of {scale:.2e}"


def delta_inputs(device, dtype, T=70, H=2, HV=2, gated=False, state=True, D=16) -> list:
    torch.manual_seed(T)
    if dtype == torch.float32 and device.type == "cuda":
        pytest.skip("float32 runs on PyTorch's operations: compiled kernels would multiply in TF32")
    if gated and kernels.chosen().gated:
        pytest.skip(kernels.chosen().gated)
    k = torch.nn.functional.normalize(torch.randn(2, T, H, D), dim=-1)
    wide = [torch.rand(2, T, HV) * 1.5, -2 * torch.rand(2, T, HV) if gated else None]
    inputs = [torch.randn(2, T, H, D).to(dtype), k.to(dtype), torch.randn(2, T, HV, D).to(dtype), *wide]
    inputs.append(torch.randn(2, HV, D, D) if state else None)
    return [None if x is None else x.to(device).requires_grad_() for x in inputs]


def outcome(inputs, positions):
    """Outputs, states, and gradients of all of them together."""
    o, states = delta_rule(*inputs)
    taken = [states.at(p) for p in positions]
    generator = torch.Generator().manual_seed(3)
    total = sum((x.float() * torch.randn(x.shape, generator=generator).to(x.device)).sum() for x in (o, *taken))
    leaves = [x for x in inputs if x is not None]
    return o.detach(), [t.detach() for t in taken], torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("T", "H", "HV", "state"), [(70, 2, 2, True), (64, 1, 2, False), (5, 2, 2, True)], ids=["long", "grouped", "short"]
)
def test_delta_rule_and_states_anywhere(device, dtype, on_torch, gated, T, H, HV, state):
    inputs = delta_inputs(device, dtype, T, H, HV, gated, state)
    # The start, both sides of a chunk's boundary, inside the last chunk, the end (which goes on in float32).
    anywhere = torch.tensor([[-1, 0, 62, 63, 64, T - 1], [3, 1, 64, T - 2, 0, -1]]).clamp(max=T - 1)
    for positions in ([anywhere], [], [anywhere, torch.full((2, 1), T - 1)]):
        ours, theirs = outcome(inputs, positions), on_torch(outcome, inputs, positions)
        assert ours[0].dtype == dtype and all(s.dtype == torch.float32 for s in ours[1])
        close(ours[0], theirs[0], dtype)
        for a, b in zip(ours[1], theirs[1], strict=True):
            close(a, b, dtype)
        for name, a, b in zip("q k v beta g state".split(), ours[2], theirs[2], strict=False):
            assert a.dtype == b.dtype, name
            close(a, b, dtype, factor=2.0)


def test_pads_write_nothing(device, dtype, on_torch):
    q, k, v, beta, g, s0 = delta_inputs(device, dtype, T=70, gated=not kernels.chosen().gated)
    lengths = torch.tensor([70, 9])
    real = (torch.arange(70) < lengths[:, None])[..., None].to(device)
    ends = (lengths - 1)[:, None]
    g = None if g is None else g * real
    states = delta_rule(q, k, v, beta * real, g, s0, lengths=lengths)[1].at(ends)
    own = delta_rule(*(None if x is None else x[1:, :9] for x in (q, k, v, beta, g)), s0[1:])[1].at(ends[1:])
    close(states[1:], own, torch.float32)  # the final state is float32 on both sides
    close(states, on_torch(lambda: delta_rule(q, k, v, beta * real, g, s0)[1].at(ends)), dtype)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@torch.no_grad()
def test_single_tokens_go_on(device, dtype, on_torch, gated):
    q, k, v, beta, g, state = delta_inputs(device, dtype, T=6, gated=gated, H=1)
    theirs_o, theirs = on_torch(delta_rule, q, k, v, beta, g, state)
    outputs = []
    for t in range(6):
        token = [None if x is None else x[:, t : t + 1] for x in (q, k, v, beta, g)]
        o, states = delta_rule(*token, state)
        assert isinstance(states, OneToken)
        torch.testing.assert_close(states.at(torch.tensor([[-1], [0]]))[0, 0], state[0])
        state = states.at(torch.zeros(2, 1, dtype=torch.long))[:, 0]
        outputs.append(o)
    close(torch.cat(outputs, 1), theirs_o, dtype)
    close(state, theirs.at(torch.full((2, 1), 5))[:, 0], dtype)


def same(f, inputs, dtype, on_torch) -> None:
    """Values and gradients, of any dtypes."""

    def run():
        y = f(*inputs)
        leaves = [x for x in inputs if x is not None]
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        return y.detach(), torch.autograd.grad(y, leaves, cotangent)

    ours, theirs = run(), on_torch(run)
    close(ours[0], theirs[0], dtype)
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert a.dtype == b.dtype
        close(a, b, dtype)


def leaves(device, dtype, *shapes) -> list:
    torch.manual_seed(0)
    return [None if s is None else torch.randn(s).to(device, dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize(("T", "W", "history"), [(70, 4, True), (70, 4, False), (2, 4, True), (1, 3, True)])
def test_short_convolution(device, dtype, on_torch, activation, T, W, history):
    x, weight, before = leaves(device, dtype, (2, T, 24), (24, W), (2, W - 1, 24) if history else None)
    same(lambda x, w, h: short_conv(x, w, None, activation, h), (x, weight, before), dtype, on_torch)


def test_norms_and_swiglu(device, dtype, on_torch):
    x, gate, weight = leaves(device, dtype, (2, 9, 3, 24), (2, 9, 3, 24), (24,))
    same(lambda x, w: rms_norm(x, w, 1e-5), (x, weight), dtype, on_torch)
    same(lambda x: rms_norm(x, None, 1e-5), (x,), dtype, on_torch)
    same(lambda x: l2_norm(x), (x,), dtype, on_torch)
    same(lambda x, g, w: rms_norm_gated(x, g, w, 1e-5), (x, gate, weight), dtype, on_torch)
    same(swiglu, (x, gate), dtype, on_torch)


def test_float32_and_wide_heads_fall_back_by_name(device, monkeypatch):
    wide = [torch.randn(1, 3, 1, d, device=device, dtype=torch.bfloat16) for d in (272, 272, 16)]
    kernels._say_once.cache_clear()
    with pytest.warns(UserWarning, match="heads of 272 are wider than the 256"):
        o, _ = delta_rule(*wide, torch.ones(1, 3, 1, device=device))
    assert o.dtype == torch.float32
    with pytest.warns(UserWarning, match="norms of rows of 65,540 bytes run on PyTorch"):
        assert rms_norm(torch.ones(2, 16385, device=device), None, 0.0).mean() == 1
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    assert "TF32" in kernels.delta_rule_problem(torch.float32, 16, False)
