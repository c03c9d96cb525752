"""`published`: what the paper's code does where ours differs, by hand; and the schedules agree on it as on ours."""

import warnings

import pytest
import torch

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.nsp.advantage import compute_advantages
from refine_nsp.nsp.module import ReFINEStep
from refine_nsp.nsp.records import Batch
from refine_nsp.nsp.rollouts import sample_tokens
from refine_nsp.nsp.selection import admissible, count_positions, select_positions, smooth_entropy
from tests.models.families import FAMILY_NAMES, build
from tests.nsp.schedules import assert_same_gradients, assert_schedules_agree, gradients

# First and last position of each chunk that uniform draws can give (P 8, K 5, min_prefix 20), None where there is none.
# Chunks of 3, 5, 12 and 625 tokens. Ours: 20 <= t <= n - 6, and what is left of n / 8 is in the last chunk. Published: a prefix of 20
# tokens makes t >= 19, 20 tokens after it make t <= n - 21, which wins where both cannot be; what is left of n / 8 is in no chunk.
OURS = {
    24: [None] * 8,
    40: [None, None, None, None, (20, 24), (25, 29), (30, 34), None],
    100: [None, (20, 23), (24, 35), (36, 47), (48, 59), (60, 71), (72, 83), (84, 94)],
    5000: [(20, 624), (625, 1249), (1250, 1874), (1875, 2499), (2500, 3124), (3125, 3749), (3750, 4374), (4375, 4994)],
}
PUBLISHED = {
    24: [(3, 3)] * 8,
    40: [(19, 19)] * 8,
    100: [(19, 19), (19, 23), (24, 35), (36, 47), (48, 59), (60, 71), (72, 79), (79, 79)],
    5000: [(19, 624), (625, 1249), (1250, 1874), (1875, 2499), (2500, 3124), (3125, 3749), (3750, 4374), (4375, 4979)],
}


def chosen(length: int, scores: torch.Tensor, u: torch.Tensor, **settings) -> torch.Tensor:
    """Positions [rows, P] of a text by its scores [T] and uniforms [rows, P], alone or beside a longer one."""
    config, rows = NSPConfig(**settings), len(u)
    batch = Batch.of(torch.zeros(rows, length, dtype=torch.long))
    found = select_positions(scores.expand(rows, -1), batch, u, config)
    wider = Batch.of(torch.zeros(rows, length + 9, dtype=torch.long), batch.lengths)
    padded = torch.nn.functional.pad(scores, (0, 9), value=50.0).expand(rows, -1)
    assert torch.equal(found, select_positions(padded, wider, u, config))
    assert count_positions(batch.lengths, config).tolist() == (found >= 0).sum(1).tolist()
    return found


@pytest.mark.filterwarnings("ignore:some sequences are too short")
@pytest.mark.parametrize("length", OURS)
@pytest.mark.parametrize("published", [False, True])
def test_the_positions_of_texts_of_24_40_100_and_5000_tokens(published, length):
    ends = torch.tensor([0.0, 1 - 1e-12], dtype=torch.float64)[:, None].expand(2, 8)
    first, last = chosen(length, torch.zeros(length), ends, selection="uniform", published=published).tolist()
    expected = (PUBLISHED if published else OURS)[length]
    assert [None if a < 0 else (a, b) for a, b in zip(first, last, strict=True)] == expected
    allowed = admissible(torch.tensor([length]), length, NSPConfig(published=published))[0].nonzero()[:, 0].tolist()
    known = [pair for pair in expected if pair is not None]
    assert allowed == (list(range(known[0][0], known[-1][1] + 1)) if known else [])


def test_a_draw_outside_is_moved_to_the_nearest_position_and_keeps_its_probability():
    """100 tokens: of chunk 1, 12 .. 23, eight of twelve tokens lie before 19 or are it; of chunk 6, 72 .. 83, five lie at 79 or after."""
    u = torch.tensor([7.9, 8.1, 11.9, 0.1, 6.9, 7.1, 8.1], dtype=torch.float64)[:, None].expand(-1, 8) / 12
    found = chosen(100, torch.zeros(100), u, selection="uniform", published=True)
    assert found[:, 1].tolist() == [19, 20, 23, 19, 19, 19, 20]
    assert found[:, 6].tolist() == [79, 79, 79, 72, 78, 79, 79]
    scores = torch.zeros(100)
    scores[14] = scores[81] = 9.0
    greatest = chosen(100, scores, u[:1], selection="argmax", published=True)
    assert greatest[0, [1, 6]].tolist() == [19, 79]


def test_the_remainder_is_in_no_chunk():
    """89 tokens in 30 chunks of 2: the other 29 are the last chunk's in ours, nobody's as published."""
    ends = torch.tensor([0.0, 1 - 1e-12], dtype=torch.float64)[:, None].expand(2, 30)
    settings = {"selection": "uniform", "positions_per_sequence": 30}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ours has no position in the first ten chunks
        assert chosen(89, torch.zeros(89), ends, **settings)[:, 29].tolist() == [58, 83]
    assert chosen(89, torch.zeros(89), ends, published=True, **settings)[:, 29].tolist() == [58, 59]


@pytest.mark.filterwarnings("ignore:some sequences are too short")
@pytest.mark.parametrize(("length", "P", "position"), [(20, 8, None), (21, 8, 0), (29, 30, None), (30, 30, 9)])
def test_the_shortest_text_with_positions_has_a_prefix_and_a_token_a_chunk(length, P, position):
    config = NSPConfig(published=True, selection="uniform", positions_per_sequence=P)
    found = chosen(length, torch.zeros(length), torch.full((1, P), 0.5, dtype=torch.float64), **config.as_dict())
    assert found.tolist() == [[-1 if position is None else position] * P]
    assert (length >= config.shortest) == (position is not None)


def test_entropy_is_smoothed_with_zeros_beyond_the_edges_and_greatest_and_least_as_they_are():
    entropy = torch.tensor([[3.0, 6.0, 0.0, 3.0]])
    batch = Batch.of(torch.zeros(1, 4, dtype=torch.long))
    smoothed = {s: smooth_entropy(entropy, batch, NSPConfig(published=True, rollout_length=3, selection=s)) for s in
                ("entropy", "argmax", "argmin")}  # fmt: skip
    torch.testing.assert_close(smoothed["entropy"], torch.tensor([[3.0, 3.0, 3.0, 1.0]]))
    assert torch.equal(smoothed["argmax"], entropy) and torch.equal(smoothed["argmin"], entropy)
    ours = smooth_entropy(entropy, batch, NSPConfig(rollout_length=3, selection="argmax"))
    torch.testing.assert_close(ours, torch.tensor([[4.5, 3.0, 3.0, 1.5]]))


def test_a_group_of_one_has_its_reward_as_advantage():
    rewards, alone = torch.tensor([[[0.75]], [[-0.5]]]), torch.tensor([[True], [True]])
    one = {"positions_per_sequence": 1}
    ours = compute_advantages(rewards, alone, NSPConfig(**one))
    assert ours[0].abs().sum() == 0 and ours[1]["groups_without_spread"] == 1
    for scale, value in (("std", rewards / (1 + 1e-6)), ("none", rewards)):
        found = compute_advantages(rewards, alone, NSPConfig(published=True, advantage_scale=scale, **one))
        torch.testing.assert_close(found[0], value, rtol=1e-7, atol=0)
        assert found[1]["groups_without_spread"] == 0 and found[1]["reward_group_std"] == 0
    nobody = compute_advantages(rewards, torch.tensor([[True], [False]]), NSPConfig(published=True, **one))
    assert nobody[0][1, 0, 0] == 0 and nobody[0][0, 0, 0] > 0


def test_larger_groups_have_the_same_advantages_in_both():
    rewards = torch.tensor([[[1.0], [3.0], [50.0]], [[2.0], [2.0], [2.0]]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    for settings in ({}, {"baseline": "leave_one_out", "advantage_scale": "global"}):
        ours, published = (compute_advantages(rewards, valid, NSPConfig(published=p, **settings)) for p in (False, True))
        assert torch.equal(ours[0], published[0]) and ours[1]["groups_without_spread"] == published[1]["groups_without_spread"]


# --- steps ------------------------------------------------------------------------------------------------------------
LENGTHS = torch.tensor([100, 40, 24, 15])  # apart; all P at one place; the same, after 4 tokens; none at all


def ids() -> torch.Tensor:
    return torch.randint(0, 64, (4, 100), generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:some sequences are too short")
@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(
    "settings", [{"reward_funcs": "hybrid"}, {"num_generations": 2, "kl_coef": 0.1}, {"positions_per_sequence": 1}]
)
def test_all_schedules_give_the_same_loss_and_gradients(family, settings):
    reference = build(family, seed=7)
    assert_schedules_agree(build(family).train(), ids(), LENGTHS, reference, published=True, lambda_rl=1.0, **settings)


@pytest.mark.filterwarnings("ignore:some sequences are too short")
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_by_segments_a_step_is_what_it_is_in_one_piece(family):
    model, found = build(family).train(), []
    for size in (None, 37):
        step = ReFINEStep(model, NSPConfig(published=True, reward_funcs="hybrid", lambda_rl=1.0, segment_tokens=size))
        result = step(ids(), lengths=LENGTHS, generator=torch.Generator().manual_seed(0))
        result.loss.backward()
        found.append((result, gradients(model)))
    (whole, by_whole), (parts, by_parts) = found
    assert torch.equal(whole.positions, parts.positions) and torch.equal(whole.rollouts, parts.rollouts)
    assert whole.positions[1:].tolist() == [[19] * 8, [3] * 8, [-1] * 8]
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-9, atol=1e-12)
    assert_same_gradients(by_parts, by_whole)


def test_positions_at_one_place_have_rollouts_of_their_own_and_are_one_group():
    step = ReFINEStep(build("delta_net"), NSPConfig(published=True, reward_funcs="exact_match", rollout_length=2))
    record = step.sample(ids()[1:2, :40], generator=torch.Generator().manual_seed(0))
    assert record.positions.tolist() == [[19] * 8] and record.num_positions == 8 and record.num_tokens == 16
    assert len({tuple(tokens) for tokens in record.tokens.view(8, 2).tolist()}) == 8
    torch.testing.assert_close(record.advantages.sum(), torch.zeros((), dtype=torch.float64))


def test_rollouts_do_not_end_and_their_log_probs_are_of_all_tokens():
    model = build("delta_net", vocab_size=6)  # EOS is 2
    x = torch.randint(0, 6, (1, 60), generator=torch.Generator().manual_seed(0))
    drawn = {}
    for published in (False, True):
        step = ReFINEStep(model, NSPConfig(published=published, num_generations=20))
        drawn[published] = step.sample(x, generator=torch.Generator().manual_seed(0))
    assert (drawn[False].tokens == 2).any() and not (drawn[True].tokens == 2).any()
    record = drawn[True]
    t, rollout = int(record.positions[0, 3]), record.tokens[0, 3, 0]
    with torch.no_grad():
        log_p = model(torch.cat([x[0, : t + 1], rollout])[None]).logits[0, t : t + 5].log_softmax(-1)
    torch.testing.assert_close(record.log_probs[0, 3, 0], log_p.gather(-1, rollout[:, None])[:, 0], rtol=1e-9, atol=1e-10)


def test_what_is_never_drawn_leaves_its_probability_to_the_others():
    model = build("delta_net", vocab_size=6)
    with torch.no_grad():
        out = model(torch.tensor([[1, 2, 3]]), snapshot_positions=torch.tensor([[2]]))
        p = out.logits[0, -1].softmax(-1)
    p[[0, 4]] = 0
    u = (torch.arange(4000, dtype=torch.float64) + 0.5)[:, None] / 4000
    tokens, _, _ = sample_tokens(
        model, out.snapshots.expand(4000), out.last_hidden_state[:, -1].expand(4000, -1), u, 1.0, never=[0, 4]
    )
    counted = torch.bincount(tokens[:, 0], minlength=6).double() / 4000
    torch.testing.assert_close(counted, p / p.sum(), rtol=0, atol=1e-3)


# --- settings ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", ["mid_training", "post_training", "test_time"])
def test_presets_of_the_paper_are_ours_unless_published_is_said(preset):
    ours, published = NSPConfig.preset(preset), NSPConfig.preset(preset, published=True)
    assert {name for name, value in ours.as_dict().items() if value != published.as_dict()[name]} == {"published"}
    assert not ours.published and ours.shortest == 26 and published.shortest == 21


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "closed_form"}, "published=True belongs to rollouts; estimator='closed_form'"),
        ({"smoothing": "none"}, r"nothing reads smoothing='none' \(it needs published=False\)"),
        ({"rollout_length": 21}, "keeps min_prefix=20 tokens free at the end .* set rollout_length to at most 20"),
    ],
)
def test_what_the_published_code_cannot_do_is_refused(settings, message):
    with pytest.raises(RefineError, match=message):
        NSPConfig(published=True, **settings)
