"""Whole steps of models on kernels against the same steps on PyTorch's operations; on a device also what only a device can tell."""

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

from refine_nsp.config import NSPConfig
from refine_nsp.models import with_states
from refine_nsp.nsp.module import ReFINEStep
from refine_nsp.ops import kernels
from refine_nsp.ops.window_attention import naive_window_attention, window_attention
from tests.models.families import FAMILY_NAMES, build
from tests.models.transformers_models import stateful

pytestmark = pytest.mark.gpu
STEPS = {
    "closed form": {"estimator": "closed_form", "local_window": 8},
    "fused": {"schedule": "fused"},
    "snapshot": {"schedule": "snapshot", "num_generations": 2},
}
HYBRIDS = ["qwen3_5", "qwen3_next", "olmo_hybrid", "kimi_linear"]  # models of transformers on flash-linear-attention's kernels
SETTINGS = {"rollout_length": 3, "positions_per_sequence": 2, "min_prefix": 5, "reward_funcs": "hybrid"}


def model_of(family, device, dtype):
    if family != "kimi_linear" and family in ["gated_deltanet", *HYBRIDS] and kernels.chosen().gated:
        pytest.skip(kernels.chosen().gated)
    made = stateful if family in HYBRIDS else build
    return made(family, dtype=torch.float32).to(device, dtype).train()


def step_of(model, name, length: int = 70):
    ids = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(1)).to(model.device)
    config = NSPConfig(**(SETTINGS | STEPS[name] | ({"reward_funcs": "prefix_match"} if name == "closed form" else {})))
    result = ReFINEStep(model, config)(ids, torch.tensor([length, length - 9]), torch.Generator().manual_seed(0))
    model.zero_grad()
    result.loss.backward()
    return result, torch.cat([p.grad.float().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("family", ["delta_net", "gated_deltanet", *(pytest.param(h, marks=pytest.mark.cuda) for h in HYBRIDS)])
def test_a_step_on_kernels_is_the_step_on_pytorch(device, on_torch, family, name):
    """Under the interpreter in float32, where sampled tokens are the same; a device runs bfloat16, whose rollouts may differ."""
    model = model_of(family, device, torch.float32 if kernels.interpreted() else torch.bfloat16)
    (ours, gradient), (theirs, expected) = step_of(model, name), on_torch(step_of, model, name)
    if kernels.interpreted():
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-5)
        assert (gradient - expected).norm() < 1e-3 * expected.norm()
    else:
        torch.testing.assert_close(ours.loss_ntp, theirs.loss_ntp, rtol=2e-2, atol=0)
    if name == "closed form":
        assert torch.nn.functional.cosine_similarity(gradient, expected, 0) > 0.95


def test_a_layer_of_transformers_on_kernels_is_its_own_code(device, on_torch):
    """Outputs, what goes on from a snapshot, and gradients; whole steps of several layers take the interpreter too long."""
    torch.manual_seed(0)
    heads = dict(linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
    config = Qwen3_5TextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, layer_types=["linear_attention"],
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, **heads,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    model = with_states(model.to(device, torch.float32 if kernels.interpreted() else torch.bfloat16), check_states=False)
    if kernels.chosen().gated:
        pytest.skip(kernels.chosen().gated)
    ids = torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(1)).to(device)

    def run():
        out = model.model(ids, snapshot_positions=torch.tensor([[6]]))
        rest = model.model(ids[:, :3], past_key_values=out.snapshots, use_cache=False).last_hidden_state
        model.zero_grad()
        (out.last_hidden_state.sin().sum() + rest.sin().sum()).backward()
        gradient = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
        return out.last_hidden_state, rest, gradient

    tolerance = 1e-4 if kernels.interpreted() else 5e-2
    for ours, theirs in zip(run(), on_torch(run), strict=True):
        assert (ours - theirs).float().norm() < tolerance * theirs.float().norm()
        assert not torch.equal(ours, theirs)  # another code did run


@pytest.mark.cuda
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_step_waits_for_the_device_at_most_three_times(device, family, name):
    model = model_of(family, device, torch.bfloat16)
    for _ in range(2):  # kernels are compiled and tuned first, which waits
        step_of(model, name)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step_of(model, name)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchronizing" in str(w.message)]
    assert len(waits) <= 3, waits


@pytest.mark.cuda
@pytest.mark.parametrize("slots", [0, 63])
def test_window_attention_on_flash_attention(device, slots):
    T, window = 300, 64
    q, k, v = (
        torch.randn(2, 4, n, 32, device=device, dtype=torch.bfloat16, requires_grad=True) for n in (T, slots + T, slots + T)
    )
    assert kernels.window_attention_runs(q, q.dtype)
    past = torch.full((2,), slots)
    results = [f(q, k, v, window, past) for f in (window_attention, naive_window_attention)]
    cotangent = torch.randn_like(results[0])
    pairs = zip(*(torch.autograd.grad(o, (q, k, v), cotangent) for o in results), strict=True)
    for a, b in [tuple(results), *pairs]:
        assert (a - b).float().abs().max() <= 2e-2 * b.float().abs().max()


@pytest.mark.cuda
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_memory_of_a_step_grows_with_the_tokens_and_not_with_their_square(device, family):
    model = model_of(family, device, torch.bfloat16)

    def peak(length: int) -> int:
        step_of(model, "closed form", length)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step_of(model, "closed form", length)
        return torch.cuda.max_memory_allocated() - before

    assert peak(16384) < 10 * peak(2048)
