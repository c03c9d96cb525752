"""Every state hand-over is exact: prefill to decode, prefix to rollout, padded to alone (float64 throughout)."""

import copy

import pytest
import torch

from tests.models.families import ALL_VARIANTS, FAMILY_NAMES, VARIANT_IDS, build

TIGHT = dict(rtol=1e-9, atol=1e-11)
T = 150  # more than two chunks of 64 for the delta rule, nine of 16 for LaCT


def tokens(rows: int = 2, length: int = T, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=ALL_VARIANTS, ids=VARIANT_IDS)
def model(request):
    family, _, fields = request.param
    return build(family, **fields)


@torch.no_grad()
def test_prefill_then_decode_equals_full_forward(model):
    """Token by token over the end of a chunk of the delta rule (128) and of two of LaCT's (112 and 128; 120 where chunks are of 24)."""
    ids = tokens()
    full = model(ids, use_cache=False).logits
    out = model(ids[:, :109])
    torch.testing.assert_close(out.logits, full[:, :109], **TIGHT)
    cache = out.past_key_values
    for t in range(109, 132):
        step = model(ids[:, t : t + 1], past_key_values=cache)
        torch.testing.assert_close(step.logits[:, 0], full[:, t], **TIGHT)
    assert cache.get_seq_length() == 132


@torch.no_grad()
def test_prefill_then_many_tokens_equals_full_forward(model):
    ids = tokens()
    full = model(ids, use_cache=False).logits
    for cut in (1, 2, 63, 64, 65):
        cache = model(ids[:, :cut]).past_key_values
        rest = model(ids[:, cut:], past_key_values=cache)
        torch.testing.assert_close(rest.logits, full[:, cut:], **TIGHT)


def test_snapshot_continuation_and_its_gradients_equal_running_the_prefix_again(model):
    ids, K = tokens(), 4
    positions = torch.tensor([[-1, 0, 2, 63, 64], [15, 31, 40, 127, 140]])
    rollouts = tokens(10, K, seed=2)

    out = model(ids, snapshot_positions=positions, use_cache=False)
    handed_over = model(rollouts, past_key_values=out.snapshots, use_cache=False).logits
    weight = torch.randn(handed_over.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (handed_over * weight).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    for r in range(10):
        b, p = divmod(r, 5)
        prefix = ids[b : b + 1, : int(positions[b, p]) + 1]
        again = model(torch.cat([prefix, rollouts[r : r + 1]], 1), use_cache=False).logits[:, -K:]
        torch.testing.assert_close(handed_over[r : r + 1], again, **TIGHT)
        (again * weight[r : r + 1]).sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_expanded_snapshot_rows_behave_as_separate_prefixes_and_keep_gradients():
    for family in FAMILY_NAMES:
        model = build(family)
        ids, rollouts = tokens(), tokens(12, 5, seed=4)
        snapshots = model(ids, snapshot_positions=torch.tensor([[20, 70], [33, 149]]), use_cache=False).snapshots
        expanded = snapshots.expand(3)
        assert expanded.batch_size == 12 and snapshots.batch_size == 4
        logits = model(rollouts, past_key_values=expanded, use_cache=False).logits
        for r in range(12):
            alone = model(rollouts[r : r + 1], past_key_values=snapshots.index(torch.tensor([r // 3])), use_cache=False)
            torch.testing.assert_close(logits[r : r + 1], alone.logits, **TIGHT)
        logits.sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_rows_that_share_a_state_equal_rows_with_a_copy_each(model):
    """A continuation longer than LaCT's chunk, from both sides of boundaries: where some rows learn from a second chunk, others do not."""
    ids, positions, K = tokens(), torch.tensor([[-1, 14, 62], [15, 33, 149]]), 20
    snapshots = model(ids, snapshot_positions=positions, use_cache=False).snapshots
    rollouts, grads = tokens(18, K, seed=4), []
    for share in (True, False):
        past = snapshots if share else snapshots.expand(3)
        # With hidden states asked for, every row goes on from a state of its own.
        out = model(rollouts, past_key_values=past, use_cache=False, output_hidden_states=not share)
        (out.logits * torch.sin(torch.arange(out.logits.numel())).view_as(out.logits)).sum().backward(retain_graph=share)
        grads.append([out.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_blocks_are_named_for_wrappers_which_see_branching_too(family):
    """FSDP by class name and device maps keep a block together; their hooks sit on its forward, so all passes go through it."""
    from accelerate import infer_auto_device_map
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = build(family, num_hidden_layers=4)
    names = model._no_split_modules
    assert {type(layer).__name__ for layer in model.model.layers} == set(names)
    size = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    room = {"cpu": int(3.5 * size) + 64 * 32 * 8, "disk": 10**9}  # one block of it is kept free for what comes from the disk
    split = infer_auto_device_map(model, room, no_split_module_classes=names)
    assert {split[f"model.layers.{i}"] for i in range(4)} == {"cpu", "disk"}

    snapshots = model(tokens(), snapshot_positions=torch.tensor([[20], [33]])).snapshots
    plain = model(tokens(4, 3), past_key_values=snapshots, use_cache=False).logits
    calls = []
    for layer in model.model.layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        layer.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(model(tokens(4, 3), past_key_values=snapshots, use_cache=False).logits, plain) and len(calls) == 4


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_mixer_names_what_writes_and_reads_its_fast_weights(family):
    """Every parameter of a mixer is one of these or belongs to its output; a name without a parameter is a slip."""
    for mixer in build(family, **({"use_gate": True} if family == "delta_net" else {})).model.mixers:
        parts = {name.split(".")[0] for name, _ in mixer.named_parameters()}
        assert set(mixer.fast_weight_names) <= parts
        assert parts - set(mixer.fast_weight_names) <= {"o_proj", "o_norm", "g_proj", "ttt_norm", "ttt_scale_proj"}


@torch.no_grad()
def test_states_taken_after_the_pass_equal_snapshots_asked_for_before_it(model):
    ids, positions = tokens(), torch.tensor([[3, 90], [64, 149]])
    before = model(ids, snapshot_positions=positions).snapshots
    after = model(ids, output_states=True).states.at(positions)
    for a, b in zip(before.layers, after.layers, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], **TIGHT)


@torch.no_grad()
def test_a_padded_row_equals_the_row_alone(model):
    ids, lengths = tokens(3), torch.tensor([T, 37, 81])
    columns = torch.arange(T)
    right = (columns < lengths[:, None]).long()
    left = right.flip(1)
    left_ids = torch.stack([torch.roll(row, int(T - n)) for row, n in zip(ids, lengths, strict=True)])
    more = tokens(3, 20, seed=5)
    by_length = model(ids, lengths=lengths)
    by_mask = model(ids, attention_mask=right)
    from_left = model(left_ids, attention_mask=left)
    grown = torch.cat([left, torch.ones(3, 20, dtype=torch.long)], 1)
    rest = model(more, attention_mask=grown, past_key_values=from_left.past_key_values).logits
    for r, n in enumerate(lengths.tolist()):
        alone = model(ids[r : r + 1, :n])
        for padded in (by_length.logits[r, :n], by_mask.logits[r, :n], from_left.logits[r, T - n :]):
            torch.testing.assert_close(padded, alone.logits[0], **TIGHT)
        after = model(more[r : r + 1], past_key_values=alone.past_key_values).logits
        torch.testing.assert_close(rest[r : r + 1], after, **TIGHT)
        torch.testing.assert_close(model(more, past_key_values=by_length.past_key_values.copy()).logits[r], after[0], **TIGHT)


@torch.no_grad()
def test_a_row_of_pads_only_changes_no_state(model):
    ids = tokens()
    cache = model(ids[:, :50]).past_key_values
    before = cache.copy()
    model(ids[:, 50:60], past_key_values=cache, lengths=torch.tensor([10, 0]))
    assert cache.lengths.tolist() == [60, 50]
    follow = model(ids[:, 60:70], past_key_values=cache.index(torch.tensor([1]).repeat(2))).logits
    expected = model(ids[:, 60:70], past_key_values=before.index(torch.tensor([1]).repeat(2))).logits
    torch.testing.assert_close(follow, expected, **TIGHT)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("mode", ["greedy", "beam", "sampled"])
def test_generate_in_a_left_padded_batch_equals_each_row_alone(family, mode):
    model = build(family)
    ids, lengths, width = tokens(3, 40), [40, 11, 23], 40
    batch, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for r, n in enumerate(lengths):
        batch[r, width - n :], mask[r, width - n :] = ids[r, :n], 1
    flags = dict(max_new_tokens=30, do_sample=mode == "sampled", num_beams=3 if mode == "beam" else 1, pad_token_id=0)
    flags |= dict(eos_token_id=None) | ({"top_k": 1} if mode == "sampled" else {})  # top-1: what is drawn is known
    together = model.generate(batch, attention_mask=mask, **flags)[:, width:]
    for r, n in enumerate(lengths):
        alone = model.generate(ids[r : r + 1, :n], attention_mask=torch.ones(1, n, dtype=torch.long), **flags)[:, n:]
        assert torch.equal(together[r : r + 1], alone)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_cached_generation_equals_generation_without_a_cache(family):
    model = build(family)
    flags = dict(max_new_tokens=25, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = tokens(2, 30)
    assert torch.equal(model.generate(ids, **flags), model.generate(ids, use_cache=False, **flags))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_gradient_checkpointing_changes_nothing(family):
    model, ids = build(family).train(), tokens()
    positions, rollouts = torch.tensor([[5, 100], [64, 149]]), tokens(4, 5, seed=6)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        out = model(ids, labels=ids, snapshot_positions=positions)
        (out.loss + model(rollouts, past_key_values=out.snapshots).logits.square().mean()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, grad in gradients().items():
        torch.testing.assert_close(grad, plain[name], **TIGHT)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_save_and_load_round_trip(family, tmp_path):
    from transformers import AutoModelForCausalLM

    model = build(family)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_bfloat16_weights_run_and_stay_close(family):
    exact, model = build(family), build(family, dtype=torch.float64).to(torch.bfloat16)
    out = model(tokens(), labels=tokens())
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    with torch.no_grad():
        reference = exact(tokens()).logits
        error = (out.logits.double() - reference).abs().mean()
        assert error < 0.15 * reference.std()
        cache = model(tokens()[:, :100]).past_key_values
        rest = model(tokens()[:, 100:], past_key_values=cache).logits
        assert (rest.double() - reference[:, 100:]).abs().mean() < 0.15 * reference.std()


@torch.no_grad()
def test_cache_is_read_only_without_use_cache_and_copies_are_independent():
    model, ids = build("delta_net"), tokens()
    cache = model(ids[:, :20]).past_key_values
    kept, deep = cache.copy(), copy.deepcopy(cache)
    first = model(ids[:, 20:40], past_key_values=cache, use_cache=False).logits
    second = model(ids[:, 20:40], past_key_values=cache, use_cache=True).logits
    assert torch.equal(first, second) and cache.lengths.tolist() == [40, 40]
    for untouched in (kept, deep):
        assert torch.equal(model(ids[:, 20:40], past_key_values=untouched).logits, first)


@torch.no_grad()
def test_snapshot_positions_are_input_columns_under_left_padding():
    for family in FAMILY_NAMES:
        model, ids = build(family), tokens(2, 40)
        padded = torch.cat([torch.zeros(2, 9, dtype=torch.long), ids], 1)
        mask = torch.cat([torch.zeros(2, 9, dtype=torch.long), torch.ones_like(ids)], 1)
        positions = torch.tensor([[4, 30], [11, 39]])
        plain = model(ids, snapshot_positions=positions).snapshots
        for states in (
            model(padded, attention_mask=mask, snapshot_positions=positions + 9).snapshots,
            model(padded, attention_mask=mask, output_states=True).states.at(positions + 9),
        ):
            assert torch.equal(states.lengths, plain.lengths)
            for a, b in zip(states.layers, plain.layers, strict=True):
                for name in a:
                    torch.testing.assert_close(a[name], b[name], **TIGHT)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x: m(x, snapshot_positions=torch.tensor([[150], [0]])), "snapshot_positions must lie in"),
        (lambda m, x: m(x, snapshot_positions=torch.tensor([[1, 2]])), r"must be \[B, P\]"),
        (lambda m, x: m(x, lengths=torch.tensor([151, 3])), "lengths must be between"),
        (lambda m, x: m(x, lengths=torch.tensor([9, 3]), snapshot_positions=torch.tensor([[4], [4]])), "point at pads"),
        (lambda m, x: m(x, past_key_values=m(x[:1]).past_key_values), r"expand\(N\)"),
        (lambda m, x: m(x, past_key_values=((x,),)), "FastWeightCache"),
        (lambda m, x: m(), "either input_ids or inputs_embeds"),
        (lambda m, x: m(x).past_key_values.crop(-3), "cannot be cropped"),
        (lambda m, x: m.generate(x, cache_implementation="static", max_new_tokens=2), "cache_implementation"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(build("delta_net"), tokens())
