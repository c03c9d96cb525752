"""Selection, sampling, rewards, advantages and the clipped objective, each against its definition."""

import pytest
import torch

from refine_nsp.config import NSPConfig
from refine_nsp.nsp.advantage import compute_advantages
from refine_nsp.nsp.context import context_divergence, local_hidden, next_sum
from refine_nsp.nsp.objective import policy_loss
from refine_nsp.nsp.records import Batch, inverse_cdf, uniforms
from refine_nsp.nsp.rewards import compute_rewards, cosine, edit_similarity, exact_match, hybrid, prefix_match, resolve_reward
from refine_nsp.nsp.rollouts import sample_tokens
from refine_nsp.nsp.selection import admissible, chunk_of_tokens, select_positions, smooth_entropy
from tests.models.families import FAMILY_NAMES, build

DRAWS = 20_000


def assert_follows(drawn: torch.Tensor, probability: torch.Tensor) -> None:
    """Chi-square of counts against a distribution, at five standard deviations of the statistic."""
    expected = probability * len(drawn)
    counts = torch.bincount(drawn, minlength=len(probability)).double()
    assert counts[expected == 0].sum() == 0
    live = expected > 0
    statistic = ((counts - expected)[live] ** 2 / expected[live]).sum()
    freedom = int(live.sum()) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_inverse_cdf_follows_the_weights_and_never_draws_zero_weight():
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.5, 0.0])
    assert_follows(inverse_cdf(weights.expand(DRAWS, -1), draws(DRAWS)[:, None])[:, 0], weights.double() / weights.sum())
    edges = torch.tensor([0.0, 1.0 - 1e-16, 1.0], dtype=torch.float64)
    assert set(inverse_cdf(weights, edges).tolist()) <= {1, 3, 4}


@pytest.mark.parametrize(("selection", "tau"), [("entropy", 1.0), ("entropy", 0.5), ("uniform", 1.0)])
def test_positions_follow_a_softmax_in_each_chunk(selection, tau):
    T, P, K = 43, 3, 5
    config = NSPConfig(positions_per_sequence=P, rollout_length=K, min_prefix=4, selection=selection, tau=tau)
    scores = torch.randn(1, T, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([T])
    if selection == "uniform":
        scores = torch.zeros_like(scores)
    batch = Batch.of(torch.zeros(DRAWS, T, dtype=torch.long), lengths.expand(DRAWS))
    chosen = select_positions(scores.expand(DRAWS, -1), batch, draws(DRAWS, P), config)
    for p, (start, end) in enumerate([(4, 14), (14, 28), (28, 38)]):  # chunks of 14, the last to 43; t in 4 .. 43 - 1 - 5
        logits = torch.full((T,), -torch.inf, dtype=torch.float64)
        logits[start:end] = scores[0, start:end].double() / tau if selection == "entropy" else 0.0
        assert_follows(chosen[:, p], logits.softmax(-1))


def test_argmax_and_argmin_and_admissible_range():
    scores = torch.arange(60.0)[None]
    batch = Batch.of(torch.zeros(1, 60, dtype=torch.long))
    base = dict(positions_per_sequence=2, rollout_length=5, min_prefix=20)
    high = select_positions(scores, batch, draws(1, 2), NSPConfig(selection="argmax", **base))
    low = select_positions(scores, batch, draws(1, 2), NSPConfig(selection="argmin", **base))
    assert high.tolist() == [[29, 54]] and low.tolist() == [[20, 30]]
    allowed = admissible(torch.tensor([26, 25]), 30, NSPConfig(**base))
    assert allowed[0].nonzero().flatten().tolist() == [20] and not allowed[1].any()


def test_chunks_are_equal_and_the_remainder_goes_to_the_last():
    chunk = chunk_of_tokens(torch.tensor([19, 8]), 19, 4)
    assert chunk[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 7
    assert chunk[1, :8].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_smoothing_averages_real_tokens_only_unless_published():
    entropy = torch.tensor([[1.0, 2.0, 6.0, 4.0, 100.0, 100.0]])
    batch = Batch.of(torch.zeros(1, 6, dtype=torch.long), torch.tensor([4]))
    config = NSPConfig(rollout_length=2)
    assert config.window == 3 and NSPConfig(rollout_length=5).window == 5
    torch.testing.assert_close(smooth_entropy(entropy, batch, config)[0, :4], torch.tensor([1.5, 3.0, 4.0, 5.0]))
    published = smooth_entropy(entropy, batch, NSPConfig(rollout_length=2, smoothing="published"))[0, :4]
    torch.testing.assert_close(published, torch.tensor([1.0, 3.0, 4.0, 110 / 3]))
    assert torch.equal(smooth_entropy(entropy, batch, NSPConfig(smoothing="none")), entropy)


@pytest.mark.parametrize("span", [2, 4])
@pytest.mark.parametrize("selection", ["context_kl", "context_gain"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_context_scores_equal_their_definition(family, selection, span):
    W, K, T = 8, 3, 45
    model = build(family)
    config = NSPConfig(selection=selection, local_window=W, rollout_length=K, local_span=span)
    ids = torch.randint(0, 64, (2, T), generator=torch.Generator().manual_seed(5))
    lengths = torch.tensor([T, 37])
    with torch.no_grad():
        out = model(ids)
        batch = Batch.of(ids, lengths)
        scores = next_sum(context_divergence(model, batch, out.last_hidden_state, config, selection == "context_gain"), K)
        d = torch.zeros(2, T + K, dtype=torch.float64)
        for b in range(2):
            for t in range(2 * W, int(lengths[b]) - (selection == "context_gain")):
                start = W + (t - 2 * W) // ((span - 1) * W) * (span - 1) * W
                local = model(ids[b : b + 1, start : t + 1]).logits[0, -1].log_softmax(-1)
                whole = out.logits[b, t].log_softmax(-1)
                if selection == "context_kl":
                    d[b, t] = (whole.exp() * (whole - local)).sum()
                else:
                    d[b, t] = (whole - local)[ids[b, t + 1]].clamp(min=0)
    expected = sum(d[:, j : j + T] for j in range(K))
    for b in range(2):
        torch.testing.assert_close(scores[b, : lengths[b]], expected[b, : lengths[b]], rtol=1e-7, atol=1e-9)


def test_sampled_tokens_follow_the_tempered_distribution():
    model = build("delta_net", vocab_size=12)
    ids = torch.randint(0, 12, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(ids, snapshot_positions=torch.tensor([[29]]))
        first = (out.logits[0, -1] / 0.7).softmax(-1)
        rows = 4000
        u = draws(rows, 2, seed=3)
        tokens, log_probs, _ = sample_tokens(
            model, out.snapshots.expand(rows), out.last_hidden_state[:, -1].expand(rows, -1), u, 0.7
        )
        assert_follows(tokens[:, 0], first)
        torch.testing.assert_close(log_probs[:, 0], first.log()[tokens[:, 0]])
        likely = int(first.argmax())
        second = (model(torch.cat([ids, torch.tensor([[likely]])], 1)).logits[0, -1] / 0.7).softmax(-1)
        assert_follows(tokens[tokens[:, 0] == likely, 1], second)


def test_uniforms_are_one_block_row_by_row():
    u, v = uniforms(3, 2, 2, 5, torch.Generator().manual_seed(7))
    g = torch.Generator().manual_seed(7)
    for b in range(3):
        one_u, one_v = uniforms(1, 2, 2, 5, g)
        assert torch.equal(one_u[0], u[b]) and torch.equal(one_v[0], v[b])


# --- rewards ----------------------------------------------------------------------------------------------------------


def reward_inputs() -> dict:
    g = torch.Generator().manual_seed(0)
    return {
        "completion_ids": torch.tensor([[1, 2, 3], [1, 9, 3]]),
        "truth_ids": torch.tensor([[1, 2, 3], [1, 2, 3]]),
        "hidden": torch.randn(2, 3, 4, generator=g),
        "truth_hidden": torch.randn(2, 3, 4, generator=g),
        "prompts_ids": [torch.tensor([0]), torch.tensor([0])],
    }


def test_built_in_rewards():
    x = reward_inputs()
    assert exact_match(**x).tolist() == [[1, 1, 1], [1, 0, 1]]
    torch.testing.assert_close(cosine(**x), torch.cosine_similarity(x["hidden"], x["truth_hidden"], dim=-1))
    torch.testing.assert_close(hybrid(**x), cosine(**x) + exact_match(**x))
    same = {**x, "truth_hidden": x["hidden"]}
    assert torch.equal(cosine(**same), torch.ones(2, 3))


def test_prefix_match_counts_leading_matches():
    rollouts = torch.tensor([[1, 2, 3], [1, 9, 3], [9, 2, 3], [1, 2, 9]])
    found = prefix_match(completion_ids=rollouts, truth_ids=torch.tensor([[1, 2, 3]]).expand(4, 3)).mean(-1)
    torch.testing.assert_close(found, torch.tensor([1.0, 1 / 3, 0.0, 2 / 3]))


def test_rewards_of_a_float64_run_are_float64():
    x = {**reward_inputs(), "hidden": torch.randn(2, 3, 4).double(), "truth_hidden": torch.randn(2, 3, 4).double()}
    for reward in (exact_match, prefix_match, cosine, hybrid, edit_similarity):
        assert reward(**x).dtype == torch.float64
    for specs in (["exact_match"], ["hybrid", "exact_match"]):
        assert compute_rewards(specs, None, x)[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("a", "b", "value"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([9, 1, 2, 3], [1, 2, 3, 4], 0.5),
        ([5, 6, 7, 8], [1, 2, 3, 4], 0.0),
        ([1, 9, 3, 4], [1, 2, 3, 4], 0.75),
    ],
)
def test_edit_similarity(a, b, value):
    found = edit_similarity(completion_ids=torch.tensor([a]), truth_ids=torch.tensor([b]))
    torch.testing.assert_close(found, torch.tensor([value]))


def test_several_rewards_with_weights_and_your_own():
    x = reward_inputs()

    def mine(*, completion_ids, **_):
        return completion_ids[:, 0].float()

    total, by_name = compute_rewards(["exact_match", mine], [2.0, 0.5], x)
    torch.testing.assert_close(total, torch.tensor([2 * 1.0 + 0.5, 2 * 2 / 3 + 0.5]))
    assert set(by_name) == {"exact_match", "mine"}
    for path in ("refine_nsp.nsp.rewards.edit_similarity", "refine_nsp.nsp.rewards:edit_similarity"):
        assert resolve_reward(path)[1] is edit_similarity
    with pytest.raises(ValueError, match="returned shape"):
        compute_rewards([lambda **_: torch.zeros(5)], None, x)


# --- advantages -------------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    rewards = torch.tensor([[[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]]])
    valid = torch.tensor([[True, True]])
    by_position = NSPConfig(num_generations=3)
    found = compute_advantages(rewards, valid, by_position)
    std = torch.tensor([1.0, 2.0, 6.0]).std()
    torch.testing.assert_close(found[0][0, 0], (rewards[0, 0] - 3) / (std + 1e-6))
    assert found[0][0, 1].tolist() == [0, 0, 0] and found[1]["groups_without_spread"] == 0.5
    loo = compute_advantages(rewards, valid, NSPConfig(num_generations=3, baseline="leave_one_out", advantage_scale="none"))
    torch.testing.assert_close(loo[0][0, 0], torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5]))
    one_scale = compute_advantages(
        rewards, valid, NSPConfig(num_generations=3, baseline="leave_one_out", advantage_scale="global")
    )
    torch.testing.assert_close(one_scale[0], loo[0] / (loo[0].square().mean().sqrt() + 1e-6))
    by_sequence = compute_advantages(rewards, valid, NSPConfig(num_generations=3, advantage_group="sequence"))
    torch.testing.assert_close(by_sequence[0].flatten(), (rewards.flatten() - 3.5) / (rewards.flatten().std() + 1e-6))


def test_advantages_at_one_rollout_group_a_sequence_and_leave_out_missing_positions():
    rewards = torch.tensor([[[1.0], [3.0], [50.0]], [[2.0], [9.0], [9.0]]])
    valid = torch.tensor([[True, True, False], [True, False, False]])
    found = compute_advantages(rewards, valid, NSPConfig(num_generations=1))
    r = torch.tensor([1.0, 3.0])
    torch.testing.assert_close(found[0][0, :2, 0], (r - 2) / (r.std() + 1e-6))
    assert found[0][0, 2, 0] == 0 and found[0][1].abs().sum() == 0  # missing; and a group of one
    assert found[1]["groups_without_spread"] == 0.5


# --- objective --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, -2.0),
        (1.5, 2.0, -2.4),  # clipped above
        (0.5, 2.0, -1.0),  # a worse ratio is not clipped for a good rollout
        (1.5, -2.0, 3.0),  # nor a better one for a bad rollout
        (0.5, -2.0, 1.6),  # clipped below
        (5.0, -2.0, 6.0),  # dual clip: at most 3 |A|
    ],
)
def test_clip_and_dual_clip(ratio, advantage, expected):
    old = torch.zeros(1, 1, 1, 1)
    log_probs = torch.full((1, 1, 1, 1), ratio).log()
    found = policy_loss(log_probs, old, torch.full((1, 1, 1), advantage), torch.tensor([[True]]), NSPConfig(), 1.0)
    assert found[0].item() == pytest.approx(expected, rel=1e-5)


def test_clip_higher_kl_entropy_and_missing_positions():
    config = NSPConfig(clip_high=0.28, kl_coef=0.5, entropy_coef=0.1)
    log_probs = torch.tensor([1.5, 1.0]).log().view(1, 2, 1, 1)
    reference = torch.tensor([0.75, 1.0]).log().view(1, 2, 1, 1)
    found = policy_loss(
        log_probs, torch.zeros(1, 2, 1, 1), torch.ones(1, 2, 1), torch.tensor([[True, False]]), config, 1.0,
        entropy=torch.full((1, 2, 1, 1), 2.0), reference_log_probs=reference,
    )  # fmt: skip
    k3 = 0.5 - 1 - torch.tensor(0.5).log().item()
    assert found[0].item() == pytest.approx(-1.28 + 0.5 * k3 - 0.2, rel=1e-5)


def test_every_name_has_its_function():
    from refine_nsp.config import PUBLISHED_SELECTIONS, choices_of
    from refine_nsp.nsp.schedule import SCHEDULES
    from refine_nsp.nsp.selection import DRAWS, SCORES
    from refine_nsp.training.phases import PHASES
    from refine_nsp.training.test_time import TestTimeConfig

    names = choices_of(NSPConfig)
    assert set(names["selection"]) == {*SCORES, *PUBLISHED_SELECTIONS}
    assert set(names["draw"]) - {None} == set(DRAWS) and set(names["schedule"]) == {"auto", *SCHEDULES}
    assert set(PUBLISHED_SELECTIONS.values()) <= {(score, draw) for score in SCORES for draw in DRAWS}
    assert set(choices_of(TestTimeConfig)["objective"]) == set(PHASES)


def test_windows_of_pads_alone_are_not_run(monkeypatch):
    model, W = build("delta_net"), 8
    ids, lengths = torch.randint(0, 64, (3, 100), generator=torch.Generator().manual_seed(5)), torch.tensor([100, 20, 41])
    rows, run = [], model.model.forward

    def spy(input_ids, **kwargs):
        rows.append(len(input_ids))
        return run(input_ids, **kwargs)

    monkeypatch.setattr(model.model, "forward", spy)
    local = local_hidden(model, Batch.of(ids, lengths), W, 4)
    # Windows are read 24 tokens each, from 2W = 16 on: 4 for 100 tokens, 1 for 20, 2 for 41.
    assert sum(rows) == 7 and local.shape[:2] == (3, 100)
    assert local[1, 16:20].any(-1).all() and not local[1, 40:].any() and not local[2, 64:].any()
