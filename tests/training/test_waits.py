"""A whole optimizer step, from the data loader to the update, waits for the device at most four times; what is logged is read apart."""

import pytest

from tests.device_rules import DeviceRules
from tests.training.test_trainer import data, trainer

RUNS = {
    "ntp": ({"objective": "ntp"}, 1),
    "exact": ({"preset": "exact", "reward_funcs": "prefix_match", "local_window": 8}, 1),
    "fused": ({"schedule": "fused"}, 2),
    "fused, eight rollouts": ({"schedule": "fused", "num_generations": 8, "baseline": "leave_one_out"}, 2),
    "snapshot": ({"schedule": "snapshot"}, 3),
}


@pytest.mark.parametrize("name", RUNS)
def test_an_optimizer_step_waits_for_its_positions_and_for_the_gradient_to_be_finite(name, tmp_path):
    settings, waits = RUNS[name]

    def waited(steps: int) -> list[str]:
        run = trainer(tmp_path / str(steps), max_steps=steps, train_dataset=data(24), logging_steps=100, **settings)
        with DeviceRules() as rules:
            run.train()
        return rules.waits

    short, long = waited(2), waited(4)
    assert len(long) - len(short) <= 2 * waits <= 2 * 4, long
