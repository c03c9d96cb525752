"""The seam: an objective of one's own is one small class, counted, normalised, logged and validated like the built-in ones."""

import math
import textwrap

import pytest
import torch

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.training import ReFINETrainer, phases
from refine_nsp.training.phases import NextSequence, NextToken
from tests.training import test_nested
from tests.training.test_trainer import assert_close, data, trainer, weights

CONFIG = NSPConfig(min_prefix=5, positions_per_sequence=2, rollout_length=3)


def documented() -> type[NextToken]:
    """The class in the module's docstring."""
    _, _, rest = phases.__doc__.partition("something else):\n\n")
    code = textwrap.dedent(rest.partition("\n    ReFINETrainer(")[0])
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


class WeightedTargets(NextToken):
    """Cross-entropy at weights that the dataset brings: row b's column `target_weights` has one per token, of its prediction."""

    def count(self, batch):
        return {"weight": float(sum(sum(row) for row in batch.sequences.columns["target_weights"]))}

    def loss(self, model, batch):
        rows = [torch.tensor(row, dtype=torch.float64) for row in batch.sequences.columns["target_weights"]]
        weights = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        log_p = model(batch.input_ids, lengths=batch.lengths).logits[:, :-1].log_softmax(-1)
        nll = -log_p.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        loss = (weights[:, :-1] * nll * batch.target_mask[:, :-1]).sum() / batch.totals["weight"]
        return loss, {"loss_weighted": loss.detach()}


def test_a_phase_reads_weights_of_the_data_and_is_given_an_optimizer_and_a_schedule(tmp_path):
    rows = data(8)
    rows = rows.add_column("target_weights", [[float(i % 5 == 0) for i in range(len(ids))] for ids in rows["input_ids"]])
    falling = dict(lr_scheduler_type="polynomial", lr_scheduler_kwargs={"lr_end": 1e-3, "power": 1.0}, learning_rate=1e-2)

    def run(folder, **settings):
        settings = dict(save_strategy="steps", save_steps=2, train_dataset=rows, max_steps=4, **falling) | settings
        t = trainer(folder, phase=WeightedTargets(CONFIG), **settings)
        decayed = [p for p in t.model.parameters() if p.ndim > 1]
        others = [p for p in t.model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        return ReFINETrainer(
            model=t.model, args=t.args, phase=t.phase, train_dataset=rows,
            optimizers=(torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95)), None),
        )  # fmt: skip

    big = run(tmp_path / "a", per_device_train_batch_size=8)
    small = run(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    big.train()
    small.train()
    assert_close(weights(big), weights(small))
    rates = [record["learning_rate"] for record in big.state.log_history if "learning_rate" in record]
    assert rates == pytest.approx([1e-2, 7.75e-3, 5.5e-3, 3.25e-3])
    assert [g["weight_decay"] for g in big.optimizer.param_groups] == [0.1, 0.0]
    again = run(tmp_path / "a", per_device_train_batch_size=8)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(weights(big).values(), weights(again).values(), strict=True))


class EntropyAtATemperature(NextToken):
    """A phase of one's own that uses a setting of the method's."""

    def loss(self, model, batch):
        loss, metrics = super().loss(model, batch)
        return loss * self.config.tau, metrics


def test_a_phase_of_ones_own_is_resumed_with_its_settings_compared(tmp_path):
    def run(folder, tau, **settings):
        phase = EntropyAtATemperature(NSPConfig(min_prefix=5, tau=tau))
        saves = dict(save_strategy="steps", save_steps=1, objective="ntp")
        return trainer(folder, phase=phase, min_prefix=5, tau=tau, **saves, **settings)

    straight = run(tmp_path / "a", 0.5, max_steps=3)
    straight.train()
    run(tmp_path / "b", 0.5, max_steps=2).train()
    with pytest.raises(RefineError, match=r"tau was 0\.5, now 0\.7"):
        run(tmp_path / "b", 0.7, max_steps=3).train(resume_from_checkpoint=True)
    again = run(tmp_path / "b", 0.5, max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(straight).values(), weights(again).values(), strict=True))


def test_a_phase_says_what_it_uses():
    refine, context, plain = NextSequence(CONFIG), NextSequence(NSPConfig.preset("context")), NextToken(CONFIG)
    assert plain.reads == {"lambda_ntp", "segment_tokens"} < refine.reads == CONFIG.live
    assert {"smoothing"} <= refine.reads - context.reads and {"local_window"} <= context.reads - refine.reads
    assert "tau" in refine.reads and "tau" in documented()(CONFIG).reads
    assert [p.samples for p in (refine, context, plain)] == [True, True, False]
    assert [p.reads_scores for p in (refine, context, plain)] == [False, True, False]
    assert [p.reads_once for p in (refine, plain)] == [False, True]
    assert (refine.shortest, plain.shortest) == (CONFIG.shortest, 2)
