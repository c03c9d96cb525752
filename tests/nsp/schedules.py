"""The step's schedules compared: one loss and one gradient, from sampling and for given rollouts."""

from typing import Any

import torch

from refine_nsp.config import NSPConfig
from refine_nsp.nsp.module import ReFINEStep


def gradients(model) -> dict[str, torch.Tensor]:
    """Of all parameters that have one; they are cleared."""
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_same_gradients(a: dict, b: dict, tolerance: float = 1e-8) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert float((a[name] - b[name]).norm()) <= tolerance * float(b[name].norm()) + 1e-12, name


def assert_schedules_agree(model, ids: torch.Tensor, lengths: torch.Tensor, reference: Any = None, **settings: Any) -> None:
    """Fused and snapshot against reprefill: the same positions and rollouts, losses and gradients within 1e-8."""
    found, chosen = {}, None
    for schedule in ("reprefill", "snapshot", "fused"):
        step = ReFINEStep(model, NSPConfig(schedule=schedule, **settings), reference_model=reference)
        sampled = step(ids, lengths=lengths, generator=torch.Generator().manual_seed(0))
        sampled.loss.backward()
        from_sampling = gradients(model)
        chosen = chosen or (sampled.positions, sampled.rollouts, sampled.log_probs - 0.3)
        assert torch.equal(sampled.positions, chosen[0]) and torch.equal(sampled.rollouts, chosen[1])
        given = step.score(ids, *chosen[:2], lengths=lengths, old_log_probs=chosen[2])
        given.loss.backward()
        found[schedule] = (sampled.loss, from_sampling, given.loss, gradients(model))
    for schedule in ("snapshot", "fused"):
        for i in (0, 2):
            torch.testing.assert_close(found[schedule][i], found["reprefill"][i], rtol=1e-8, atol=1e-10)
        for i in (1, 3):
            assert_same_gradients(found[schedule][i], found["reprefill"][i])
