"""Mixed precision: bfloat16 products under autocast change results by rounding alone, wherever the backward pass is started."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from refine_nsp.nsp.module import ReFINEStep
from refine_nsp.ops.linear_cross_entropy import linear_cross_entropy
from tests.models.families import build
from tests.settings import fitting

FAMILIES = pytest.mark.parametrize("family", ["delta_net", "gated_deltanet", "lact_swiglu"])
IDS = torch.arange(2 * 100).view(2, 100) * 7 % 64


def gradients(model, autocast: bool, backward_inside: bool = False) -> tuple[float, torch.Tensor]:
    """The mean cross-entropy of `IDS`, and the gradients of all parameters as one vector."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model.model(IDS[:, :-1], use_cache=False).last_hidden_state
        targets = IDS[:, 1:].flatten()
        loss, _ = linear_cross_entropy(
            hidden.flatten(0, 1), model.lm_head.weight, targets, torch.full(targets.shape, 1 / len(targets))
        )
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters()])


@FAMILIES
def test_autocast_changes_loss_and_gradients_by_rounding_alone(family):
    model = build(family, dtype=torch.float32).train()
    (loss, exact), (rounded_loss, rounded) = gradients(model, False), gradients(model, True)
    assert rounded_loss == pytest.approx(loss, rel=0.01) and rounded_loss != loss
    assert rounded.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact, rounded, 0) > 0.99


@FAMILIES
def test_a_backward_pass_started_under_autocast_is_as_good(family):
    model = build(family, dtype=torch.float32).train()
    _, outside = gradients(model, True)
    _, inside = gradients(model, True, backward_inside=True)
    assert torch.nn.functional.cosine_similarity(outside, inside, 0) > 0.9999


STEPS = {
    "closed form": {"estimator": "closed_form"},
    "fused": {"schedule": "fused"},
    "snapshot": {"schedule": "snapshot", "num_generations": 2},
}


@FAMILIES
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["master weights", "bfloat16 weights"])
def test_a_step_in_bfloat16_with_or_without_master_weights(family, name, weights):
    model = build(family, dtype=torch.float32).train()
    config = fitting(local_window=8, rollout_length=3, positions_per_sequence=3, min_prefix=5, lambda_rl=0.1, **STEPS[name])
    exact = gradients(model, False)[1]
    exact_loss = ReFINEStep(model, config)(IDS, generator=torch.Generator().manual_seed(0)).loss_ntp.item()
    model.to(weights)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        result = ReFINEStep(model, config)(IDS, generator=torch.Generator().manual_seed(0))
    result.loss.backward()
    assert result.loss.dtype == torch.float32 and float(result.loss_ntp.detach()) == pytest.approx(exact_loss, rel=0.02)
    assert all(p.grad.dtype == weights and bool(p.grad.isfinite().all()) for p in model.parameters())
    rounded = torch.cat([p.grad.flatten() for p in model.parameters()]).float()
    assert torch.nn.functional.cosine_similarity(exact, rounded, 0) > 0.9  # the policy's part apart, which is small here


class Products(TorchDispatchMode):
    """Multiplications of matrix products, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.by_dtype: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            factor = args[-2]
            self.by_dtype[factor.dtype] += out.numel() * factor.shape[-1]
        return out


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["master weights", "bfloat16 weights"])
def test_products_of_lact_run_in_bfloat16_forward_and_backward(weights):
    """Of the fast weights' updates and readings too, although these are kept in float32; only window attention's logits are not, and
    the gradient of its probabilities, which is a twelfth of all products here."""
    model = build("lact_swiglu", dtype=torch.float32).train().to(weights)
    with Products() as products, torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        hidden = model.model(IDS, use_cache=False).last_hidden_state
        targets = IDS.roll(-1, 1).flatten()
        loss, _ = linear_cross_entropy(
            hidden.flatten(0, 1), model.lm_head.weight, targets, torch.full(targets.shape, 1 / len(targets))
        )
    with products:
        loss.backward()
    assert products.by_dtype[torch.bfloat16] > 0.9 * products.by_dtype.total(), products.by_dtype


@FAMILIES
@torch.no_grad()
def test_states_of_a_bfloat16_model_are_float32(family):
    model = build(family, dtype=torch.bfloat16)
    cache = model.model(IDS, snapshot_positions=torch.tensor([[17, 99], [3, 63]]), use_cache=True)
    for layer in (*cache.snapshots.layers, *cache.past_key_values.layers):
        fast = [
            x
            for name, x in layer.items()
            if name == "recurrent" or name[:2] in ("w0", "w1", "w2") or name[:4] in ("main", "mome")
        ]
        assert fast and all(x.dtype == torch.float32 for x in fast)
