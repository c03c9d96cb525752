"""A step of a float64 model is float64 from its states to its gradients: no operation makes a narrower number on the way."""

import math
from dataclasses import replace

import datasets
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from refine_nsp.config import NSPConfig
from refine_nsp.evaluation.likelihood import log_likelihoods
from refine_nsp.nsp.context import context_divergence
from refine_nsp.nsp.forward import run_hidden
from refine_nsp.nsp.module import ReFINEStep
from refine_nsp.nsp.records import Batch
from refine_nsp.nsp.rewards import edit_similarity
from refine_nsp.training.data import collate
from refine_nsp.training.micro_batches import to_batch
from refine_nsp.training.nested import answer_loss
from refine_nsp.training.scores import wants_gain, with_context_scores
from tests.models.families import FAMILY_NAMES, LACT_VARIANTS, build
from tests.models.transformers_models import float64_throughout, stateful
from tests.nsp import test_step
from tests.nsp.test_step import generator
from tests.settings import fitting
from tests.training.test_trainer import data

LENGTHS = torch.tensor([70, 55, 43])  # more than a chunk of the delta rule, four of LaCT and a segment
STEPS = {
    "fused": {"schedule": "fused"},
    "snapshot, rewards together": {
        "schedule": "snapshot", "num_generations": 2, "advantage_scale": "global", "baseline": "leave_one_out",
        "reward_funcs": ["hybrid", "prefix_match", edit_similarity], "selection": "context_kl", "kl_coef": 0.1, "entropy_coef": 0.1,
    },
    "reprefill": {"schedule": "reprefill", "selection": "context_gain"},
    "by segments": {"segment_tokens": 40},
    "closed form": {"estimator": "closed_form"},
    "closed form, gain": {"estimator": "closed_form", "token_weights": "context_gain", "order": 3},
    "closed form at positions": {"estimator": "closed_form", "token_weights": "selected"},
    "likelihood": {"estimator": "closed_form", "order": math.inf},
}  # fmt: skip


def ids() -> torch.Tensor:
    return test_step.ids(length=70)


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
    config = fitting(positions_per_sequence=3, min_prefix=5, local_window=8, **STEPS[name])
    step = ReFINEStep(model, config, reference)
    with Narrow() as narrow:
        result = step(ids(), lengths=LENGTHS, generator=generator())
        result.loss.backward()
    assert narrow.found == set()
    assert all(p.grad.dtype == torch.float64 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["fused", "closed form"])
def test_nothing_of_a_hybrids_step_is_narrower(name):
    """But for what transformers makes float32 whatever the weights are."""
    model = stateful("qwen3_next").train()
    config = fitting(positions_per_sequence=3, min_prefix=5, local_window=8, **STEPS[name])
    with float64_throughout(), Narrow() as narrow:
        ReFINEStep(model, config)(ids(), lengths=LENGTHS, generator=generator()).loss.backward()
    # transformers' rotary embedding makes positions float32, which holds such whole numbers exactly.
    assert all(found.startswith("aten._to_copy.default") and found.endswith(", 1)") for found in narrow.found)


@pytest.mark.parametrize("settings", [
    {"selection": "context_kl", "reward_funcs": "hybrid"}, {"estimator": "closed_form"},
    {"estimator": "closed_form", "token_weights": "context_gain"},
])  # fmt: skip
def test_scores_that_are_kept_are_float64(tmp_path, monkeypatch, settings):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    model, config = build("delta_net").train(), NSPConfig(positions_per_sequence=3, min_prefix=5, local_window=8, **settings)
    rows = with_context_scores(data(3), model, config)
    assert rows.features["context_scores"].feature.dtype == "float64"
    batch = to_batch(collate(rows), torch.device("cpu"))
    online = context_divergence(model, replace(batch, scores=None), run_hidden(model, batch, config), config, wants_gain(config))
    assert batch.scores.dtype == torch.float64 and float((batch.scores - online * batch.real).abs().max()) < 1e-12
    with Narrow() as narrow:
        step = ReFINEStep(model, config)
        step(batch.input_ids, lengths=batch.lengths, generator=generator(), scores=batch.scores).loss.backward()
    assert narrow.found == set()


def test_the_loss_of_answers_and_likelihoods_are_float64():
    model = build("delta_net").train()
    with Narrow() as narrow:
        answer_loss(model, Batch.of(ids(), LENGTHS), torch.full((3,), 4), 12.0, NSPConfig()).backward()
        log_likelihoods(model, [([1, 2, 3], [4, 5]), ([6, 7], [8])], 100)
    assert narrow.found == set()


def test_a_narrow_number_is_noticed():
    with Narrow() as narrow:
        (torch.ones(2, dtype=torch.float64) * torch.tensor([1, 2]).to(torch.float32)).sum()
    assert any("float32" in found for found in narrow.found)
