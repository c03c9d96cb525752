"""A learning rate of the memory's own: which parameters learn at it, by which schedule, and what stays as it is."""

import json

import pytest
import torch
from transformers import get_scheduler

from refine_nsp.errors import RefineError
from refine_nsp.training.memory_rate import by_rate, memory_parameters
from tests.models.families import build
from tests.models.transformers_models import stateful
from tests.training.test_trainer import assert_close, trainer, weights

MEMORY = ("w0", "w1", "w2", "lr_proj", "momentum_proj", "qk_scale", "qk_offset", "ttt_scale_proj", "ttt_norm")
LACT = dict(family="lact_swiglu", objective="ntp")
BOTH = dict(LACT, learning_rate=1e-4, fast_weight_learning_rate=1e-2)


def is_memory(name: str) -> bool:
    return ".attn." in name and name.split(".attn.")[1].split(".")[0] in MEMORY


@pytest.mark.parametrize("fields", [{}, {"w0_w2_low_rank": -1}, {"use_momentum": False, "learnable_ttt_scale": False}])
def test_the_memory_is_what_attention_alone_has_not(fields):
    model = build("lact_swiglu", **fields)
    own = set(map(id, memory_parameters(model)))
    named = {name for name, p in model.named_parameters() if id(p) in own}
    assert named == {name for name, _ in model.named_parameters() if is_memory(name)} and named


def test_both_groups_follow_the_schedule_and_weight_decay_stays(tmp_path):
    t = trainer(tmp_path, **BOTH, lr_scheduler_type="cosine", warmup_steps=1, weight_decay=0.1, max_steps=4)
    plain = trainer(tmp_path / "plain", **LACT, weight_decay=0.1)
    decays = {}
    for own in (t, plain):
        optimizer = own.create_optimizer()
        names = {id(p): name for name, p in own.model.named_parameters()}
        decays[own] = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[t] == decays[plain]
    for group in t.optimizer.param_groups:
        names = {name for name, p in t.model.named_parameters() if any(p is q for q in group["params"])}
        assert {is_memory(name) for name in names} == {group["lr"] == 1e-2}
    t.train()
    logs = [x for x in t.state.log_history if "loss" in x]
    reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, factors = get_scheduler("cosine", reference, 1, 4), []
    for _ in range(4):
        factors.append(schedule.get_last_lr()[0])
        reference.step()
        schedule.step()
    assert [x["learning_rate"] for x in logs] == pytest.approx([1e-4 * f for f in factors])
    assert [x["fast_weight_learning_rate"] for x in logs] == pytest.approx([1e-2 * f for f in factors])


def test_a_step_at_one_rate_for_both_is_the_plain_step(tmp_path):
    one, two = trainer(tmp_path / "1", **LACT), trainer(tmp_path / "2", **LACT, fast_weight_learning_rate=1e-2)
    one.train(), two.train()
    assert_close(weights(one), weights(two), atol=1e-12)
    assert [rate for rate, _ in by_rate(two.model, two.args)] == [1e-2, 1e-2]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"objective": "refine", "estimator": "closed_form", "reward_funcs": "prefix_match", "local_window": 8},
        {"objective": "refine", "num_generations": 2, "schedule": "snapshot"},
        {"segment_tokens": 20},
        {"gradient_checkpointing": True},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_with_a_rate_of_0_the_memory_alone_is_trained_and_the_rest_has_no_gradient(tmp_path, settings):
    fields = {name: settings.pop(name) for name in ("tie_word_embeddings",) if name in settings}
    settings = {**LACT, "fast_weight_learning_rate": 1e-2, "max_grad_norm": 0, **settings}
    t = trainer(tmp_path / "0", **settings, learning_rate=0.0, model=build("lact_swiglu", **fields))
    # The same gradients as those of a run in which everything has one.
    whole = trainer(tmp_path / "1", **settings, learning_rate=1e-30, model=build("lact_swiglu", **fields))
    before = weights(t)
    t.train(), whole.train()
    after = weights(t)
    for name, parameter in t.model.named_parameters():
        assert parameter.requires_grad == is_memory(name)
        assert torch.equal(before[name], after[name]) != is_memory(name), name
    assert_close(after, weights(whole), atol=1e-8)
    logs = next(x for x in t.state.log_history if "loss" in x)
    assert logs["learning_rate"] == 0 and logs["fast_weight_learning_rate"] == 1e-2


def test_a_schedule_that_ends_at_a_rate_of_its_own_takes_the_memorys_rate(tmp_path):
    t = trainer(tmp_path, **{**BOTH, "learning_rate": 0.0}, lr_scheduler_type="polynomial", lr_scheduler_kwargs={"lr_end": 1e-3})
    t.train()
    logged = [x["fast_weight_learning_rate"] for x in t.state.log_history if "loss" in x]
    assert logged == pytest.approx([1e-2, 7e-3, 4e-3])


@pytest.mark.parametrize("settings", [BOTH, {**BOTH, "learning_rate": 0.0}], ids=["both", "memory alone"])
def test_a_resumed_run_equals_the_uninterrupted_one_and_compares_the_rate(tmp_path, settings):
    settings = {**settings, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "linear"}
    whole = trainer(tmp_path, **settings)
    whole.train()
    resumed = trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_close(weights(whole), weights(resumed))
    other = trainer(tmp_path, **{**settings, "fast_weight_learning_rate": 2e-2})
    with pytest.raises(RefineError, match=r"fast_weight_learning_rate was 0.01, now 0.02"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    card = (tmp_path / "checkpoint-2" / "README.md").read_text()
    assert "fast_weight_learning_rate | 0.01" in card
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("fast_weight_learning_rate" in line for line in lines)


def test_one_batch_of_8_equals_8_batches_of_1(tmp_path):
    one = trainer(tmp_path / "1", **BOTH, max_steps=2, per_device_train_batch_size=8)
    many = trainer(tmp_path / "8", **BOTH, max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    one.train(), many.train()
    assert_close(weights(one), weights(many))


@pytest.mark.parametrize("family", ["delta_net", "gated_deltanet"])
def test_a_family_without_parameters_of_its_memory_alone_is_refused(tmp_path, family):
    with pytest.raises(RefineError, match=r"fast_weight_learning_rate=0.01: in .* no parameter is the memory's alone"):
        trainer(tmp_path, family, fast_weight_learning_rate=1e-2)


def test_a_model_of_transformers_is_refused(tmp_path):
    with pytest.raises(RefineError, match="no parameter is the memory's alone"):
        trainer(tmp_path, model=stateful("llama"), fast_weight_learning_rate=1e-2)


def test_what_would_train_nothing_or_twice_is_refused(tmp_path):
    from peft import LoraConfig

    from refine_nsp.models.adapters import new_adapters

    adapted = new_adapters(build("lact_swiglu"), LoraConfig(target_modules=["qkv"]), 0)
    with pytest.raises(RefineError, match="with adapters"):
        trainer(tmp_path, model=adapted, fast_weight_learning_rate=1e-2)
    frozen = build("lact_swiglu").requires_grad_(False)
    with pytest.raises(RefineError, match="requires a gradient"):
        trainer(tmp_path, model=frozen, fast_weight_learning_rate=1e-2)
    with pytest.raises(RefineError, match="fast_weight_learning_rate must be a finite number above 0"):
        trainer(tmp_path, **{**BOTH, "fast_weight_learning_rate": 0.0})
    model = build("lact_swiglu")
    optimizers = (torch.optim.SGD(model.parameters(), lr=1.0), None)
    with pytest.raises(RefineError, match="for the optimizer that the trainer makes"):
        trainer(tmp_path, model=model, **{k: v for k, v in BOTH.items() if k != "family"}, optimizers=optimizers)
