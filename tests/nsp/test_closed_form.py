"""ReFINE in closed form: the expectation it claims to be, by enumeration and by sampling; additive, padded, cached; and what it refuses."""

import copy
import itertools
import json
import math
import pickle

import pytest
import torch

from refine_nsp.config import NSPConfig
from refine_nsp.nsp.context import context_divergence
from refine_nsp.nsp.module import ReFINEStep
from refine_nsp.nsp.records import Batch
from tests.models.families import FAMILY_NAMES, build
from tests.nsp.test_step import LENGTHS, assert_same_gradients, generator, gradients, ids
from tests.settings import fitting

SMALL = {"local_window": 8, "min_prefix": 5, "positions_per_sequence": 3}


def by_hand(model, x, lengths, config, weights):
    """-sum_t w_t J_t from logits, by autograd."""
    K, total = config.rollout_length, 0.0
    for b, n in enumerate(lengths.tolist()):
        log_p = model(x[b : b + 1, :n]).logits[0, :-1].log_softmax(-1).gather(-1, x[b, 1:n, None])[:, 0]
        for t in range(n - K):
            window = log_p[t : t + K]
            log_P = window.cumsum(0)
            if config.order == math.inf:
                J = log_P.mean()
            else:
                J = -sum((1 - log_P.exp()) ** m / m for m in range(1, int(config.order) + 1)).mean()
            total = total - weights[b, t] * J
        assert not weights[b, n - K :].any()
    return total


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("weights", ["context", "context_gain", "selected"])
@pytest.mark.parametrize(("K", "order"), [(1, 1), (3, 1), (3, 2), (5, 8), (3, math.inf)])
def test_the_loss_is_what_anyone_can_recompute(family, weights, K, order):
    model = build(family).train()
    config = fitting(estimator="closed_form", token_weights=weights, rollout_length=K, order=order, lambda_rl=1.7, **SMALL)
    result = ReFINEStep(model, config)(ids(), LENGTHS, generator())
    assert result.rollouts is None and result.rewards is None
    if weights == "selected":
        assert torch.equal(result.token_weights > 0, torch.zeros(3, 150).scatter(1, result.positions, 1.0) > 0)
        torch.testing.assert_close(result.token_weights.sum(), torch.tensor(1.0, dtype=torch.float64))
    else:
        batch = Batch.of(ids(), LENGTHS)
        with torch.no_grad():
            d = context_divergence(model, batch, model(ids()).last_hidden_state, config, weights == "context_gain")
        allowed = torch.arange(150) + K <= LENGTHS[:, None] - 1
        torch.testing.assert_close(result.token_weights, d * allowed / result.num_targets, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(result.loss, 1.7 * result.loss_policy + result.loss_ntp)
    result.loss.backward(retain_graph=True)
    whole = gradients(model)
    result.loss_policy.backward()
    alone = gradients(model)
    expected = by_hand(model, ids(), LENGTHS, config, result.token_weights)
    torch.testing.assert_close(result.loss_policy, expected, rtol=1e-9, atol=1e-12)
    expected.backward(retain_graph=True)
    wanted = gradients(model)
    assert_same_gradients({n: g for n, g in alone.items() if n in wanted}, wanted)
    (1.7 * expected + ReFINEStep(model, config)(ids(), LENGTHS).loss_ntp).backward()
    wanted = gradients(model)
    assert_same_gradients({n: g for n, g in whole.items() if n in wanted}, wanted)


def test_it_is_the_sampled_policy_gradient_over_all_rollouts():
    """Sum over all V^K rollouts of probability * gradient of the sampled step = gradient of the closed form."""
    V, K, t = 2, 3, 6
    model = build("delta_net", vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1).train()
    x = torch.randint(0, V, (1, 12), generator=generator(2))
    settings = {"positions_per_sequence": 1, "rollout_length": K, "min_prefix": 1, "lambda_ntp": 0.0, "lambda_rl": 1.0}
    sampled = ReFINEStep(model, NSPConfig(reward_funcs="prefix_match", num_generations=2, advantage_scale="none", baseline="leave_one_out",
                                          advantage_group="position", **settings))  # fmt: skip
    outcomes = list(itertools.product(range(V), repeat=K))
    with torch.no_grad():
        probability = {}
        for o in outcomes:
            full = torch.cat([x[0, : t + 1], torch.tensor(o)])[None]
            log_p = model(full).logits[0, t : t + K].log_softmax(-1).gather(-1, torch.tensor(o)[:, None])
            probability[o] = float(log_p.sum().exp())
    assert sum(probability.values()) == pytest.approx(1.0)
    for pair in itertools.product(outcomes, repeat=2):
        result = sampled.score(x, torch.tensor([[t]]), torch.tensor(pair)[None, None])
        (probability[pair[0]] * probability[pair[1]] * result.loss_policy).backward()
    estimated = gradients(model)
    weights = torch.zeros(1, 12)
    weights[0, t] = 1.0
    exact = ReFINEStep(model, NSPConfig(estimator="closed_form", **settings))(x, scores=weights, policy_normalizer=1.0)
    # The sampled loss is a mean over the K tokens of a rollout; the closed form is the expected reward itself.
    (exact.loss_policy / K).backward()
    wanted = gradients(model)
    assert_same_gradients({n: g for n, g in estimated.items() if n in wanted}, wanted, tolerance=1e-7)


def test_the_mean_over_many_draws_approaches_it():
    model = build("delta_net", vocab_size=5, hidden_size=16, intermediate_size=16, num_hidden_layers=1).train()
    x = torch.randint(0, 5, (1, 20), generator=generator(4))
    settings = {"positions_per_sequence": 1, "rollout_length": 2, "min_prefix": 1, "lambda_ntp": 0.0, "lambda_rl": 1.0}
    N = 20_000
    sampled = ReFINEStep(model, NSPConfig(reward_funcs="prefix_match", num_generations=N, advantage_scale="none", baseline="leave_one_out",
                                          advantage_group="position", **settings))  # fmt: skip
    result = sampled(x, generator=generator(1))
    (2 * result.loss_policy).backward()
    estimated = gradients(model)
    weights = torch.zeros(1, 20).scatter(1, result.positions, 1.0)
    ReFINEStep(model, NSPConfig(estimator="closed_form", **settings))(x, scores=weights, policy_normalizer=1.0).loss.backward()
    wanted = gradients(model)
    a, b = (torch.cat([g[n].flatten() for n in sorted(wanted)]) for g in (estimated, wanted))
    assert float((a - b).norm() / b.norm()) < 0.1 and float(torch.cosine_similarity(a, b, dim=0)) > 0.995


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("weights", ["context", "selected"])
def test_a_batch_of_mixed_lengths_equals_its_sequences_one_by_one(family, weights):
    model = build(family).train()
    step = ReFINEStep(model, fitting(estimator="closed_form", token_weights=weights, rollout_length=3, **SMALL))
    together = step(ids(), LENGTHS, generator(3))
    together.loss.backward()
    from_batch = gradients(model)
    g, losses = generator(3), 0.0
    for b, n in enumerate(LENGTHS.tolist()):
        alone = step(ids()[b : b + 1, :n], generator=g, ntp_normalizer=together.num_targets,
                     policy_normalizer=together.num_rollout_tokens)  # fmt: skip
        torch.testing.assert_close(alone.token_weights[0], together.token_weights[b, :n], rtol=1e-6, atol=1e-12)
        alone.loss.backward()
        losses += alone.loss.detach()
    torch.testing.assert_close(together.loss.detach(), losses, rtol=1e-9, atol=1e-10)
    assert_same_gradients(from_batch, gradients(model), 1e-7)


def test_scores_known_beforehand_give_the_same_step():
    model = build("delta_net").train()
    config = NSPConfig(estimator="closed_form", rollout_length=2, **SMALL)
    with torch.no_grad():
        d = context_divergence(model, Batch.of(ids(), LENGTHS), model(ids()).last_hidden_state, config, False)
    online = ReFINEStep(model, config)(ids(), LENGTHS)
    cached = ReFINEStep(model, config)(ids(), LENGTHS, scores=d)
    torch.testing.assert_close(online.loss, cached.loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(online.token_weights, cached.token_weights, rtol=1e-6, atol=1e-12)


def test_an_infinite_order_is_kept_where_settings_are_written_down():
    config = NSPConfig.preset("likelihood")
    written = json.loads(json.dumps(config.as_dict(), allow_nan=False))
    for again in (NSPConfig(**written), pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert again == config and again.order == math.inf


@pytest.mark.parametrize("weights", ["context", "selected"])
def test_nothing_to_weigh_is_next_token_prediction_and_counted(weights):
    model = build("delta_net").train()
    x = ids(2, 14)
    step = ReFINEStep(model, fitting(estimator="closed_form", token_weights=weights, local_window=8, min_prefix=20))
    result = step(x, generator=generator())
    assert float(result.loss_policy.detach()) == 0 and not result.token_weights.any()
    assert float(result.metrics["sequences_without_weights"]) == 1.0
    result.loss.backward()
    found = gradients(model)
    model(x, labels=x).loss.backward()
    assert_same_gradients(found, gradients(model))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"reward_funcs": "cosine"},
            "no closed form of the reward cosine; prefix_match has one, and exact_match with rollout_length=1",
        ),
        ({"reward_funcs": "exact_match"}, "no closed form of the reward exact_match"),
        ({"reward_funcs": ["prefix_match", "cosine"]}, "no closed form of the reward prefix_match, cosine"),
        ({"temperature": 0.7}, r"nothing reads temperature=0.7 \(it needs estimator='sampled'\)"),
        ({"kl_coef": 0.1}, r"nothing reads kl_coef=0.1 \(it needs estimator='sampled'\)"),
        ({"token_weights": "contxt"}, "did you mean 'context'"),
        ({"order": 1.5}, "order=1.5: expected a whole number from 1 .* or inf"),
        ({"order": 0}, "order=0: expected"),
        ({"order": "two"}, "order=two: expected"),
        ({"order": float("nan")}, "order=nan: expected"),
    ],
)
def test_what_has_no_closed_form_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        NSPConfig(estimator="closed_form", **settings)
    assert NSPConfig(estimator="closed_form", reward_funcs="exact_match", rollout_length=1).rewards == ["exact_match"]
    with pytest.raises(ValueError, match="samples no rollouts"):
        ReFINEStep(build("delta_net"), NSPConfig(estimator="closed_form")).sample(ids())
