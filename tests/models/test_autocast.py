"""Mixed precision: bfloat16 products under autocast change results by rounding alone, wherever the backward pass is started."""

import pytest
import torch

from refine_nsp.ops.linear_cross_entropy import linear_cross_entropy
from tests.models.families import build

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
