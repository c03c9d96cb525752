"""The seam: an objective of one's own is one small class, counted, normalised, logged and validated like the built-in ones."""

import math
import textwrap

import pytest
import torch

from refine_nsp.config import NSPConfig
from refine_nsp.training import phases
from refine_nsp.training.phases import NextToken
from tests.training import test_nested
from tests.training.test_trainer import assert_close, data, trainer, weights

CONFIG = NSPConfig(min_prefix=5, positions_per_sequence=2, rollout_length=3)


def documented() -> type[NextToken]:
    """The class in the module's docstring."""
    _, _, rest = phases.__doc__.partition("something else):\n\n")
    code, _, _ = textwrap.dedent(rest).partition("\nReFINETrainer(")
    assert "._" not in code and len(code.strip().splitlines()) < 15
    scope: dict = {}
    exec(code, scope)
    return scope["EntropyWeighted"]


def test_the_documented_objective_is_trained_with(tmp_path):
    phase = documented()
    big = trainer(tmp_path / "a", phase=phase(CONFIG), per_device_train_batch_size=8, eval_dataset=data(5))
    small = trainer(tmp_path / "b", phase=phase(CONFIG), per_device_train_batch_size=1, gradient_accumulation_steps=8)
    plain = trainer(tmp_path / "c", objective="ntp", per_device_train_batch_size=8)
    for t in (big, small, plain):
        t.train()
    assert_close(weights(big), weights(small))
    assert any(not torch.allclose(p, weights(plain)[name]) for name, p in weights(big).items())
    a, b = big.state.log_history[0], small.state.log_history[0]
    assert a["loss_weighted"] == pytest.approx(a["loss"]) == pytest.approx(b["loss_weighted"])
    assert 0 < a["share_unsure"] <= 1
    assert math.isfinite(big.evaluate()["eval_loss"])


def test_the_documented_objective_is_what_it_says(tmp_path):
    t = trainer(tmp_path, phase=documented()(CONFIG), max_steps=1, train_dataset=data(4))
    total = count = 0.0
    with torch.no_grad():
        for row in t.train_dataset:
            ids = torch.tensor(row["input_ids"])
            log_p = t.model(ids[None]).logits[0, :-1].log_softmax(-1)
            total -= float(((log_p.exp() * -log_p).sum(-1) * log_p.gather(-1, ids[1:, None])[:, 0]).sum())
            count += len(ids) - 1
    t.train()
    assert t.state.log_history[0]["loss"] == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_losses_are_divided_by_what_a_phase_counts_however_little_that_is(tmp_path, scale):
    class Weighed(NextToken):
        def count(self, batch):
            return {"weight": scale * batch.sequences.num_targets}

        def loss(self, model, batch):
            batch.totals = {"targets": batch.totals["weight"] / scale}
            return super().loss(model, batch)

    weighed = trainer(tmp_path / "a", phase=Weighed(CONFIG), per_device_train_batch_size=1, gradient_accumulation_steps=4)
    plain = trainer(tmp_path / "b", objective="ntp", per_device_train_batch_size=4)
    weighed.train()
    plain.train()
    assert_close(weights(weighed), weights(plain))


def watched(phase: type[NextToken], seen: list) -> NextToken:
    class Watched(phase):
        def prepare(self, model, batches):
            seen.append((len(batches), model.training, torch.is_grad_enabled()))

    return Watched(CONFIG)


def test_every_step_is_prepared_without_gradients_in_eval_mode(tmp_path):
    seen = []
    trainer(tmp_path / "a", phase=watched(NextToken, seen), gradient_accumulation_steps=2, max_steps=2).train()
    assert seen == [(2, False, False)] * 2
    t, inner = test_nested.trainer(tmp_path / "b", objective="ntp", gradient_accumulation_steps=4, inner_steps=2), []
    t.inner = watched(NextToken, inner)
    t.train()
    assert inner == [(2, False, False)] * 2 * 2
