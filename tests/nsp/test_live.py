"""`NSPConfig.live` tells the truth: what it leaves out changes no step, and each name that it has changes one."""

import copy
import functools
import itertools
import pickle
import random
from dataclasses import fields, replace

import pytest
import torch

from refine_nsp.config import PRESETS, NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.fields import default_of
from refine_nsp.nsp.module import ReFINEStep
from tests.models.families import build
from tests.settings import fitting

# Where scores only decide which token is the greatest, another value may happen to choose the same ones in the first input.
INPUTS = [torch.randint(0, 64, (2, 48), generator=torch.Generator().manual_seed(seed)) for seed in range(1, 5)]
LENGTHS = torch.tensor([48, 43])
# Small enough for rows this short, and nothing at a value that hides another (N = 1, one reward, no KL).
SMALL = {"positions_per_sequence": 3, "rollout_length": 2, "num_generations": 2, "min_prefix": 4, "local_window": 8, "tau": 0.02}
ACTIVE = {"reward_funcs": ["cosine", "exact_match"], "kl_coef": 0.1, "lambda_rl": 1.0}
AXES = {
    "selection": ["entropy", "context_kl", "context_gain", "none", "uniform", "argmax", "argmin"],
    "draw": [None, "greatest", "least"],
    "smoothing": ["centred", "published", "none"],
    "schedule": ["fused", "snapshot", "reprefill"],
    "published": [False, True],
}
# Other values of each field, of which at least one must change something where the field is live.
OTHERS = {
    "positions_per_sequence": [2], "rollout_length": [3], "num_generations": [3], "order": [2, float("inf")],
    "token_weights": ["context", "context_gain", "selected"], "reward_funcs": ["prefix_match"], 
    "reward_weights": [[0.1, 2.0]],
    "selection": ["none", "context_kl", "argmin", "argmax"], "draw": ["greatest", "least", "sample"], "tau": [1.0],
    "smoothing": ["none", "centred", "published"], "smoothing_window": [1, 9], "published": [True, False], "min_prefix": [9, 15],
    "local_window": [6, 4, 12], "local_span": [3], "temperature": [0.5], "advantage_group": ["sequence", "position"],
    "advantage_scale": ["none", "std", "global"], "baseline": ["leave_one_out"], "clip_low": [0.001], "clip_high": [0.001],
    "dual_clip": [1.0001], "kl_coef": [0.7], "entropy_coef": [0.7], "lambda_rl": [0.3], "lambda_ntp": [0.3],
    "schedule": ["snapshot", "fused", "reprefill"], "segment_tokens": [17],
}  # fmt: skip
FIELDS = {f.name: f for f in fields(NSPConfig)}
ONE_RESULT = {"schedule", "segment_tokens"}  # by promise the result is the same: they decide about passes and memory
BY_NAME = {"estimator"}  # decides what the others mean; and in closed form the reward is named, and checked, but not computed


def configurations() -> list[NSPConfig]:
    """Every estimator with every kind of token weights, and sampled ones in which every two values of two axes meet."""
    closed = [
        fitting(estimator="closed_form", token_weights=weights, selection=selection, draw=draw, **SMALL, lambda_rl=1.0)
        for weights, selection, draw in [
            ("context", "entropy", None), ("context_gain", "entropy", None), ("selected", "entropy", None),
            ("selected", "context_kl", "greatest"), ("selected", "uniform", None), ("selected", "none", "least"),
        ]
    ]  # fmt: skip
    pairs = {((a, x), (b, y)) for a, b in itertools.combinations(AXES, 2) for x in AXES[a] for y in AXES[b]}
    rng, sampled = random.Random(0), []
    while pairs:
        (a, x), (b, y) = min(pairs, key=str)
        best: dict = max(
            ({**{n: rng.choice(v) for n, v in AXES.items()}, a: x, b: y} for _ in range(30)),
            key=lambda c: len(pairs & set(itertools.combinations(c.items(), 2))),
        )
        pairs -= set(itertools.combinations(best.items(), 2))
        best = best if best["selection"] not in ("uniform", "argmax", "argmin") else {**best, "draw": None}
        sampled.append(fitting(**SMALL, **ACTIVE, **best, advantage_scale=["std", "none", "global"][len(sampled) % 3]))
    return list(dict.fromkeys(map(Hashed, [*closed, *sampled])))


class Hashed:
    def __init__(self, config: NSPConfig) -> None:
        self.config, self.key = config, str(config.as_dict())

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hashed) and self.key == other.key


def step_of(config: NSPConfig, ids: torch.Tensor, model, moved, reference) -> list[torch.Tensor]:
    """Loss, gradient, positions and rollouts: on policy, or after the policy has moved where rollouts are sampled beforehand."""
    step = ReFINEStep(model, config, reference)
    if not config.samples_rollouts or config.schedule == "fused":
        return outcome(step(ids, LENGTHS, torch.Generator().manual_seed(0)), model)
    rollouts = step.sample(ids, LENGTHS, torch.Generator().manual_seed(0))
    return outcome(ReFINEStep(moved, config, reference).learn(ids, rollouts, LENGTHS), moved)


def outcome(result, model) -> list[torch.Tensor]:
    model.zero_grad()
    result.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return [x for x in (result.loss.detach(), gradient, result.positions, result.rollouts) if x is not None]


def changed(config: NSPConfig, name: str, value: object) -> NSPConfig:
    """The configuration with another value in a field, unchecked."""
    other = object.__new__(NSPConfig)
    other.__dict__.update({f.name: getattr(config, f.name) for f in fields(config)} | {name: value})
    return other


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def models():
    small = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    model, moved, reference = (build("delta_net", seed=seed, **small).train() for seed in (0, 0, 7))
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=p.dtype) * p.abs().mean())
    return model, moved, reference


@pytest.mark.parametrize(
    "config", [h.config for h in configurations()], ids=lambda c: f"{c.estimator}-{c.selection}-{c.schedule}"
)
def test_dead_settings_change_nothing_and_live_ones_something(config, models, monkeypatch):
    monkeypatch.setattr(NSPConfig, "__post_init__", lambda self: None)  # for those that a step derives from an unchecked one
    usual = functools.cache(lambda i: step_of(config, INPUTS[i], *models))

    def changes(name: str, values: list, inputs: int) -> bool:
        others = [changed(config, name, value) for value in values if value != getattr(config, name)]
        pairs = itertools.product(range(inputs), others)
        return any(not equal(usual(i), step_of(other, INPUTS[i], *models)) for i, other in pairs)

    for name, values in OTHERS.items():
        if name not in config.live:
            assert FIELDS[name].metadata["also"] or getattr(config, name) == default_of(FIELDS[name])
            assert not changes(name, values, inputs=1), f"{name} is dead, and changes the step"
        elif name not in ONE_RESULT and (name != "reward_funcs" or config.samples_rollouts):
            assert changes(name, values, inputs=len(INPUTS)), f"{name} is live, and changes nothing"


def test_every_field_has_other_values_to_try():
    assert {f.name for f in fields(NSPConfig)} == set(OTHERS) | BY_NAME


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"estimator": "closed_form", "num_generations": 8, "tau": 9, "schedule": "reprefill"},
            ["num_generations=8, schedule='reprefill' (they need estimator='sampled')", "tau=9 (it needs", "leave them out"],
        ),
        ({"order": 2}, ["order=2 (it needs estimator='closed_form'); leave it out"]),
        ({"token_weights": "selected"}, ["token_weights='selected' (it needs estimator='closed_form')"]),
        ({"estimator": "closed_form", "reward_weights": [2.0]}, ["reward_weights=[2.0] (it needs estimator='sampled')"]),
        ({"draw": "greatest", "tau": 2.0}, ["tau=2.0 (it needs a selection by scores, with draw='sample')"]),
        ({"selection": "uniform", "smoothing": "none"}, ["smoothing='none' (it needs selection='entropy')"]),
        ({"smoothing": "none", "smoothing_window": 3}, ["smoothing_window=3 (it needs entropies that are smoothed"]),
        ({"published": True, "smoothing": "published"}, ["smoothing='published' (it needs published=False)"]),
        ({"selection": "argmax", "draw": "greatest"}, ["draw='greatest' (it needs a selection that names a score and no draw)"]),
        ({"local_window": 8, "local_span": 4}, ["local_window=8, local_span=4 (they need context scores"]),
        ({"schedule": "fused", "clip_low": 0.3, "dual_clip": 2.0}, ["clip_low=0.3, dual_clip=2.0 (they need rollouts sampled beforehand"]),
    ],
)  # fmt: skip
def test_what_nothing_reads_is_refused_by_name_with_what_would_read_it(settings, parts):
    with pytest.raises(RefineError) as refused:
        NSPConfig(**settings)
    for part in ["nothing reads ", *parts]:
        assert part in str(refused.value)


def test_defaults_may_be_given_wherever_they_are_not_read():
    usual = {f.name: default_of(f) for f in fields(NSPConfig)}
    for other in ({}, {"estimator": "closed_form"}, {"selection": "argmax"}, {"published": True}, {"schedule": "fused"}):
        assert NSPConfig(**{**usual, **other}) == NSPConfig(**other)


def test_a_preset_that_stands_in_the_way_is_named_with_what_helps():
    with pytest.raises(
        RefineError, match=r"The preset context sets num_generations, .*, baseline: give num_generations=1, "
    ) as refused:
        NSPConfig.preset("context", estimator="closed_form")
    assert str(refused.value).endswith("or take another preset (expected, likelihood)")
    with pytest.raises(RefineError, match=r"The preset expected sets local_span: give local_span=2 as well"):
        NSPConfig.preset("expected", token_weights="selected")
    with pytest.raises(RefineError, match=r"closed form of the reward cosine.* The preset mid_training sets reward_funcs"):
        NSPConfig.preset("mid_training", estimator="closed_form")
    with pytest.raises(RefineError) as own:  # of what was given beside it, the preset is not to blame
        NSPConfig.preset("likelihood", tau=2.0)
    assert "preset" not in str(own.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_valid_configurations_survive_what_is_done_to_them(preset):
    config = NSPConfig.preset(preset, lambda_ntp=0.5)
    assert NSPConfig(**config.as_dict()) == config == replace(config) == copy.deepcopy(config)
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.at_random().selection == "uniform" and config.at_random().rollout_length == config.rollout_length
