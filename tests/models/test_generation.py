"""Answers do not depend on how prompts are batched, cut into blocks or share a prefix, and equal `generate()`."""

import random

import pytest
import torch

from refine_nsp.errors import RefineError
from refine_nsp.models import generation
from refine_nsp.models.generation import Decoding, Request, answer_all, choose, decode, prefill, shared_groups
from refine_nsp.prompts.encoding import truncate_middle
from tests.models.families import build

FAMILIES = ["delta_net", "gated_deltanet", "lact_swiglu"]
EOS = {3}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(generation, "PREFILL_BLOCK", 37)
    monkeypatch.setattr(generation, "SHARED_TOKENS", 10)


def requests():
    rng = random.Random(0)
    draw = lambda n: [rng.randrange(64) for _ in range(n)]  # noqa: E731
    alone = [Request(i, draw(rng.randrange(1, 120)), rng.randrange(1, 12)) for i in range(6)]
    base = draw(90)
    return [*alone, *(Request(10 + i, base + draw(4 + i), 8) for i in range(4))]


def collect(model, asked, decoding, batch_tokens=300):
    return {r.key: tokens for batch in answer_all(model, asked, EOS, decoding, batch_tokens) for r, tokens in batch}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decoding", [Decoding(), Decoding(greedy=False, temperature=0.8, top_k=10, seed=3)])
def test_batched_answers_are_single_answers(family, decoding):
    model, asked = build(family).eval(), requests()
    together = collect(model, asked, decoding)
    for r in asked:
        hidden, cache = prefill(model, [r.ids])
        assert decode(model, hidden, cache, [r], EOS, decoding)[0] == together[r.key]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_generate_s(family):
    model, asked = build(family).eval(), requests()
    for key, tokens in collect(model, asked, Decoding()).items():
        r = next(r for r in asked if r.key == key)
        ids = torch.tensor([r.ids])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=r.budget, do_sample=False, eos_token_id=3, pad_token_id=0
        )[0, len(r.ids) :].tolist()
        assert tokens == (out[: out.index(3)] if 3 in out else out)


def test_rows_may_be_kept():
    model, asked = build("delta_net").eval(), requests()
    hidden, cache = prefill(model, [r.ids for r in asked])
    assert decode(model, hidden, cache, asked, EOS, Decoding()) == decode(
        model, hidden, cache, asked, EOS, Decoding(), keep_rows=True
    )


def test_a_shared_prefix_is_read_once():
    model, asked, read = build("delta_net").eval(), requests(), []
    for _ in answer_all(model, asked, EOS, Decoding(), 300, read.append):
        pass
    total, shared = sum(len(r.ids) for r in asked), [(n, len(m)) for n, m in shared_groups(asked) if n]
    assert shared == [(90, 4)] and sum(read) == total - 3 * 90


def test_sampling_follows_the_distribution_cut_to_top_k():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    g = torch.Generator().manual_seed(0)
    drawn = torch.tensor([choose(logits, [g], Decoding(False, 0.5, 2))[0] for _ in range(4000)])
    p = (logits[0, :2] / 0.5).softmax(0)
    assert set(drawn.tolist()) == {0, 1} and abs(float((drawn == 0).double().mean()) - float(p[0])) < 0.02


def test_middle_truncation_keeps_both_ends():
    ids = list(range(100))
    assert truncate_middle(ids, 100) == ids
    assert truncate_middle(ids, 10) == [0, 1, 2, 3, 4, 95, 96, 97, 98, 99]
    assert truncate_middle(ids, 10, tail=8) == [0, 1, *range(92, 100)]
    with pytest.raises(RefineError, match="its end alone, which is kept, has 11"):
        truncate_middle(ids, 10, tail=11)


def test_an_empty_prompt_is_refused():
    with pytest.raises(RefineError, match="prompt 0 has no tokens"):
        list(answer_all(build("delta_net"), [Request(0, [], 4)], EOS, Decoding(), 100))
