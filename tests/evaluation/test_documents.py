"""Documents read block by block have the figures of one pass."""

from dataclasses import replace

import pytest
import torch

from refine_nsp.config import NSPConfig
from refine_nsp.evaluation import documents
from refine_nsp.nsp.forward import run
from refine_nsp.nsp.records import Batch, Learning, Work, uniforms
from refine_nsp.nsp.rollouts import greedy_match
from refine_nsp.nsp.selection import select_positions, smooth_entropy
from tests.models.families import FAMILY_NAMES, build
from tests.models.transformers_models import float64_throughout, stateful


def whole(model, ids: list[int], config: NSPConfig) -> dict[str, float]:
    """The figures from one pass that keeps all states."""
    batch = Batch.of(torch.tensor([ids]))
    with torch.no_grad():
        forward = run(Work(model, batch, config, learning=Learning(ntp_normalizer=1.0)))
        u, _ = uniforms(1, config.positions_per_sequence, 1, config.rollout_length, torch.Generator().manual_seed(0))
        entropy, figures = smooth_entropy(forward.entropy, batch, config), {}
        for name, scores, selection in (("random", torch.zeros_like(entropy), "uniform"), ("high_entropy", entropy, "argmax")):
            positions = select_positions(scores, batch, u, replace(config, selection=selection))
            prefixes = forward.states(positions)
            match, cosine, places = greedy_match(model, batch.input_ids, forward.hidden, prefixes, config.rollout_length)
            figures |= {f"match_{name}": match / places, f"cosine_{name}": cosine / places}
    return figures


@pytest.mark.parametrize("block", [37, *(pytest.param(block, marks=pytest.mark.slow) for block in (16, 1024))])
@pytest.mark.parametrize("family", [*FAMILY_NAMES, "bamba"])
def test_continuations_block_by_block_are_those_of_one_pass(family, block, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK", block)
    config = NSPConfig(positions_per_sequence=12, rollout_length=4, min_prefix=5)
    with float64_throughout():
        model = build(family) if family in FAMILY_NAMES else stateful(family)
        ids = torch.randint(0, 64, (150,), generator=torch.Generator().manual_seed(0)).tolist()
        got = documents.continuation_match(model, ids, config, seed=0)
        assert got == pytest.approx(whole(model, ids, config), rel=1e-9)
    assert got["match_random"] != got["match_high_entropy"] or got["cosine_random"] != got["cosine_high_entropy"]
