"""transformers' own models as models with states: handed over exactly, gradients included, and still the models they were."""

import json
import warnings

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    JambaConfig,
    Llama4TextConfig,
    PhiConfig,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.models import with_states
from refine_nsp.models.borrowed import by_reference, check, classes
from refine_nsp.models.borrowed.by_reference import ByReference
from refine_nsp.models.borrowed.by_tokens import ByTokens
from refine_nsp.models.generation import Decoding, Request, answer_all
from refine_nsp.models.load import load_model
from refine_nsp.models.state import FastWeightCache
from refine_nsp.nsp.module import ReFINEStep
from tests.models.transformers_models import COMMON, CONFIGS, NAMES, RECURRENT, Float64Stays, plain, skip_if_old, stateful
from tests.nsp.schedules import assert_same_gradients, assert_schedules_agree, gradients

TIGHT = dict(rtol=1e-9, atol=1e-11)
T = 50
LENGTHS = torch.tensor([50, 31, 24])


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    monkeypatch.setattr(by_reference, "KEPT_EVERY_TOKENS", 16)


@pytest.fixture
def float64():
    with Float64Stays():
        yield


def tokens(rows: int = 3, length: int = T, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- states -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("cuts", "n", "n_tokens", "expected"),
    [
        ([], 0, 50, []),
        ([10, 20], 2, 50, [10, 20]),
        ([10, 20], 4, 50, [10, 20, 27, 35]),
        ([], 3, 8, [2, 4, 6]),
        ([1], 9, 3, [1, 2]),
        ([], 4, 1, []),
    ],
)
def test_passes_in_shards_have_as_many_segments_whatever_the_positions(cuts, n, n_tokens, expected):
    assert by_reference.filled(cuts, n, n_tokens) == expected


@pytest.mark.parametrize("name", [*(n for n in NAMES if n != "kimi_linear"), pytest.param("kimi_linear", marks=pytest.mark.slow)])
def test_all_schedules_give_the_same_loss_and_gradients(name, float64):
    model = stateful(name).train()
    assert isinstance(model.model.state_method, ByReference)
    assert_schedules_agree(
        model, tokens(), LENGTHS, positions_per_sequence=2, num_generations=2, rollout_length=3, reward_funcs="hybrid", min_prefix=5,
        baseline="leave_one_out",
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_snapshots_go_on_as_the_prefix_read_again_and_so_do_their_gradients(name, float64):
    """From before the first token, at both edges of a segment, for rows of different lengths, one token and several at a time (but
    Nemotron-H, whose own code limits time steps only in passes of several tokens)."""
    model, original = stateful(name), plain(name)
    ids, rollouts = tokens(2), tokens(8, 3, seed=2)
    positions = torch.tensor([[-1, 0 if model.model.state_method.same_by_single_tokens else 1, 15, 16], [2, 30, 31, 49]])
    before = model.model(ids, snapshot_positions=positions).snapshots
    after = model.model(ids, output_states=True).states.at(positions)
    weight = torch.randn(8, 3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    again = []
    for r in range(8):
        b, p = divmod(r, 4)
        prefix = ids[b, : int(positions[b, p]) + 1]
        again.append(original(torch.cat([prefix, rollouts[r]])[None], use_cache=False).logits[0, -3:])
    again = torch.stack(again)
    (again * weight).sum().backward()
    expected = gradients(original)
    for snapshots in (before, after):
        kept = [{k: x.detach().clone() for k, x in layer.items()} for layer in snapshots.layers]
        together = model(rollouts, past_key_values=snapshots, use_cache=False).logits
        cache, one_by_one = snapshots.copy(), []
        for j in range(3):
            one_by_one.append(model(rollouts[:, j : j + 1], past_key_values=cache, use_cache=True).logits)
        if model.model.state_method.same_by_single_tokens:
            torch.testing.assert_close(torch.cat(one_by_one, 1), together, **TIGHT)
            together = (together + torch.cat(one_by_one, 1)) / 2
        torch.testing.assert_close(together, again, **TIGHT)
        (together * weight).sum().backward()
        assert_same_gradients(gradients(model), expected)
        for layer, copy in zip(snapshots.layers, kept, strict=True):
            assert all(torch.equal(layer[k], copy[k]) for k in copy)  # nothing wrote to what was handed over


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_cached_equals_uncached_and_padded_equals_alone(name, float64):
    model, original, ids, more = stateful(name), plain(name), tokens(), tokens(3, 4, seed=5)
    right = (torch.arange(T) < LENGTHS[:, None]).long()
    left_ids = torch.stack([torch.roll(row, int(T - n)) for row, n in zip(ids, LENGTHS, strict=True)])
    by_length = model.model(ids, lengths=LENGTHS, use_cache=True)
    from_left = model.model(left_ids, attention_mask=right.flip(1), use_cache=True)
    for r, n in enumerate(LENGTHS.tolist()):
        whole = original.model(torch.cat([ids[r, :n], more[r]])[None], use_cache=False).last_hidden_state[0]
        whole = whole * model.model.head_factor
        torch.testing.assert_close(by_length.last_hidden_state[r, :n], whole[:n], **TIGHT)
        torch.testing.assert_close(from_left.last_hidden_state[r, T - n :], whole[:n], **TIGHT)
        for cache in (
            by_length.past_key_values,
            from_left.past_key_values,
            by_length.past_key_values.index(torch.tensor([r] * 3)),
        ):
            rest = model.model(more, past_key_values=cache, use_cache=False).last_hidden_state
            torch.testing.assert_close(rest[r], whole[n:], **TIGHT)
    cache = by_length.past_key_values
    model.model(more, past_key_values=cache, lengths=torch.tensor([4, 0, 2]), use_cache=True)  # a row of pads only
    assert cache.lengths.tolist() == [54, 31, 26]
    rest = model.model(more, past_key_values=cache, use_cache=False).last_hidden_state
    expected = original.model(torch.cat([ids[1, :31], more[1]])[None], use_cache=False).last_hidden_state[0, 31:]
    torch.testing.assert_close(rest[1], expected * model.model.head_factor, **TIGHT)


@pytest.mark.parametrize("name", NAMES)
def test_the_closed_form_is_that_of_the_plain_model_s_logits(name, float64):
    model, original, ids, K = stateful(name).train(), plain(name), tokens(), 2
    scores = torch.rand(3, T, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    config = NSPConfig.preset("expected", rollout_length=K, lambda_rl=0.7)
    result = ReFINEStep(model, config)(ids, lengths=LENGTHS, scores=scores)
    result.loss.backward()
    log_p = original(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    real = torch.arange(T - 1) < LENGTHS[:, None] - 1
    count = real.sum()
    J = (log_p.exp()[:, : T - 2] + (log_p[:, : T - 2] + log_p[:, 1:]).exp()) / K - 1
    allowed = torch.arange(T - 2) < LENGTHS[:, None] - K
    loss = -(log_p * real).sum() / count - 0.7 * (J * scores[:, : T - 2] * allowed).sum() / count
    loss.backward()
    torch.testing.assert_close(result.loss, loss, rtol=1e-8, atol=1e-9)
    assert_same_gradients(gradients(model), gradients(original), 1e-7)


@pytest.mark.parametrize("name", ["qwen3_next", "bamba", "llama"])
def test_gradient_checkpointing_changes_nothing(name):
    model = stateful(name).train()
    step = ReFINEStep(model, NSPConfig(positions_per_sequence=2, rollout_length=3, min_prefix=5, schedule="fused"))

    def run() -> dict[str, torch.Tensor]:
        step(tokens(), lengths=LENGTHS, generator=torch.Generator().manual_seed(0)).loss.backward()
        return gradients(model)

    before = run()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_gradients(run(), before, 1e-10)
    assert model.is_gradient_checkpointing


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear", "falcon_h1", "mistral"])
def test_states_in_the_precision_a_model_runs_in(name):
    """As transformers computes it: float32 inside whatever the weights are, and bfloat16 around that."""
    for dtype, tolerance in ((torch.float64, 1e-4), (torch.float32, 1e-4), (torch.bfloat16, 0.15)):
        model, ids = stateful(name, dtype=dtype), tokens()
        model.set_attn_implementation("sdpa")
        whole = model.model(ids, use_cache=False).last_hidden_state
        first = model.model(ids[:, :33], use_cache=True)
        rest = model.model(ids[:, 33:], past_key_values=first.past_key_values).last_hidden_state
        ragged = model.model(ids, snapshot_positions=torch.tensor([[20], [33], [33]])).snapshots
        holes = model.model(ids[:, 34:], past_key_values=ragged, use_cache=False).last_hidden_state
        assert rest.dtype == dtype
        assert float((rest - whole[:, 33:]).abs().mean() / whole.std()) < tolerance
        assert float((holes[1:] - whole[1:, 34:]).abs().mean() / whole.std()) < tolerance


# --- evaluation -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_that_generate_gives(name, float64, monkeypatch):
    monkeypatch.setattr("refine_nsp.models.generation.PREFILL_BLOCK", 17)
    monkeypatch.setattr("refine_nsp.models.generation.SHARED_TOKENS", 10)
    model, original = stateful(name), plain(name)
    base = tokens(1, 20)[0].tolist()
    prompts = [[*base, 5, 6], [*base, 9], tokens(1, 7, seed=8)[0].tolist(), [4]]
    asked = [Request(i, ids, 5) for i, ids in enumerate(prompts)]
    answers = {r.key: found for batch in answer_all(model, asked, set(), Decoding(), 100) for r, found in batch}
    flags = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    width = max(map(len, prompts))
    left = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    for model_ in (model, original):  # stateful or not, its own generate()
        together = model_.generate(left, attention_mask=mask, **flags)[:, width:].tolist()
        assert together == [answers[i] for i in range(len(prompts))]


# --- the model it was -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_in_the_hub_s_layout_loads_and_is_saved_as_the_plain_model(name, tmp_path):
    original = plain(name, dtype=torch.float32)
    skip_if_old(original)
    original.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    assert (tmp_path / "a" / "model.safetensors.index.json").exists()
    model = load_model(tmp_path / "a")
    assert isinstance(model.model.state_method, ByReference) and not model.training
    ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-5)
        head = model.lm_head(model.model(ids, use_cache=False).last_hidden_state)
        torch.testing.assert_close(head, original(ids).logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert type(again) is type(original) and not hasattr(again, "state_method")
    assert again.state_dict().keys() == original.state_dict().keys()
    assert all(torch.equal(x, again.state_dict()[k]) for k, x in original.state_dict().items())
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in "ab"]
    assert configs[0] == configs[1]


def test_missing_and_unknown_parameters_are_refused_with_their_names(tmp_path):
    from safetensors.torch import load_file, save_file

    plain("qwen3_next", dtype=torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    changed = {k: x for k, x in tensors.items() if k != "model.layers.0.linear_attn.A_log"} | {
        "model.extra.weight": torch.zeros(2)
    }
    save_file(changed, path, metadata={"format": "pt"})
    with pytest.raises(
        RefineError, match=r"1 missing: model\.layers\.0\.linear_attn\.A_log; 1 unknown to the model: model\.extra"
    ):
        load_model(tmp_path)
    save_file(tensors | {"model.norm.weight": torch.zeros(3)}, path, metadata={"format": "pt"})
    with pytest.raises(RefineError, match=r"1 of another shape: model\.norm\.weight"):
        load_model(tmp_path)


def test_the_text_model_of_a_checkpoint_of_several_kinds_of_input_loads(tmp_path):
    """As Qwen3.5's are on the hub: under other names, beside a vision tower."""
    torch.manual_seed(0)
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, num_position_embeddings=16)
    tokens_of_images = dict(image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63)
    config = Qwen3_5Config(text_config=plain("qwen3_5").config.to_dict(), vision_config=vision, **tokens_of_images)
    original = Qwen3_5ForConditionalGeneration(config).eval()
    original.save_pretrained(tmp_path)
    model, ids = load_model(tmp_path), tokens() % 60
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(input_ids=ids).logits)


def test_what_is_asked_of_the_plain_model_is_answered_by_it():
    model, original, ids = stateful("granite_4"), plain("granite_4"), tokens()
    a, b = (m(ids, labels=ids) for m in (model, original))
    assert torch.equal(a.logits, b.logits) and torch.equal(a.loss, b.loss)
    assert type(a.past_key_values) is type(b.past_key_values)
    continued = [m(ids[:, 20:], past_key_values=m(ids[:, :20]).past_key_values).logits for m in (model, original)]
    assert torch.equal(*continued)
    assert with_states(model) is model and isinstance(model, type(original))


def test_peft_wraps_it_as_any_model_of_transformers():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(stateful("qwen3_next"), LoraConfig(r=4, target_modules="all-linear"))
    step = ReFINEStep(model, NSPConfig(positions_per_sequence=2, rollout_length=3, min_prefix=5))
    step(tokens(), lengths=LENGTHS, generator=torch.Generator().manual_seed(0)).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert grads and all(g is not None and bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize(
    "name", [name if name == "qwen3_5" else pytest.param(name, marks=pytest.mark.slow) for name in [*RECURRENT, "llama"]]
)
def test_any_random_model_keeps_its_states_by_reference(name):
    """Heads that decay within a few tokens included, as weights drawn by transformers have them."""
    for seed in range(12):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[name]())
        skip_if_old(model)
        assert isinstance(with_states(model).model.state_method, ByReference), seed


def test_the_check_can_be_left_out(monkeypatch):
    monkeypatch.setattr(classes, "check", None)
    with_states(plain("llama"), check_states=False)


# --- what cannot be exact ---------------------------------------------------------------------------------------------
def test_states_of_an_unknown_kind_are_read_again_and_that_is_said_once(float64):
    """Llama-4 attends in chunks counted from the batch's left edge."""
    torch.manual_seed(0)
    config = Llama4TextConfig(
        **COMMON, head_dim=8, intermediate_size_mlp=48, num_hidden_layers=2, attention_chunk_size=16, num_local_experts=2,
        layer_types=["chunked_attention", "full_attention"],
    )  # fmt: skip
    config._attn_implementation = config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).double()
    with pytest.warns(UserWarning, match="llama4_text.*chunked_attention.*reprefill.*estimator=closed_form") as said:
        with_states(model)
    assert len(said) == 1 and isinstance(model.model.state_method, ByTokens)
    _schedules_agree(model)


def test_states_that_do_not_pass_the_check_are_read_again(float64):
    """Jamba's layers forget their state where several tokens follow, which an untrained model's output hardly shows."""
    torch.manual_seed(0)
    config = JambaConfig(**COMMON, num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=4)
    config._attn_implementation = config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).double()
    with pytest.warns(UserWarning, match="do not go on from their recurrent state|change states in place"):
        with_states(model)
    _schedules_agree(model)


def test_an_older_transformers_reads_recurrent_layers_again(float64, monkeypatch):
    """Its layers write into the states they are given; keys and values are as exact as ever."""
    monkeypatch.setattr(check, "OLD", True)
    model = plain("qwen3_next")
    with pytest.warns(UserWarning, match="qwen3_next.*change states in place in transformers .*reprefill"):
        with_states(model)
    assert isinstance(model.model.state_method, ByTokens)
    _schedules_agree(model)
    assert isinstance(with_states(plain("llama")).model.state_method, ByReference)


def _schedules_agree(model) -> None:
    model.train()
    found = []
    for schedule in ("reprefill", "snapshot", "fused"):
        config = NSPConfig(positions_per_sequence=2, num_generations=2, rollout_length=3, min_prefix=5, schedule=schedule)
        step = ReFINEStep(model, config)
        step(tokens(), lengths=LENGTHS, generator=torch.Generator().manual_seed(0)).loss.backward()
        found.append(gradients(model))
    for g in found[1:]:
        assert_same_gradients(g, found[0])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Gemma2Config(**COMMON, head_dim=8, num_hidden_layers=1), "caps its logits"),
        (PhiConfig(**COMMON, num_hidden_layers=1), "head has a bias"),
    ],
)
def test_heads_that_are_more_than_a_product_are_refused(config, words):
    with pytest.raises(RefineError, match=words):
        with_states(AutoModelForCausalLM.from_config(config))


def test_a_cache_of_other_rows_is_refused():
    model, ids = stateful("llama"), tokens()
    cache = model.model(ids, use_cache=True).past_key_values
    assert isinstance(cache, FastWeightCache) and cache.lengths.tolist() == [T] * 3
    with pytest.raises(RefineError, match=r"expand\(N\)"):
        model.model(ids[:2], past_key_values=cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_states(plain("llama"))
