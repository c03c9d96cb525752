"""On an accelerator a step waits for the device once, for its positions, and never mixes the host's tensors with the device's."""

from dataclasses import replace

import pytest
import torch

from refine_nsp.config import NSPConfig
from refine_nsp.nsp.forward import run_hidden
from refine_nsp.nsp.module import ReFINEStep
from refine_nsp.nsp.next_token import next_token_loss
from refine_nsp.nsp.records import Batch
from refine_nsp.training.lane_states import LaneStates
from tests.device_rules import DeviceRules, Readings, host
from tests.models.families import FAMILY_NAMES, build
from tests.nsp.test_step import LENGTHS, generator, ids
from tests.settings import fitting

STEPS = {
    "closed form": ({"estimator": "closed_form"}, 0),
    "closed form, gain": ({"estimator": "closed_form", "token_weights": "context_gain"}, 0),
    "closed form, selected": ({"estimator": "closed_form", "token_weights": "selected"}, 0),
    "paper": ({"reward_funcs": "hybrid"}, 1),
    "published": ({"reward_funcs": "hybrid", "published": True}, 1),
    "eight rollouts": ({"num_generations": 8, "baseline": "leave_one_out", "advantage_scale": "global"}, 1),
    "context": ({"selection": "context_kl", "num_generations": 2}, 1),
    "closed form, by segments": ({"estimator": "closed_form", "segment_tokens": 64}, 0),
    "by segments": ({"segment_tokens": 64}, 2),
    # One wait for each of its two passes.
    "snapshot": ({"schedule": "snapshot", "num_generations": 2}, 2),
}


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_asks_the_device_for_its_positions_and_nothing_else(family, name):
    settings, waits = STEPS[name]
    config = fitting(local_window=8, rollout_length=3, positions_per_sequence=3, min_prefix=5, **settings)
    step = ReFINEStep(build(family, dtype=torch.float32).train(), config)
    with DeviceRules() as rules:
        result = step(ids(), host(LENGTHS.clone()), generator())
    with DeviceRules() as again, Readings() as backward:
        result.loss.backward()
    assert not again.waits
    assert not backward.ops or config.segment_tokens is not None  # segments, run again, read the host's lengths
    assert not rules.mixed and len(rules.waits) <= waits, rules.waits
    assert all(isinstance(v, torch.Tensor) for n, v in result.metrics.items() if not n.startswith("seconds"))


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("name", ["closed form", "paper", "context", "closed form, by segments"])
def test_carried_states_stay_on_the_device(family, name):
    settings, waits = STEPS[name]
    config = fitting(local_window=8, rollout_length=3, positions_per_sequence=3, min_prefix=5, **settings)
    step, lanes, n = ReFINEStep(build(family, dtype=torch.float32).train(), config), LaneStates(recent=16), len(LENGTHS)
    with DeviceRules() as rules:
        for i in range(3):
            lanes.forget([0] if i == 2 else [])
            starts = lanes.starts(range(n), torch.device("cpu"))
            starts = replace(starts, recent=starts.recent.detach())  # the test's device is the host's
            batch = Batch.of(ids(), host(LENGTHS.clone()), starts=starts)
            result = step(batch.input_ids, batch.lengths, generator(), starts=starts)
            lanes.keep(range(n), batch, result.left)
    # Whether states are finite is asked once for all lanes, as the next windows begin.
    assert not rules.mixed and len(rules.waits) <= 3 * waits + 2, rules.waits


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_next_token_prediction_never_waits(family):
    model, batch = build(family, dtype=torch.float32).train(), Batch.of(ids(), host(LENGTHS.clone()))
    with DeviceRules() as rules:
        loss, _ = next_token_loss(model, run_hidden(model, batch, NSPConfig()), batch)
    with Readings() as backward:
        loss.backward()
    assert not rules.waits and not rules.mixed and not backward.ops


def test_the_rules_see_what_they_look_for():
    x, n = torch.randn(3), torch.arange(3)
    with DeviceRules() as rules:
        float(x.sum())
        x.tolist()
        x.cpu().tolist()
        bool((x > 0).any())
        torch.arange(3).tolist()
        int(torch.arange(3).max())
        x + torch.arange(3)
        x + torch.arange(3).to(x.device, non_blocking=True)
        x + torch.arange(3).to(x.device)
        x + torch.tensor([1, 2, 3], device=x.device)
        x + n
        x[x > 0]
        x[torch.zeros(3, dtype=torch.bool)]
    assert len(rules.waits) == 7 and len(rules.mixed) == 1
    y = torch.randn(4, requires_grad=True)
    total = y.clamp(min=0).square().sum() + y[y > 0].sum()
    with Readings() as readings:
        total.backward()
        float(x.sum())
        x[x > 0]
        x[n]
    assert len(readings.ops) == 3, readings.ops  # the gradient of what was picked by a mask, and two of the three lines
