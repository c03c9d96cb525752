"""Windows that start from the states of the windows before are the whole document, with gradients that end where a window begins."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.models.state import FastWeightCache
from refine_nsp.nsp.closed_form import refine_in_closed_form
from refine_nsp.nsp.context import context_divergence
from refine_nsp.nsp.forward import run, run_and_leave, run_hidden
from refine_nsp.nsp.module import ReFINEStep
from refine_nsp.nsp.next_token import next_token_loss
from refine_nsp.nsp.records import Batch, Starts, Work
from refine_nsp.nsp.selection import count_positions, select
from tests.models.families import FAMILY_NAMES, build
from tests.models.transformers_models import float64_throughout, stateful
from tests.nsp.schedules import assert_same_gradients, gradients

VARIANTS = {
    "muon": {"use_muon": True, "muon_dtype": "float32"},
    "prenorm": {"ttt_prenorm": True},
    "full_rank": {"w0_w2_low_rank": -1},
    "long_chunk": {"lact_chunk_size": 400},
}
MODELS = [*((family, {}) for family in FAMILY_NAMES), *(("lact_swiglu", fields) for fields in VARIANTS.values())]
IDS = [*FAMILY_NAMES, *(f"lact_swiglu-{name}" for name in VARIANTS)]
STRIDE = 37  # divides no chunk of LaCT's
WINDOWS = 4


def documents(rows: int = 2, windows: int = WINDOWS, seed: int = 1) -> Tensor:
    return torch.randint(0, 64, (rows, windows * STRIDE + 1), generator=torch.Generator().manual_seed(seed))


def window(ids: Tensor, i: int) -> Tensor:
    """Window i, which shares a token with the one before and with the one behind."""
    return ids[:, i * STRIDE : (i + 1) * STRIDE + 1]


def starts(ids: Tensor, i: int, cache: FastWeightCache | None) -> Starts:
    before = ids[:, : i * STRIDE]
    return Starts(cache, F.pad(before, (max(0, 64 - before.shape[1]), 0)))


def carried_losses(model, ids: Tensor, config: NSPConfig) -> Tensor:
    """The summed cross-entropy of a document's windows, each by a step of its own."""
    cache, losses = None, []
    for i in range(WINDOWS):
        batch = Batch.of(window(ids, i), starts=starts(ids, i, cache))
        hidden, cache = run_and_leave(model, batch, config)
        losses.append(next_token_loss(model, hidden, batch, 1.0)[0])
    return torch.stack(losses).sum()


def naive_losses(model, ids: Tensor, detach: bool) -> Tensor:
    """The same from stretches of tokens whose states are handed over, detached where windows end."""
    cache, losses = FastWeightCache(), []
    for i in range(WINDOWS):
        inputs, targets = window(ids, i)[:, :-1], window(ids, i)[:, 1:]
        out = model.model(inputs, past_key_values=cache, use_cache=True)
        cache = out.past_key_values.detach() if detach else out.past_key_values
        losses.append(F.cross_entropy(model.lm_head(out.last_hidden_state).flatten(0, 1), targets.flatten(), reduction="sum"))
    return torch.stack(losses).sum()


@pytest.mark.parametrize(("family", "fields"), MODELS, ids=IDS)
def test_windows_sum_to_the_document_and_have_truncated_gradients(family, fields):
    model, ids = build(family, **fields).train(), documents()
    batch = Batch.of(ids)
    whole, _ = next_token_loss(model, run_hidden(model, batch, NSPConfig()), batch, 1.0)
    naive = naive_losses(model, ids, detach=True)
    naive.backward()
    expected = gradients(model)
    for size in (None, 16):
        model.zero_grad()
        loss = carried_losses(model, ids, NSPConfig(segment_tokens=size))
        loss.backward()
        torch.testing.assert_close(loss.detach(), whole.detach(), rtol=1e-10, atol=1e-10)
        assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("name", ["mistral", "linear"])
def test_models_of_transformers_carry_windows_and_recurrent_states(name, monkeypatch):
    with float64_throughout():
        model, ids = stateful_with(name, monkeypatch).train(), documents()
        assert not model.model.keeps_all_tokens
        batch = Batch.of(ids)
        whole, _ = next_token_loss(model, run_hidden(model, batch, NSPConfig()), batch, 1.0)
        naive_losses(model, ids, detach=True).backward()
        expected = gradients(model)
        for size in (None, 16):
            model.zero_grad()
            loss = carried_losses(model, ids, NSPConfig(segment_tokens=size))
            loss.backward()
            torch.testing.assert_close(loss.detach(), whole.detach(), rtol=1e-9, atol=1e-9)
            assert_same_gradients(gradients(model), expected)


def stateful_with(name: str, monkeypatch):
    """A model of transformers without attention over everything."""
    from tests.models import transformers_models as tm

    if name == "linear":
        from transformers import Qwen3NextConfig

        layers = dict(num_hidden_layers=2, layer_types=["linear_attention", "linear_attention"])
        rest = dict(head_dim=8, num_experts=4, shared_expert_intermediate_size=16)
        monkeypatch.setitem(tm.CONFIGS, name, lambda: Qwen3NextConfig(**tm.COMMON, **tm.DELTA, **layers, **tm.EXPERTS, **rest))
    return stateful(name)


@pytest.mark.parametrize("name", ["llama", "bamba"])
def test_attention_over_everything_is_known(name):
    assert stateful(name).model.keeps_all_tokens


@pytest.mark.parametrize(("name", "keys"), [("llama", 200), ("bamba", 200), ("bamba", None)])
def test_keys_within_the_bound_are_the_whole_documents(name, keys):
    with float64_throughout():
        model, ids = stateful(name), documents()
        whole = model.model(ids, use_cache=False).last_hidden_state
        rows: list[FastWeightCache | None] = [None, None]
        for i in range(WINDOWS):
            batch = Batch.of(window(ids, i), starts=starts(ids, i, FastWeightCache.joined(rows)))
            hidden, left = run_and_leave(model, batch, NSPConfig())
            torch.testing.assert_close(hidden, whole[:, i * STRIDE : (i + 1) * STRIDE + 1], rtol=1e-9, atol=1e-9)
            rows = left.apart(keys)


@pytest.mark.parametrize("size", [None, 16])
def test_keys_beyond_the_bound_are_forgotten_and_positions_are_not(size, monkeypatch):
    from tests.models import transformers_models as tm

    # One layer, whose keys depend on their own token alone: the tokens within the bound, run with the window, are the whole truth.
    config = tm.CONFIGS["llama"]()
    config.num_hidden_layers, N = 1, 9
    monkeypatch.setitem(tm.CONFIGS, "shallow", lambda: config)
    with float64_throughout():
        model, ids = stateful("shallow"), documents()
        rows: list[FastWeightCache | None] = [None, None]
        for i in range(WINDOWS):
            n = (STRIDE + 1, 20)  # the second row's windows are shorter, and its next begins behind what it read
            batch = Batch.of(window(ids, i), torch.tensor(n), starts=starts(ids, 0, FastWeightCache.joined(rows)))
            hidden, left = run_and_leave(model, batch, NSPConfig(segment_tokens=size))
            before = [torch.cat([window(ids, j)[b, : n[b] - 1] for j in range(i)] or [ids[b, :0]])[-N:] for b in (0, 1)]
            for b in (0, 1):
                seen = torch.cat([before[b], window(ids, i)[b, : n[b]]])[None]
                places = (n[b] - 1) * i - len(before[b]) + torch.arange(seen.shape[1])[None]
                expected = model.model.plain(seen, position_ids=places, use_cache=False)
                torch.testing.assert_close(hidden[b, : n[b]], expected[0, len(before[b]) :], rtol=1e-9, atol=1e-9)
            rows = left.apart(N)
            assert left.consumed.tolist() == [(i + 1) * (x - 1) for x in n]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_row_may_start_from_nothing_next_to_one_that_does_not(family):
    model, ids, config = build(family).train(), documents(), NSPConfig()
    _, cache = run_and_leave(model, Batch.of(window(ids, 0)[:1], starts=starts(ids[:1], 0, None)), config)
    fresh = window(ids, 0)[1:]

    def loss(rows: Tensor, states: FastWeightCache | None) -> Tensor:
        recent = torch.zeros(len(rows), 64, dtype=torch.long)
        batch = Batch.of(rows, torch.tensor([STRIDE + 1, 20][-len(rows) :]), starts=Starts(states, recent))
        hidden, left = run_and_leave(model, batch, config)
        found.append(left.apart()[-1])
        return next_token_loss(model, hidden, batch, 1.0)[0]

    found: list[FastWeightCache] = []
    together = FastWeightCache.joined([*cache.apart(), None])
    loss(torch.cat([window(ids, 1)[:1], fresh]), together).backward()
    got = gradients(model)
    model.zero_grad()
    continued = Batch.of(window(ids, 1)[:1], starts=starts(ids[:1], 1, cache))
    (next_token_loss(model, run_and_leave(model, continued, config)[0], continued, 1.0)[0] + loss(fresh, None)).backward()
    assert_same_gradients(got, gradients(model))  # of the initial fast weights too
    assert found[0].lengths.tolist() == found[1].lengths.tolist() == [19]
    for a, b in zip(found[0].layers, found[1].layers, strict=True):
        for name in b:
            n = b[name].shape[2] if name.startswith("open_") else None  # the batch's longest decides how much of it is zeros
            torch.testing.assert_close(a[name][:, :, :n] if n else a[name], b[name], rtol=1e-10, atol=1e-12)


def test_every_weight_has_a_gradient_where_all_rows_continue():
    """Also where no chunk is completed, so that the initial fast weights have no part in the window: DDP waits for each."""
    model, ids = build("lact_swiglu", lact_chunk_size=400).train(), documents()
    _, cache = run_and_leave(model, Batch.of(window(ids, 0), starts=starts(ids, 0, None)), NSPConfig())
    batch = Batch.of(window(ids, 1), starts=starts(ids, 1, cache))
    next_token_loss(model, run_and_leave(model, batch, NSPConfig())[0], batch)[0].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


SCHEDULES = ("fused", "snapshot", "reprefill")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_rollouts_behind_a_windows_start_are_those_of_the_document(family, schedule):
    model, ids = build(family), documents()
    config = NSPConfig(
        rollout_length=3, num_generations=2, reward_funcs="hybrid", schedule=schedule, min_prefix=5, positions_per_sequence=3
    )
    step = ReFINEStep(model, config)
    inside = torch.tensor([[0, 1, 15], [0, 5, 33]])
    tokens = torch.randint(0, 64, (2, 3, 2, 3), generator=torch.Generator().manual_seed(3))
    whole = step.score(ids, inside + 2 * STRIDE, tokens)
    _, cache = run_and_leave(model, Batch.of(ids[:, : 2 * STRIDE + 1], starts=starts(ids, 0, None)), config)
    behind = step.score(window(ids, 2), inside, tokens, starts=starts(ids, 2, cache))
    torch.testing.assert_close(behind.log_probs, whole.log_probs, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(behind.rewards, whole.rewards, rtol=1e-9, atol=1e-11)
    # The step as training takes it: the same for every schedule, with positions from the first token on, and leaving the document's state.
    result = step(window(ids, 2), generator=torch.Generator().manual_seed(0), starts=starts(ids, 2, cache))
    result.loss.backward()
    got = gradients(model)
    model.zero_grad()
    other = ReFINEStep(model, replace(config, schedule="fused"))(
        window(ids, 2), generator=torch.Generator().manual_seed(0), starts=starts(ids, 2, cache)
    )
    other.loss.backward()
    assert torch.equal(result.rollouts, other.rollouts)
    assert_same_gradients(got, gradients(model))
    _, after = run_and_leave(model, Batch.of(ids[:, : 3 * STRIDE + 1], starts=starts(ids, 0, None)), config)
    assert_same_states(result.left, after)


def assert_same_states(a: FastWeightCache, b: FastWeightCache) -> None:
    assert torch.equal(a.lengths, b.lengths)
    for mine, theirs in zip(a.layers, b.layers, strict=True):
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-9, atol=1e-11)
            assert not mine[name].requires_grad


def test_segments_leave_the_same_states_and_losses():
    model, ids = build("lact_swiglu"), documents()
    results = []
    for size in (None, 16):
        config = NSPConfig(rollout_length=3, schedule="snapshot", min_prefix=5, positions_per_sequence=3, segment_tokens=size)
        _, cache = run_and_leave(model, Batch.of(window(ids, 0), starts=starts(ids, 0, None)), config)
        generator = torch.Generator().manual_seed(0)
        results.append(ReFINEStep(model, config)(window(ids, 1), generator=generator, starts=starts(ids, 1, cache)))
    assert torch.equal(results[0].rollouts, results[1].rollouts)
    torch.testing.assert_close(results[0].loss, results[1].loss)
    assert_same_states(results[0].left, results[1].left)


def test_positions_count_the_tokens_before_a_window():
    model, ids = build("delta_net"), documents()
    config = NSPConfig(rollout_length=3, min_prefix=STRIDE + 5, positions_per_sequence=STRIDE, selection="uniform")
    _, cache = run_and_leave(model, Batch.of(window(ids, 0), starts=starts(ids, 0, None)), config)
    batch = Batch.of(window(ids, 1), starts=starts(ids, 1, cache))
    u = torch.rand(2, STRIDE, dtype=torch.float64)
    work = Work(model, batch, config)
    chosen = select(run(replace(work, draws=replace(work.draws, positions=u))))
    assert chosen[0].tolist() == [-1] * 5 + list(range(5, STRIDE - 2)) + [-1] * 2
    assert count_positions(batch.lengths, config, batch.consumed).tolist() == [STRIDE - 7] * 2


@pytest.mark.parametrize("span", [2, 4])
def test_context_scores_see_the_document(span):
    model, ids = build("gated_deltanet"), documents()
    config = NSPConfig(estimator="closed_form", rollout_length=1, order=math.inf, local_window=10, local_span=span)
    whole = Batch.of(ids)
    expected = context_divergence(model, whole, run_hidden(model, whole, config), config, gain=False)
    cache = None
    for i in range(WINDOWS):
        batch = Batch.of(window(ids, i), starts=starts(ids, i, cache))
        hidden, cache_after = run_and_leave(model, batch, config)
        d = context_divergence(model, batch, hidden, config, gain=False)
        torch.testing.assert_close(d, window(expected, i), rtol=1e-9, atol=1e-11)
        result = refine_in_closed_form(Work(model, batch, config))
        torch.testing.assert_close(result.token_weights[:, :-1] * STRIDE * 2, d[:, :-1], rtol=1e-9, atol=1e-11)
        assert_same_states(result.left, cache_after)
        cache = cache_after


def test_too_few_recent_tokens_are_refused():
    model, ids = build("delta_net"), documents()
    config = NSPConfig(estimator="closed_form", rollout_length=1, local_window=10)
    _, cache = run_and_leave(model, Batch.of(window(ids, 0), starts=starts(ids, 0, None)), config)
    batch = Batch.of(window(ids, 1), starts=Starts(cache, window(ids, 0)[:, -8:-1]))
    with pytest.raises(RefineError, match="last 7 tokens"):
        refine_in_closed_form(Work(model, batch, config))
