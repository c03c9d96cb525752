"""The step as a whole: one loss and one gradient whatever the schedule, exact records, and an unbiased policy gradient."""

import itertools

import pytest
import torch

from refine_nsp.config import NSPConfig
from refine_nsp.nsp.forward import run
from refine_nsp.nsp.module import ReFINEStep
from refine_nsp.nsp.records import Batch, Work
from refine_nsp.nsp.rollouts import sample_tokens
from tests.models.families import FAMILY_NAMES, build
from tests.nsp.schedules import assert_same_gradients, assert_schedules_agree, gradients

LENGTHS = torch.tensor([150, 97, 70])


def ids(rows: int = 3, length: int = 150, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("N", [1, 3])
def test_all_schedules_give_the_same_loss_and_gradients(family, N):
    assert_schedules_agree(
        build(family).train(), ids(), LENGTHS, build(family, seed=7), positions_per_sequence=3, num_generations=N, reward_funcs="hybrid",
        kl_coef=0.1, entropy_coef=0.01, min_prefix=5, baseline="leave_one_out" if N > 1 else "mean",
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_recorded_log_probs_and_hidden_states_equal_a_full_forward(family):
    model = build(family)
    step = ReFINEStep(model, NSPConfig(positions_per_sequence=2, num_generations=2, min_prefix=5, temperature=0.7))
    record = step.sample(ids(), lengths=LENGTHS, generator=generator())
    K = 5
    with torch.no_grad():
        for b, p, n in itertools.product(range(3), range(2), range(2)):
            t, rollout = int(record.positions[b, p]), record.tokens[b, p, n]
            out = model(torch.cat([ids()[b, : t + 1], rollout])[None])
            log_p = (out.logits[0, t : t + K] / 0.7).log_softmax(-1).gather(-1, rollout[:, None])[:, 0]
            torch.testing.assert_close(record.log_probs[b, p, n], log_p, rtol=1e-9, atol=1e-10)
            hidden = out.last_hidden_state[0, t + 1 : t + 1 + K]
            torch.testing.assert_close(record.hidden[b, p, n], hidden, rtol=1e-9, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_rollouts_of_a_prefix_share_their_first_prediction(family, dtype):
    """They draw the same tokens as rows that each have a prefix of their own, with fewer rows for the head."""
    model, N = build(family, dtype=dtype), 4
    out = model(ids(), lengths=LENGTHS, snapshot_positions=torch.tensor([[30, 60], [40, 80], [20, 50]]))
    hidden = out.last_hidden_state[torch.arange(3)[:, None], torch.tensor([[30, 60], [40, 80], [20, 50]])].flatten(0, 1)
    u, rows = torch.rand(6 * N, 5, dtype=torch.float64, generator=generator()), []
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    shared = sample_tokens(model, out.snapshots, hidden, u, 0.7)
    assert rows == [6, *[6 * N] * 4]
    hook.remove()
    apart = sample_tokens(model, out.snapshots.expand(N), hidden.repeat_interleave(N, 0), u, 0.7)
    assert torch.equal(shared[0], apart[0])
    torch.testing.assert_close(shared[1:], apart[1:])


@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
def test_the_head_learns_from_each_prediction_once_and_entropy_only_where_it_counts(entropy_coef):
    model, rows = build("delta_net"), []
    step = ReFINEStep(model, NSPConfig(positions_per_sequence=2, num_generations=3, min_prefix=5, entropy_coef=entropy_coef))
    forward = run(Work(model, Batch.of(ids(), LENGTHS), step.config))
    prefixes = forward.states(torch.tensor([[30, 60], [40, 80], [20, 50]]))
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:-1].numel()))
    found = forward.replay(prefixes, torch.zeros(3, 2, 3, 5, dtype=torch.long))
    hook.remove()
    assert rows == [6 + 18 * 4] and (found.entropy is None) == (entropy_coef == 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_rollout_equal_to_the_truth_scores_exactly_1_1_2(family, dtype):
    model, x = build(family, dtype=dtype), ids(1)
    positions = torch.tensor([[30, 63, 64, 99]])
    truth = torch.stack([x[0, t + 1 : t + 6] for t in positions[0]])[None, :, None]
    for reward, value in (("cosine", 1.0), ("exact_match", 1.0), ("hybrid", 2.0)):
        for schedule in ("reprefill", "snapshot", "fused"):
            step = ReFINEStep(model, NSPConfig(positions_per_sequence=4, reward_funcs=reward, schedule=schedule))
            result = step.score(x, positions, truth)
            assert torch.equal(result.rewards, torch.full((1, 4, 1), value, dtype=result.rewards.dtype))


@pytest.mark.parametrize("schedule", ["reprefill", "snapshot", "fused"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_batch_of_mixed_lengths_equals_its_sequences_one_by_one(family, schedule):
    model = build(family).train()
    config = NSPConfig(positions_per_sequence=2, num_generations=2, min_prefix=5, schedule=schedule, selection="context_kl",
                       local_window=16)  # fmt: skip
    step = ReFINEStep(model, config)
    together = step(ids(), lengths=LENGTHS, generator=generator(3))
    together.loss.backward()
    from_batch = gradients(model)
    g = generator(3)
    losses = 0.0
    for b, n in enumerate(LENGTHS.tolist()):
        alone = step(ids()[b : b + 1, :n], generator=g, ntp_normalizer=together.num_targets,
                     policy_normalizer=together.num_rollout_tokens)  # fmt: skip
        assert torch.equal(alone.positions[0], together.positions[b])
        assert torch.equal(alone.rollouts[0], together.rollouts[b])
        torch.testing.assert_close(alone.rewards[0], together.rewards[b], rtol=1e-6, atol=1e-7)
        alone.loss.backward()
        losses += alone.loss.detach()
    torch.testing.assert_close(together.loss.detach(), losses, rtol=1e-9, atol=1e-10)
    assert_same_gradients(from_batch, gradients(model))


def test_off_by_one_facts():
    """entropy[t] and logits[t] are about token t+1; hidden[t+j] counts for rollout token j; t + K <= length - 1."""
    model, x = build("delta_net"), ids(1)
    step = ReFINEStep(model, NSPConfig(positions_per_sequence=1, rollout_length=2, reward_funcs="cosine"))
    with torch.no_grad():
        full = model(x)
    t = 40
    rollout = torch.tensor([[[[7, 9]]]])
    result = step.score(x, torch.tensor([[t]]), rollout)
    p = full.logits[0, t].softmax(-1)
    torch.testing.assert_close(result.entropy[0, t], -(p * p.log()).sum(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(result.log_probs[0, 0, 0, 0], p[7].log(), rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        after = model(torch.cat([x[:, : t + 1], rollout[0, 0]], 1)).last_hidden_state[0, t + 1 :]
    cosine = torch.cosine_similarity(after, full.last_hidden_state[0, t + 1 : t + 3], dim=-1).mean()
    torch.testing.assert_close(result.rewards[0, 0, 0], cosine, rtol=1e-6, atol=1e-7)
    step.score(x, torch.tensor([[147]]), rollout)  # 147 + 2 = 149, the last index
    with pytest.raises(ValueError, match=r"t \+ K <= length - 1"):
        step.score(x, torch.tensor([[148]]), rollout)


@pytest.mark.parametrize("N", [1, 2])
def test_the_policy_gradient_is_unbiased(N):
    """Sum over all V^(K N) outcomes of probability * step gradient = - gradient of the expected reward (baseline removed)."""
    V, K, t = 3, 2, 6
    model = build("delta_net", vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1).train()
    x = torch.randint(0, V, (1, 12), generator=generator(2))
    config = NSPConfig(
        positions_per_sequence=1, num_generations=N, rollout_length=K, min_prefix=1, reward_funcs="exact_match", lambda_ntp=0.0,
        lambda_rl=1.0, advantage_scale="none", baseline="leave_one_out" if N > 1 else "mean", advantage_group="position",
    )  # fmt: skip
    step = ReFINEStep(model, config)
    outcomes = list(itertools.product(range(V), repeat=K))
    truth = x[0, t + 1 : t + 1 + K]

    def sequence_log_prob(rollout: tuple[int, ...]) -> torch.Tensor:
        ids_ = torch.cat([x[0, : t + 1], torch.tensor(rollout)])[None]
        return model(ids_).logits[0, t : t + K].log_softmax(-1).gather(-1, torch.tensor(rollout)[:, None]).sum()

    def reward(rollout: tuple[int, ...]) -> torch.Tensor:
        return (torch.tensor(rollout) == truth).double().mean()

    expected = sum(sequence_log_prob(o).exp() * reward(o) for o in outcomes)
    (-expected / K).backward()  # the loss is a mean over the K tokens
    exact = gradients(model)
    with torch.no_grad():
        probability = {o: sequence_log_prob(o).exp() for o in outcomes}
    if N == 1:
        # A group of one has advantage 0 by design, so the estimator is fed its advantage: the reward itself.
        for o in outcomes:
            result = _loss_with_advantage(step, x, t, o, reward(o))
            (probability[o] * result).backward()
    else:
        for pair in itertools.product(outcomes, repeat=2):
            result = step.score(x, torch.tensor([[t]]), torch.tensor(pair)[None, None])
            (probability[pair[0]] * probability[pair[1]] * result.loss_policy).backward()
    estimated = {name: g for name, g in gradients(model).items() if float(exact.get(name, g).norm()) > 0}
    assert_same_gradients(estimated, {name: exact[name] for name in estimated}, tolerance=1e-6)


def _loss_with_advantage(step: ReFINEStep, x, t: int, rollout, advantage) -> torch.Tensor:
    from dataclasses import replace

    record = step.sample(x, generator=generator())
    tokens = torch.tensor(rollout)[None, None, None]
    scored = step.score(x, torch.tensor([[t]]), tokens)
    given = replace(
        record, positions=torch.tensor([[t]]), tokens=tokens, log_probs=scored.log_probs,
        advantages=advantage.view(1, 1, 1),
    )  # fmt: skip
    return step.learn(x, given).loss_policy


def test_learning_again_from_one_rollout_batch_clips_the_ratio():
    model = build("delta_net").train()
    step = ReFINEStep(model, NSPConfig(positions_per_sequence=4, lambda_ntp=0.0, reward_funcs="hybrid"))
    record = step.sample(ids(), generator=generator())
    first = step.learn(ids(), record)
    assert first.metrics["clip_fraction"] == 0.0 and abs(first.metrics["approx_kl"]) < 1e-12
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    for _ in range(3):
        optimizer.zero_grad()
        step.learn(ids(), record).loss.backward()
        optimizer.step()
    later = step.learn(ids(), record)
    assert later.metrics["clip_fraction"] > 0.0 and later.metrics["approx_kl"] > 0.0


def test_short_sequences_get_fewer_positions_and_the_rest_of_the_batch_is_unharmed():
    model = build("delta_net")
    step = ReFINEStep(model, NSPConfig(positions_per_sequence=4, schedule="fused"))
    result = step(ids(2), lengths=torch.tensor([150, 30]), generator=generator())
    assert (result.positions[0] >= 0).sum() == 4 and (result.positions[1] >= 0).sum() < 4
    assert bool(result.loss.isfinite()) and bool((result.advantages[1][result.positions[1] < 0] == 0).all())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NSPConfig(rollout_length=0), "rollout_length must be at least 1"),
        (lambda: NSPConfig(positions_per_sequence=-1), "positions_per_sequence"),
        (lambda: NSPConfig(selection="entropie"), "did you mean 'entropy'"),
        (lambda: NSPConfig(tau=0.0), "tau must be positive"),
        (lambda: NSPConfig(reward_funcs=["cosine", "exact_match"], reward_weights=[1.0]), "2 rewards but 1"),
        (lambda: NSPConfig.preset("contxt"), "did you mean 'context'"),
        (lambda: NSPConfig.preset("context", lamda_rl=1.0), "did you mean 'lambda_rl'"),
        (lambda: ReFINEStep(build("delta_net"), NSPConfig(reward_funcs="cosin")), "did you mean 'cosine'"),
        (lambda: ReFINEStep(build("delta_net"), NSPConfig(reward_funcs="no.such.module")), "cannot import the reward"),
        (lambda: ReFINEStep(build("delta_net"), NSPConfig(kl_coef=0.1)), "needs a reference_model"),
        (lambda: ReFINEStep(build("delta_net"))(ids(1, 5)), "at least K \\+ 1"),
    ],
)
def test_bad_settings_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
