"""Settings of a run: the method's as one object or flat, the same either way; refused by name; copied, pickled and logged whole."""

import copy
import functools
import json
import pickle
from dataclasses import replace

import pytest
import torch

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.training import PostTrainingConfig, ReFINEConfig, ReFINETrainer, TestTimeConfig
from tests.models.families import build
from tests.training.test_trainer import trainer

ALL_RIGHT = lambda *, completion_ids, **_: torch.ones(len(completion_ids))  # noqa: E731


def rewarded(*, completion_ids, **_):
    return (completion_ids == 0).float()


def config(cls=ReFINEConfig, **settings):
    return cls(output_dir="unused", use_cpu=True, report_to="none", **settings)


@pytest.mark.parametrize("cls", [ReFINEConfig, PostTrainingConfig])
@pytest.mark.parametrize(
    "reward", ["hybrid", rewarded, ALL_RIGHT, ["cosine", rewarded]], ids=["name", "function", "lambda", "two"]
)
def test_one_object_and_flat_keywords_are_the_same(cls, reward):
    at_once = config(cls, nsp=NSPConfig.preset("context", rollout_length=3, reward_funcs=reward))
    flat = config(cls, preset="context", rollout_length=3, reward_funcs=reward)
    mixed = config(cls, nsp=NSPConfig.preset("context"), rollout_length=3, reward_funcs=reward)
    assert at_once.nsp == flat.nsp == mixed.nsp and at_once == flat
    assert flat.nsp.selection == "context_kl" and flat.nsp.num_generations == 8 and flat.nsp.rollout_length == 3
    assert flat.nsp.rewards == (reward if isinstance(reward, list) else [reward])
    assert config(cls, reward_funcs=[reward] if not isinstance(reward, list) else reward).nsp.rewards == flat.nsp.rewards


def test_without_either_it_is_the_default_of_the_command():
    assert config().nsp == NSPConfig(schedule="fused")
    assert config(PostTrainingConfig).nsp == NSPConfig.preset("post_training", schedule="fused")
    assert config(PostTrainingConfig, preset="context").nsp == NSPConfig.preset("context", schedule="fused")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rolout_length": 3}, r"no setting 'rolout_length' \(did you mean 'rollout_length'\?\)"),
        ({"reward": "cosine"}, r"no setting 'reward' \(did you mean 'reward_funcs'\?\)"),
        ({"learning_rte": 1.0}, r"no setting 'learning_rte' \(did you mean 'learning_rate'\?\)"),
        ({"presett": "context"}, r"no setting 'presett' \(did you mean 'preset'\?\)"),
        ({"preset": "contxt"}, r"no preset 'contxt' \(did you mean 'context'\?\)"),
        ({"nsp": NSPConfig(), "preset": "context"}, "got both nsp and preset='context'"),
        ({"context_scores": "cachd"}, "did you mean 'cached'"),
        ({"reward_funcs": "cosin"}, "did you mean 'cosine'"),
    ],
)
@pytest.mark.parametrize("cls", [ReFINEConfig, PostTrainingConfig])
def test_unknown_settings_are_refused_naming_the_nearest(cls, settings, message):
    with pytest.raises(RefineError, match=message):
        config(cls, **settings)


@pytest.mark.parametrize("cls", [ReFINEConfig, PostTrainingConfig])
def test_copies_are_equal_and_keep_the_reward_itself(cls):
    args = config(cls, reward_funcs=ALL_RIGHT, rollout_length=3)
    for copied in (copy.copy(args), copy.deepcopy(args), replace(args, seed=7)):
        assert copied.nsp == args.nsp and copied.nsp.rewards == [ALL_RIGHT]
    assert replace(args, seed=7).seed == 7 and copy.deepcopy(args) == args


@pytest.mark.parametrize("reward", ["hybrid", rewarded, ALL_RIGHT], ids=["name", "function", "lambda"])
def test_pickled_arguments_name_the_reward(reward):
    args = config(PostTrainingConfig, reward_funcs=reward, inner_steps=2, gradient_accumulation_steps=2)
    again = pickle.loads(pickle.dumps(args))
    assert again.inner_steps == 2 and again.nsp.as_dict() == args.nsp.as_dict()
    assert again.nsp.rewards == ["hybrid" if reward == "hybrid" else f"{__name__}.{reward.__qualname__}"]
    assert json.loads(args.to_json_string())["nsp"]["reward_funcs"] == again.nsp.rewards[0]


def test_a_run_with_a_lambda_as_reward_saves_its_arguments(tmp_path):
    t = trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, reward_funcs=lambda *, hidden, **_: hidden[..., 0])
    t.train()
    saved = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert saved.nsp.rollout_length == 3 and saved.nsp.rewards[0].endswith("<lambda>")
    assert "reward_<lambda>" in t.state.log_history[0]


@pytest.mark.parametrize(
    ("settings", "schedule"),
    [
        ({}, "fused"),
        ({"steps_per_generation": 1}, "fused"),
        ({"steps_per_generation": 2}, "snapshot"),
        ({"steps_per_generation": 2, "schedule": "reprefill"}, "reprefill"),
        ({"schedule": "snapshot"}, "snapshot"),
        ({"advantage_scale": "global"}, "fused"),
        ({"gradient_accumulation_steps": 2}, "fused"),
        ({"advantage_scale": "global", "gradient_accumulation_steps": 2}, "snapshot"),
        (
            {"preset": "expected", "reward_funcs": "prefix_match", "gradient_accumulation_steps": 2},
            "auto",
        ),  # there is none to settle
    ],
)
def test_the_schedule_is_settled_by_how_long_rollouts_serve(tmp_path, settings, schedule):
    assert config(**settings).nsp.schedule == schedule
    t = trainer(tmp_path, **settings)
    assert t.nsp.schedule == schedule and t.phase.config == t.nsp
    assert t.phase.prepares_steps == (schedule in ("snapshot", "reprefill"))


def test_a_selection_by_its_published_name_can_be_set_on_a_config_that_has_another():
    assert config(nsp=NSPConfig(), selection="argmax").nsp.score == "entropy"
    assert replace(NSPConfig.preset("context"), selection="argmin").drawn == "least"
    assert copy.copy(NSPConfig(reward_funcs=ALL_RIGHT)).rewards == [ALL_RIGHT]


def test_a_reward_that_is_a_partial_has_a_name_too():
    args = config(reward_funcs=functools.partial(rewarded))
    assert json.loads(args.to_json_string())["nsp"]["reward_funcs"] == "functools.partial"


@pytest.mark.parametrize(
    ("autocast", "given", "loaded"),
    [({}, None, None), ({"bf16": True}, None, "float32"), ({"bf16": True}, "bfloat16", "bfloat16"), ({}, "float64", "float64")],
)
def test_weights_are_trained_in_float32_under_autocast_unless_told_otherwise(tmp_path, autocast, given, loaded):
    assert ReFINEConfig(output_dir=str(tmp_path), use_cpu=True, **autocast).weights_dtype(given) == loaded


@pytest.mark.parametrize("schedule", ["fused", "snapshot"])
def test_a_kl_term_without_its_reference_is_refused_before_training(schedule, tmp_path):
    args = ReFINEConfig(output_dir=str(tmp_path), kl_coef=0.1, schedule=schedule, report_to="none", use_cpu=True)
    with pytest.raises(RefineError, match=r"kl_coef=0\.1 needs a reference_model"):
        ReFINETrainer(build("delta_net"), args)
    with pytest.raises(RefineError, match=r"kl_coef=0\.1 needs a frozen reference model"):
        TestTimeConfig(nsp=NSPConfig.preset("test_time", kl_coef=0.1))
