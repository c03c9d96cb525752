"""A step of a float64 model is float64 from its states to its gradients: no operation makes a narrower number on the way."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from refine_nsp.config import NSPConfig
from refine_nsp.nsp.rewards import edit_similarity
from refine_nsp.nsp.step import ReFINEStep
from tests.models.families import FAMILY_NAMES, LACT_VARIANTS, build
from tests.nsp.test_step import LENGTHS, generator, ids

STEPS = {
    "fused": {"schedule": "fused"},
    "snapshot, rewards together": {
        "schedule": "snapshot", "num_generations": 2, "advantage_scale": "global", "baseline": "leave_one_out",
        "reward": ["hybrid", "prefix_match", edit_similarity], "selection": "context_kl", "kl_coef": 0.1, "entropy_coef": 0.1,
    },
    "reprefill": {"schedule": "reprefill", "selection": "context_gain"},
    "by segments": {"segment_tokens": 40},
    "exact": {"estimator": "exact"},
    "exact, gain": {"estimator": "exact", "weights": "context_gain", "likelihood_share": 0.3},
    "exact at positions": {"estimator": "exact", "weights": "selected"},
    "likelihood": {"estimator": "likelihood"},
}  # fmt: skip


class Narrow(TorchDispatchMode):
    """Operations that make floating-point numbers narrower than float64, forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64:
                self.found.add(f"{function}: {x.dtype} {tuple(x.shape)}")
        return result


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("family", [*FAMILY_NAMES, "lact with muon"])
def test_nothing_of_a_step_is_narrower(family, name):
    fields = LACT_VARIANTS["prenorm_muon"] if family == "lact with muon" else {}
    family = "lact_swiglu" if fields else family
    model, reference = build(family, **fields).train(), build(family, seed=7, **fields)
    config = NSPConfig(positions_per_sequence=3, min_prefix=5, local_window=8, **STEPS[name])
    step = ReFINEStep(model, config, reference)
    with Narrow() as narrow:
        result = step(ids(), lengths=LENGTHS, generator=generator())
        result.loss.backward()
    assert narrow.found == set()
    assert all(p.grad.dtype == torch.float64 for p in model.parameters() if p.grad is not None)


def test_a_narrow_number_is_noticed():
    with Narrow() as narrow:
        (torch.ones(2, dtype=torch.float64) * torch.tensor([1, 2]).to(torch.float32)).sum()
    assert any("float32" in found for found in narrow.found)
