"""A whole optimizer step, from the data loader to the update, waits for the device at most four times; what is logged is read apart."""

from functools import partial

import pytest

from tests.device_rules import DeviceRules
from tests.training import test_nested
from tests.training.test_trainer import data, trainer

RUNS = {
    "ntp": ({"objective": "ntp"}, 1),
    "closed form": ({"preset": "expected", "reward_funcs": "prefix_match", "local_window": 8}, 1),
    "fused": ({"schedule": "fused"}, 2),
    "fused, eight rollouts": ({"schedule": "fused", "num_generations": 8, "baseline": "leave_one_out"}, 2),
    "snapshot": ({"schedule": "snapshot"}, 3),
}
NESTED = {"none": 1, "ntp": 2, "refine": 3}  # two updates, whose gradients must be finite


@pytest.mark.parametrize("name", RUNS)
def test_an_optimizer_step_waits_for_its_positions_and_for_the_gradient_to_be_finite(name, tmp_path):
    settings, waits = RUNS[name]

    made = partial(trainer, train_dataset=data(24), **settings)
    short, long = (waited(made(tmp_path / str(steps), max_steps=steps, logging_steps=100)) for steps in (1, 3))
    assert len(long) - len(short) <= 2 * waits <= 2 * 4, long


@pytest.mark.parametrize("objective", NESTED)
def test_a_step_of_post_training_has_two_updates(objective, tmp_path):
    rows = test_nested.data(16)
    short, long = (
        waited(test_nested.trainer(tmp_path / str(n), rows=rows, max_steps=n, logging_steps=100, objective=objective))
        for n in (1, 3)
    )
    assert len(long) - len(short) <= 2 * NESTED[objective], long


def waited(run) -> list[str]:
    with DeviceRules() as rules:
        run.train()
    return rules.waits
