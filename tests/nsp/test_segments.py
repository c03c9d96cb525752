"""By segments a step is what it is in one piece: the same losses and gradients, for every family and estimator.

Memory grows by what is said."""

import math

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.estimate.counter import Counter
from refine_nsp.models.segments import read_by_segments, segment_ends
from refine_nsp.nsp.module import ReFINEStep
from refine_nsp.nsp.records import Batch
from refine_nsp.ops import linear_cross_entropy
from refine_nsp.training.phases import MicroBatch, NextToken
from tests.models.families import FAMILY_NAMES, build
from tests.models.transformers_models import float64_throughout, stateful
from tests.nsp.schedules import assert_same_gradients, gradients

LENGTHS = torch.tensor([150, 97, 43])  # rows that end inside a segment, and before the last
SIZES = (37, 64, 148)  # dividing nothing, no multiple of LaCT's chunk; the last would leave two tokens
HYBRIDS = ("qwen3_next", "bamba", "falcon_h1", "mistral", "llama")
ESTIMATORS = {
    "closed form": dict(estimator="closed_form", rollout_length=3, local_window=16),
    "closed form, selected": dict(estimator="closed_form", rollout_length=3, token_weights="selected", min_prefix=5),
    "likelihood": dict(estimator="closed_form", order=math.inf, rollout_length=1, local_window=16),
    "snapshot": dict(schedule="snapshot", num_generations=2, reward_funcs="hybrid", min_prefix=5, baseline="leave_one_out"),
    "fused": dict(schedule="fused", num_generations=2, reward_funcs="hybrid", min_prefix=5, baseline="leave_one_out"),
}


@pytest.fixture
def float64():
    with float64_throughout():
        yield


def ids(rows: int = 3, length: int = 150) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def step_of(model, settings: dict, size: int | None, length: int = 150, lengths: torch.Tensor = LENGTHS):
    config = NSPConfig(positions_per_sequence=3, lambda_rl=1.0, segment_tokens=size, **settings)
    result = ReFINEStep(model, config)(ids(length=length), lengths=lengths, generator=torch.Generator().manual_seed(0))
    result.loss.backward()
    return result, gradients(model)


def ntp(model, size: int | None, length: int = 150, lengths: torch.Tensor = LENGTHS):
    batch = MicroBatch(Batch.of(ids(length=length), lengths), totals={"targets": 100.0})
    loss, _ = NextToken(NSPConfig(segment_tokens=size)).loss(model, batch)
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same_step(a, b, lengths: torch.Tensor = LENGTHS) -> None:
    torch.testing.assert_close(a[0].loss, b[0].loss, rtol=1e-9, atol=1e-12)
    real = torch.arange(a[0].entropy.shape[1]) < lengths[:, None]  # pads mean nothing
    torch.testing.assert_close(a[0].entropy[real], b[0].entropy[real], rtol=1e-9, atol=1e-12)
    for name in ("positions", "rollouts"):
        if getattr(a[0], name) is not None:
            assert torch.equal(getattr(a[0], name), getattr(b[0], name))
    assert_same_gradients(a[1], b[1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_next_token_gradients_are_those_of_one_piece(family, size):
    model = build(family).train()
    whole, parts = ntp(model, None), ntp(model, size)
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-10, atol=1e-12)
    assert_same_gradients(parts[1], whole[1])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_estimator_learns_the_same(family, estimator):
    model = build(family).train()
    whole = step_of(model, ESTIMATORS[estimator], None)
    for size in SIZES[:2]:
        assert_same_step(step_of(model, ESTIMATORS[estimator], size), whole)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_with_gradient_checkpointing_of_the_blocks_inside(family):
    model = build(family).train()
    whole = step_of(model, ESTIMATORS["snapshot"], None), ntp(model, None)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_step(step_of(model, ESTIMATORS["snapshot"], 37), whole[0])
    assert_same_gradients(ntp(model, 37)[1], whole[1][1])


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        *((name, None) for name in HYBRIDS),
        ("bamba", "gradient"),
        ("llama", "activation"),
        *(pytest.param(name, "activation", marks=pytest.mark.slow) for name in ("qwen3_next", "bamba")),
    ],
)
def test_hybrids(name, checkpointing, float64):
    model, lengths = stateful(name).train(), torch.tensor([50, 31, 24])
    settings = [ESTIMATORS[e] for e in ("closed form", "snapshot", *(["fused"] if name == "qwen3_next" else []))]
    whole = [step_of(model, s, None, 50, lengths) for s in settings]
    plain = ntp(model, None, 50, lengths)
    if checkpointing == "gradient":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if checkpointing == "activation":
        layers = model.model.layers
        for i, layer in enumerate(layers):  # as FSDP's activation_checkpointing
            layers[i] = checkpoint_wrapper(layer, preserve_rng_state=False)
    for s, expected in zip(settings, whole, strict=True):
        for size in (13, None) if checkpointing else (13,):
            found, grads = step_of(model, s, size, 50, lengths)
            assert_same_step((found, as_named(grads)), expected, lengths)
    assert_same_gradients(as_named(ntp(model, 13, 50, lengths)[1]), plain[1])


def as_named(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names of a model whose layers are not wrapped."""
    return {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in gradients.items()}


@pytest.mark.parametrize("name", [*FAMILY_NAMES, "qwen3_next", "mistral"])
def test_states_at_any_position_known_before_or_after(name):
    """At both edges of segments, before the first token, and in rows that have ended."""
    with float64_throughout():
        model = build(name) if name in FAMILY_NAMES else stateful(name)
        x, lengths = ids(2, 50), torch.tensor([50, 28])
        positions = torch.tensor([[-1, 12, 13, 49], [1, 14, 26, 27]])
        tokens = ids(8, 3)
        whole = model.model(x, lengths=lengths, snapshot_positions=positions).snapshots
        before = read_by_segments(model.model, x, lengths, 13, positions).snapshots
        after = read_by_segments(model.model, x, lengths, 13).at(positions)
        expected = model.model(tokens, past_key_values=whole, use_cache=False).last_hidden_state
        for snapshots in (before, after):
            assert torch.equal(snapshots.lengths, whole.lengths)
            found = model.model(tokens, past_key_values=snapshots, use_cache=False).last_hidden_state
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def counted_peak(model, size: int | None, length: int) -> float:
    with Counter() as counter:
        ntp(model, size, length, torch.tensor([length] * 3))
    model.zero_grad()
    return max(counter.peaks.values())


@pytest.mark.parametrize(
    "family", ["delta_net", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILY_NAMES if f != "delta_net")]
)
def test_memory_grows_by_a_hidden_vector_a_token_and_a_state_a_segment(family, monkeypatch):
    """And the few numbers of a token itself, as its id and its loss."""
    monkeypatch.setattr(linear_cross_entropy, "BLOCK_LOGITS", 64 * 128)  # blocks of 128 tokens, far fewer than there are
    model, size, short, long = build(family, dtype=torch.float32).train(), 128, 512, 2048
    layers = model.model(ids(length=size), use_cache=True).past_key_values.layers
    state_bytes = sum(x.numel() * x.element_size() for layer in layers for x in layer.values())
    more_tokens, more_segments = 3 * (long - short), (long - short) // size
    stated = more_tokens * (model.config.hidden_size * 4 + 16) + more_segments * state_bytes
    growth = counted_peak(model, size, long) - counted_peak(model, size, short)
    assert 0.8 * stated < growth < 1.05 * stated
    assert counted_peak(model, None, long) > 3.5 * counted_peak(model, None, short)  # in one piece everything grows


def test_segments_end_where_no_model_needs_code_of_its_own():
    assert segment_ends(10, 4, set()) == [4, 8, 10]
    assert segment_ends(9, 4, set()) == [4, 9]  # not a single token
    assert segment_ends(10, 4, {4}) == [3, 8, 10]  # no position at a first token
    assert segment_ends(12, 4, set(range(12))) == [
        4,
        8,
        12,
    ]  # where there is such a place; their number depends on the length alone


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NSPConfig(segment_tokens=1), "segment_tokens must be at least 2"),
        (lambda: NSPConfig(segment_tokens=64, schedule="reprefill"), "use schedule='snapshot'"),
    ],
)
def test_settings_that_do_not_fit_are_named(make, words):
    with pytest.raises(RefineError, match=words):
        make()
