"""Recall documents and probes say what they claim, and the shipped base recalls."""

import random

import pytest
import torch

import refine_nsp
from refine_nsp.evaluation.statistics import t_interval
from refine_nsp.models.load import SHIPPED
from refine_nsp.tiny.corpus import HELD_OUT, standard_library
from refine_nsp.tiny.documents import NAMES, VALUES, FactTokens, fact_document, fact_probe
from refine_nsp.tiny.measures import ProbeSet, score_probes, score_text
from refine_nsp.tiny.models import NEW_MODELS
from refine_nsp.tiny.pretrain_settings import PretrainConfig
from refine_nsp.tiny.rows import encode_texts


@pytest.fixture(scope="module")
def base():
    return refine_nsp.load("refine-nsp/tiny-delta-net")


@pytest.fixture(scope="module")
def filler(base):
    return encode_texts(base[1], standard_library(held_out=True)[:2]).tolist()


def make_probes(tokenizer, filler, kinds, per_kind, seed):
    """`per_kind` probes for each (length, facts)."""
    tokens, sets = FactTokens.of(tokenizer), []
    for length, facts in kinds:
        rng = random.Random(f"{seed}-{length}-{facts}")
        sets.append(ProbeSet.of(length, [fact_probe(rng, tokens, filler, length, facts) for _ in range(per_kind)]))
    return sets


def test_every_word_of_a_fact_is_one_token(base):
    tokens = FactTokens.of(base[1])
    assert all(len(t) == 1 for t in [*tokens.names, *tokens.values, tokens.equals, tokens.end])
    assert len(set(NAMES)) == len(NAMES) and len(set(VALUES)) == len(VALUES)


def test_masked_answers_were_stated_before(base, filler):
    tokenizer, tokens = base[1], FactTokens.of(base[1])
    for seed in range(20):
        ids, mask = fact_document(random.Random(seed), tokens, filler, 256, 0.8)
        assert len(ids) == len(mask) == 256 and any(mask)
        first = mask.index(True)
        name = tokenizer.decode(ids[first - 2 : first])
        assert name + tokenizer.decode(ids[first : first + 2]) in tokenizer.decode(ids[: first - 2])


def test_probes_have_the_exact_length_and_hold_the_answer(base, filler):
    for probes in make_probes(base[1], filler, [(128, 4), (256, 16)], 5, seed=0):
        for prompt, answer in zip(probes.prompts, probes.answers, strict=True):
            assert len(prompt) == probes.length
            asked = base[1].decode(prompt[-2:])
            text = base[1].decode(prompt)
            assert asked + base[1].decode(answer) + ";" in text


def test_probe_scores_equal_generation(base, filler):
    model = base[0]
    probes = make_probes(base[1], filler, [(200, 4)], 12, seed=3)[0]
    right = 0
    for prompt, answer in zip(probes.prompts, probes.answers, strict=True):
        made = model.generate(torch.tensor([prompt]), max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
        right += made[0, -2:].tolist() == answer
    assert score_probes(model, probes).greedy == right / 12


def repeated(start: int, end: int, again: int) -> torch.Tensor:
    """[1, 60] different tokens, but those from `start` to `end` stand once more from `again` on."""
    ids = torch.randperm(2000)[None, :60]
    ids[0, again : again + end - start] = ids[0, start:end]
    return ids


@pytest.mark.parametrize("width", [128, 192])
def test_lact_starts_with_the_key_of_a_value_like_the_query_that_asks_for_it(width):
    """At initialisation: in the second layer the fast key of a token equals the fast query at the same two tokens' second mention."""
    torch.manual_seed(0)
    model = NEW_MODELS["lact_swiglu"](PretrainConfig(model_type="lact_swiglu", hidden_size=width), 2048)
    ids = repeated(10, 15, again=50)
    seen = []
    mixer = model.model.layers[1].attn
    mixer.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        model.model(ids, use_cache=False)
        q, k, v = mixer.qkv(seen[0]).chunk(3, -1)
        fast_q, tokens = mixer._fast_inputs(seen[0], q, k, v, None)
    similar = fast_q[0, 0, 51:55] @ tokens.k[0, 0, :49].T  # after (a, b) comes c: the key of c, one place on
    assert similar.argmax(-1).tolist() == [12, 13, 14, 15]


def test_lact_starts_by_reading_what_was_written():
    """At initialisation, beyond the attention window: at a token's second mention the fast weights read what stood behind the first."""
    torch.manual_seed(0)
    model = NEW_MODELS["lact_swiglu"](PretrainConfig(model_type="lact_swiglu", hidden_size=192), 2048)
    ids = torch.randperm(2000)[None, :100].repeat(1, 2)
    inputs, read = [], []
    mixer = model.model.layers[1].attn
    mixer.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    mixer.ttt_norm.register_forward_hook(lambda module, args, out: read.append(out[0]))  # [heads, T, 96]
    with torch.no_grad():
        model.model(ids, use_cache=False)
        written = torch.nn.functional.silu(mixer.qkv(inputs[0])[0, :100, -192:]).unflatten(-1, (2, 96)).transpose(0, 1)
    again = read[0][:, 101:199]
    similar = torch.nn.functional.normalize(again, dim=-1) @ torch.nn.functional.normalize(written, dim=-1).mT
    assert (similar.argmax(-1) == torch.arange(2, 100)).float().mean() > 0.3  # of 100 tokens
    assert again.square().mean().sqrt() > 0.3  # as large as other things in the residual stream, not lost in the norm's epsilon
    for layer in model.model.layers[1:]:
        undone = layer.attn.o_proj.weight @ layer.attn.qkv.weight[-192:]
        torch.testing.assert_close(undone, undone[0, 0] * torch.eye(192), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["delta_net", "gated_deltanet"])
def test_delta_rules_start_with_the_key_of_a_value_like_the_query_that_asks_for_it(name):
    torch.manual_seed(0)
    config = PretrainConfig(model_type=name, hidden_size=192, num_heads=3, intermediate_size=512)
    model = NEW_MODELS[name](config, 2048)
    assert 2.0e6 < model.num_parameters() < 2.4e6
    mixer = model.model.layers[0].attn
    x = torch.nn.functional.layer_norm(model.model.embeddings(repeated(10, 15, again=50)), [192])
    with torch.no_grad():
        made = (conv(proj(x), None)[0] for proj, conv in ((mixer.q_proj, mixer.q_conv1d), (mixer.k_proj, mixer.k_conv1d)))
        q, k = (torch.nn.functional.normalize(z.unflatten(-1, (3, 64)), dim=-1) for z in made)  # [T, heads, 64]
    similar = torch.einsum("thd,shd->hts", q, k[:49])
    # The first head reads what it wrote at the same token, without looking back.
    torch.testing.assert_close(q[:, 0], k[:, 0])
    # After (a, b, c) comes d: the key of d, one place on; the last head needs two tokens for it, the one before three.
    assert similar[1, 52:55].argmax(-1).tolist() == [13, 14, 15]
    assert similar[2, 51:55].argmax(-1).tolist() == [12, 13, 14, 15]
    for layer in model.model.layers[1:]:
        o, v = layer.attn.o_proj.weight, layer.attn.v_proj.weight
        undone = o @ v  # what is read is what was written
        torch.testing.assert_close(undone, undone[0, 0] * torch.eye(192), atol=1e-4, rtol=0)


def test_gated_delta_net_starts_with_a_long_memory():
    torch.manual_seed(0)
    model = NEW_MODELS["gated_deltanet"](PretrainConfig(hidden_size=192, num_heads=3), 2048)
    for layer in model.model.layers:
        _, g = layer.attn._gates(torch.randn(1, 400, 192), None)  # log decay [B, T, HV]
        kept = (500 * g.mean(1)).exp()[0]
        assert kept.min() > 0.5 and kept[0] < kept[-1]


def test_t_intervals():
    assert t_interval([1.0, 1.1, 0.9]) == (pytest.approx(1.0), pytest.approx(4.303 * 0.1 / 3**0.5))
    assert t_interval([1.0])[1] != t_interval([1.0])[1]  # nan: one seed has no spread


def test_sampled_accuracy_and_temperature(base, filler):
    windows = torch.tensor(filler[: 4 * 128]).view(4, 128)
    warm, cold = score_text(base[0], windows), score_text(base[0], windows, temperature=0.5)
    with torch.no_grad():
        log_p = (base[0](windows).logits[:, :-1] / 0.5).log_softmax(-1)
    truth = log_p.gather(-1, windows[:, 1:, None])
    assert cold.sampled_accuracy == pytest.approx(float(truth.exp().mean()), rel=1e-3)
    assert cold.loss == pytest.approx(float(-truth.mean()), rel=1e-3)
    assert cold.accuracy == warm.accuracy and cold.entropy < warm.entropy


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_bases_recall_far_above_chance_and_model_text(name, filler):
    model, tokenizer = refine_nsp.load(name)
    near, far = make_probes(tokenizer, filler, [(256, 4), (256, 16)], 40, seed=9)
    assert score_probes(model, near).greedy > 0.7
    assert score_probes(model, far).greedy > 0.4
    assert score_text(model, torch.tensor(filler[: 8 * 512]).view(8, 512)).loss < 3.5


def test_held_out_modules_are_not_trained_on():
    train, held = standard_library(held_out=False), standard_library(held_out=True)
    assert len(held) >= len(HELD_OUT) and not set(train) & set(held)
