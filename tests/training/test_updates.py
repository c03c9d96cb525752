"""Inner and outer updates of a step are made alike: scaled, clipped, skipped where the gradient is not finite, and counted as steps."""

import math
from contextlib import nullcontext
from itertools import count

import pytest
import torch
from transformers import TrainerCallback

from tests.training.test_nested import data, trainer, weights

# Backward passes of a run with one micro-batch a step and one inner step: inner, outer, inner, outer ...
INNER, OUTER = {1, 3, 5, 7, 9, 11}, {2, 4, 6, 8, 10, 12}


def spoil(t, passes: set[int]) -> None:
    """Make the gradient of these backward passes, counted from 1, infinite."""
    number = count(1)
    t.model.lm_head.weight.register_hook(lambda g: g * math.inf if next(number) in passes else None)


class LossScaling(TrainerCallback):
    """What accelerate sets up for float16 on a GPU, here on the CPU, once it has prepared model and optimizer; without the float16."""

    def __init__(self, t, monkeypatch) -> None:
        self.trainer, self.monkeypatch = t, monkeypatch
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        t.compute_loss_context_manager = nullcontext

    def on_train_begin(self, args, state, control, **kwargs):
        accelerator, optimizer = self.trainer.accelerator, self.trainer.optimizer
        accelerator.scaler, accelerator.native_amp = self.scaler, True
        self.monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
        optimizer.__init__(optimizer.optimizer, scaler=self.scaler)  # in place: the scheduler knows it


def scaled(t, monkeypatch) -> torch.amp.GradScaler:
    callback = LossScaling(t, monkeypatch)
    t.add_callback(callback)
    return callback.scaler


def assert_same(a, b) -> None:
    assert weights(a.model).keys() == weights(b.model).keys()
    for name, value in weights(a.model).items():
        assert torch.equal(value, weights(b.model)[name]), name
    assert len(a.optimizer.state) == len(b.optimizer.state)
    for own, other in zip(a.optimizer.state.values(), b.optimizer.state.values(), strict=True):
        assert all(torch.equal(own[k], other[k]) for k in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("max_grad_norm", [0.05, 0.0])
@pytest.mark.parametrize("objective", ["ntp", "refine"])
def test_loss_scaling_changes_nothing(tmp_path, monkeypatch, objective, max_grad_norm):
    settings = {"objective": objective, "max_grad_norm": max_grad_norm, "gradient_accumulation_steps": 4, "inner_steps": 2}
    plain, t = (trainer(tmp_path, rows=data(16), **settings) for _ in range(2))
    scaler = scaled(t, monkeypatch)
    plain.train()
    t.train()
    assert t.guard.skipped == 0 and scaler.get_scale() == 1024.0
    assert {float(s["step"]) for s in t.optimizer.state.values()} == {6.0}
    assert_same(t, plain)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize(("passes", "skipped"), [({1}, 1), ({2}, 1), ({1, 2}, 2)], ids=["inner", "outer", "both"])
def test_an_overflow_is_skipped_and_lowers_the_scale(tmp_path, monkeypatch, passes, skipped, max_grad_norm):
    plain, t = (trainer(tmp_path, objective="ntp", max_grad_norm=max_grad_norm) for _ in range(2))
    scaler = scaled(t, monkeypatch)
    for each in (plain, t):
        spoil(each, passes)
        each.train()
    assert t.guard.skipped == skipped and scaler.get_scale() == 1024.0 / 2**skipped
    assert {float(s["step"]) for s in t.optimizer.state.values()} == {4.0 - skipped}
    assert_same(t, plain)


def test_a_skipped_inner_update_leaves_the_outer_step_as_it_would_be_alone(tmp_path):
    nested, alone = trainer(tmp_path, objective="ntp"), trainer(tmp_path, objective="none")
    spoil(nested, INNER)
    nested.train()
    alone.train()
    assert nested.guard.skipped == 2 and nested.state.log_history[-2]["skipped_steps"] == 2
    assert_same(nested, alone)


@pytest.mark.parametrize("passes", [INNER, OUTER, INNER | OUTER], ids=["inner", "outer", "both"])
def test_an_update_that_always_fails_ends_the_run_whatever_the_others_do(tmp_path, passes):
    t = trainer(tmp_path, objective="ntp", max_steps=6, max_skipped_steps=3)
    spoil(t, passes)
    with pytest.raises(ValueError, match=r"not finite in 3 steps in a row \(last: step 3\)"):
        t.train()
    assert t.state.global_step == 2


def test_steps_between_those_that_fail_begin_the_count_anew(tmp_path):
    t = trainer(tmp_path, objective="ntp", max_steps=6, max_skipped_steps=2)
    spoil(t, {1, 2, 6, 9, 10})  # both of step 1, the outer of 3, both of 5
    t.train()
    assert t.state.global_step == 6 and t.guard.skipped == 5 and t.guard.in_a_row == 0


def test_inner_steps_of_one_step_count_as_one(tmp_path):
    t = trainer(tmp_path, objective="ntp", gradient_accumulation_steps=4, inner_steps=4, max_steps=6, max_skipped_steps=2)
    with torch.no_grad():
        t.model.lm_head.weight[5, 3] = math.nan
    with pytest.raises(ValueError, match="in 2 steps in a row"):
        t.train()
    assert t.guard.skipped == 6 and not t.optimizer.state  # four inner and the outer of step 1, the first of step 2
