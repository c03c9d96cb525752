"""The schedule is resolved in one place: what a run needs decides it, and what cannot be done is refused by name."""

import pytest

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.nsp.schedule import SCHEDULES, Needs, schedule_of, with_schedule


@pytest.mark.parametrize(
    ("settings", "needs", "name"),
    [
        ({}, {}, "fused"),
        ({}, {"steps_per_generation": 2}, "snapshot"),
        ({}, {"micro_batches": 2}, "fused"),
        ({"advantage_scale": "global"}, {}, "fused"),
        ({"advantage_scale": "global"}, {"micro_batches": 2}, "snapshot"),
        ({}, {"beforehand": True}, "snapshot"),
        ({"segment_tokens": 8}, {}, "snapshot"),
        ({"schedule": "fused", "segment_tokens": 8}, {}, "fused"),
        ({"schedule": "fused"}, {"beforehand": True}, "fused"),
        ({"schedule": "reprefill"}, {"steps_per_generation": 2}, "reprefill"),
    ],
)
def test_auto_samples_in_the_pass_that_learns_where_it_can(settings, needs, name):
    config = NSPConfig(**settings)
    assert schedule_of(config, Needs(**needs)) == SCHEDULES[name]
    assert with_schedule(config, Needs(**needs)).schedule == name
    # What was settled stays as it is for whoever knows nothing of the run's needs.
    assert schedule_of(with_schedule(config, Needs(**needs))) == SCHEDULES[name]


def test_the_two_facts_are_independent_of_each_other_and_of_the_name():
    assert [(s.two_passes, s.recomputes) for s in SCHEDULES.values()] == [(False, False), (True, False), (True, True)]
    assert all(name == s.name for name, s in SCHEDULES.items())


def test_without_rollouts_there_is_nothing_to_schedule():
    config = NSPConfig.preset("expected")
    found = schedule_of(config, Needs(micro_batches=4))
    assert not found.two_passes and not found.recomputes and with_schedule(config, Needs(micro_batches=4)) is config


@pytest.mark.parametrize(
    ("settings", "needs", "words"),
    [
        (
            {"schedule": "fused"},
            {"steps_per_generation": 2},
            "steps_per_generation=2 cannot reuse its rollouts; use schedule='snapshot'",
        ),
        ({"schedule": "fused", "advantage_scale": "global"}, {"micro_batches": 3}, "one scale for the 3 micro-batches"),
        ({"estimator": "closed_form"}, {"steps_per_generation": 2}, "makes no rollouts that steps_per_generation=2 could reuse"),
    ],
)
def test_what_a_schedule_cannot_do_is_refused(settings, needs, words):
    with pytest.raises(RefineError, match=words):
        schedule_of(NSPConfig(**settings), Needs(**needs))
