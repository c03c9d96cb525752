"""Documents packed in one row: the figures of documents apart, in every way that libraries say where one begins (float64)."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from refine_nsp.errors import RefineError
from refine_nsp.models import FastWeightCache
from refine_nsp.models.documents import Documents
from tests.models.families import FAMILY_NAMES, build
from tests.models.transformers_models import RECURRENT, float64_throughout, plain, stateful

TIGHT = dict(rtol=1e-9, atol=1e-11)
LENGTHS = [19, 1, 40, 7, 7]  # both sides of LaCT's chunks of 16 and window of 12; a document without a target of its own
T = sum(LENGTHS)
BOUNDARIES = torch.tensor([0, *LENGTHS]).cumsum(0)
FLASH = dict(cu_seq_lens_q=BOUNDARIES.int(), cu_seq_lens_k=BOUNDARIES.int(), max_length_q=40, max_length_k=40)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
NUMBERS = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)])[None].int()
WAYS = {
    "position_ids": {"position_ids": POSITIONS},
    "cu_seqlens": {"cu_seqlens": BOUNDARIES},
    "seq_idx": {"seq_idx": NUMBERS},
    "one of flash-attention's": {"cu_seq_lens_q": BOUNDARIES.int()},
    "flash-attention's": FLASH,
    "all": {**FLASH, "position_ids": POSITIONS, "cu_seqlens": BOUNDARIES, "seq_idx": NUMBERS},
}


def tokens(rows: int = 1, length: int = T, seed: int = 1) -> Tensor:
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def documents(ids: Tensor) -> list[Tensor]:
    return list(ids.split(LENGTHS, 1))


def gradients(model) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def losses_apart(model, parts: list[Tensor]) -> Tensor:
    """The mean cross-entropy over the targets of documents that are run one by one."""
    terms = []
    for ids in parts:
        log_p = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        terms.append(-log_p.gather(2, ids[:, 1:, None]).flatten())
    return torch.cat(terms).mean()


# --- the same figures -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_packed_row_equals_its_documents_apart(family, way):
    model, ids = build(family).train(), tokens()
    expected = losses_apart(model, documents(ids))
    expected.backward()
    apart, alone = gradients(model), [model(d, output_hidden_states=True) for d in documents(ids)]
    out = model(ids, labels=ids, output_hidden_states=True, **WAYS[way])
    torch.testing.assert_close(out.logits, torch.cat([o.logits for o in alone], 1), **TIGHT)
    for found, layer in zip(out.hidden_states, zip(*(o.hidden_states for o in alone), strict=True), strict=True):
        torch.testing.assert_close(found, torch.cat(layer, 1), **TIGHT)
    torch.testing.assert_close(out.loss, expected, **TIGHT)
    out.loss.backward()
    assert_same(gradients(model), apart)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_targets_across_a_boundary_never_count_and_the_callers_divisor_does(family):
    model, ids = build(family), tokens()
    masked = ids.masked_fill(POSITIONS == 0, -100)
    loss = model(ids, labels=ids, position_ids=POSITIONS).loss
    torch.testing.assert_close(model(ids, labels=masked, position_ids=POSITIONS).loss, loss, rtol=0, atol=0)
    n = T - len(LENGTHS)
    torch.testing.assert_close(model(ids, labels=ids, position_ids=POSITIONS, num_items_in_batch=2 * n).loss, loss / 2)
    assert model(ids, labels=ids, position_ids=POSITIONS, logits_to_keep=3).logits.shape == (1, 3, 64)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_pads_at_either_side_and_between_documents_change_nothing(family):
    """Two rows with pads where collators, left padding and fixed lengths leave them, said by each kind of mark."""
    model = build(family)
    real = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]])
    number = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2]])
    place = torch.tensor([[9, 9, 0, 1, 2, 9, 0, 1, 2, 3, 0], [0, 1, 0, 1, 2, 3, 4, 0, 1, 0, 0]])
    ends = torch.tensor([0, 6, 11, 13, 18, 22])  # all rows one behind the other, pads included
    ids = tokens(2, 11)
    ways = [
        {"attention_mask": real, "position_ids": place},
        {"attention_mask": real.bool(), "seq_idx": number},
        {"attention_mask": real, "cu_seqlens": ends},
        {"attention_mask": real.double(), "cu_seq_lens_q": ends, "position_ids": place, "seq_idx": number},
        {"seq_idx": number.masked_fill(real == 0, -1)},
    ]
    for way in ways:
        logits = model(ids, **way).logits
        for row in range(2):
            for n in number[row].unique():
                columns = (number[row] == n) & (real[row] == 1)
                torch.testing.assert_close(logits[row, columns], model(ids[row, columns][None]).logits[0], **TIGHT)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_pads_that_a_collator_numbers_0_and_rows_by_length(family):
    """TRL's `pad_to_multiple_of` makes a document of each pad; `lengths` cuts the last row short; one row is all pads."""
    model, ids = build(family), tokens(1, T + 4)
    padded = torch.cat([POSITIONS, torch.zeros(1, 4, dtype=torch.long)], 1)
    expected = model(ids[:, :T], position_ids=POSITIONS).logits
    torch.testing.assert_close(model(ids, position_ids=padded).logits[:, :T], expected, **TIGHT)
    two = torch.cat([ids, ids.flip(1)])
    places = torch.cat([padded, torch.arange(T + 4)[None]])
    out = model(two, position_ids=places, lengths=torch.tensor([T, 0]), use_cache=True)
    torch.testing.assert_close(out.logits[:1, :T], expected, **TIGHT)
    assert bool(out.logits.isfinite().all()) and out.past_key_values.lengths.tolist() == [7, 0]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_embeddings_and_gradient_checkpointing(family):
    model, ids = build(family).train(), tokens()
    expected = model(ids, labels=ids, position_ids=POSITIONS).loss
    expected.backward()
    plain_gradients = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = model(inputs_embeds=model.model.embeddings(ids), labels=ids, position_ids=POSITIONS).loss
    torch.testing.assert_close(loss, expected, **TIGHT)
    loss.backward()
    assert_same(gradients(model), plain_gradients)


def test_bfloat16_is_that_of_documents_apart():
    for family in FAMILY_NAMES:
        model, ids = build(family, dtype=torch.bfloat16), tokens()
        apart = torch.cat([model(d).logits for d in documents(ids)], 1)
        torch.testing.assert_close(model(ids, cu_seqlens=BOUNDARIES).logits, apart, rtol=0.05, atol=0.05)


# --- states -----------------------------------------------------------------------------------------------------------
def prefixes(ids: Tensor, positions: Tensor) -> Iterator[Tensor]:
    for p in positions.tolist():
        first = int(BOUNDARIES[p >= BOUNDARIES].max()) if p >= 0 else 0
        yield ids[:, first : p + 1]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_snapshots_are_those_of_the_document_in_their_column(family):
    """Differentiable, known beforehand or taken when outputs are known."""
    model, ids, K = build(family), tokens(), 3
    positions = torch.tensor([-1, 0, 18, 19, 20, 36, 59, 63, 73])
    more, weight = tokens(len(positions), K, seed=2), torch.randn(len(positions), K, 64, dtype=torch.float64)
    for i, prefix in enumerate(prefixes(ids, positions)):
        again = model(torch.cat([prefix, more[i : i + 1]], 1), use_cache=False).logits[:, -K:]
        (again * weight[i]).sum().backward()
    expected = gradients(model)
    for later in (False, True):
        asked = {"output_states": True} if later else {"snapshot_positions": positions[None]}
        out = model(ids, position_ids=POSITIONS, use_cache=False, **asked)
        snapshots = out.states.at(positions[None]) if later else out.snapshots
        assert snapshots.lengths.tolist() == [p.shape[1] for p in prefixes(ids, positions)]
        (model(more, past_key_values=snapshots, use_cache=False).logits * weight).sum().backward()
        assert_same(gradients(model), expected)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_cache_holds_the_last_document_where_one_is_asked_for(family):
    model, ids, more = build(family), tokens(2), tokens(2, 3, seed=2)
    assert model(ids, seq_idx=NUMBERS).past_key_values is None
    given = FastWeightCache()
    out = model(ids, seq_idx=NUMBERS, past_key_values=given, use_cache=True)
    assert out.past_key_values is given and given.get_seq_length() == T and given.lengths.tolist() == [7, 7]
    expected = model(torch.cat([ids[:, -7:], more], 1)).logits[:, -3:]
    torch.testing.assert_close(model(more, past_key_values=given).logits, expected, **TIGHT)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_generate_continues_the_last_document_and_takes_no_marks_of_the_prompt_alone(family):
    model, ids = build(family), tokens()
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    alone = model.generate(ids[:, -7:], **options)[:, 7:]
    assert torch.equal(model.generate(ids, position_ids=POSITIONS, **options)[:, T:], alone)
    assert torch.equal(model.generate(ids, position_ids=POSITIONS, use_cache=False, **options)[:, T:], alone)
    with pytest.raises(RefineError, match=r"generate\(\) continues a row's last document and cannot take seq_idx"):
        model.generate(ids, seq_idx=NUMBERS, **options)


# --- positions that say nothing of documents -----------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_positions_of_single_documents_change_nothing(family):
    """As `generate`, left padding, decoding and trainers give them: none is mistaken for a boundary."""
    model, ids = build(family), tokens(2, 9)
    plain_logits = model(ids).logits
    for places in (torch.arange(9)[None], torch.arange(9).expand(2, 9)):
        out = model(ids, position_ids=places, max_length_q=9, cache_position=torch.arange(9))
        assert torch.equal(out.logits, plain_logits) and out.past_key_values is not None
    assert torch.equal(model(ids, cu_seqlens=torch.tensor([0, 9, 9, 18])).logits, plain_logits)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1, 1, 1, 1]])
    padded = model(ids, attention_mask=mask).logits
    count = mask.cumsum(1) - 1
    for places in (
        count.masked_fill(mask == 0, 0),
        count.masked_fill(mask == 0, 1),
        mask.cumsum(1) - mask,
        torch.arange(9)[None],
    ):
        assert torch.equal(model(ids, attention_mask=mask, position_ids=places).logits[mask == 1], padded[mask == 1])
    cache, last = model(ids[:, :8], attention_mask=mask[:, :8]).past_key_values, ids[:, 8:]
    for places in (count[:, 8:], torch.tensor([[8]])):  # real tokens so far, or columns
        after = model(last, attention_mask=mask, past_key_values=cache.copy(), position_ids=places)
        torch.testing.assert_close(after.logits[:, 0], padded[:, 8], **TIGHT)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_generate_with_left_pads_beams_and_chunks_of_the_prompt(family):
    model, ids = build(family), tokens(2, 9)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    for more in ({}, {"num_beams": 3, "num_return_sequences": 2}, {"prefill_chunk_size": 4}, {"use_cache": False}):
        rows = model.generate(ids, attention_mask=mask, **options, **more)[:, 9:]
        alone = [model.generate(ids[i : i + 1, 9 - n :], **options, **more)[:, n:] for i, n in ((0, 6), (1, 9))]
        assert torch.equal(rows, torch.cat(alone))


# --- what contradicts or means nothing is refused ---------------------------------------------------------------------
FIVE = torch.ones(1, 5, dtype=torch.long)
REFUSED = {
    "two that disagree": (
        {"cu_seqlens": torch.tensor([0, 2, 5]), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])},
        "cu_seqlens begins a document in row 0, column 2 and position_ids does not",
    ),
    "positions that run on": (
        {"seq_idx": torch.tensor([[0, 0, 1, 1, 1]]), "position_ids": torch.arange(5)[None]},
        "seq_idx begins a document in row 0, column 2 and position_ids does not",
    ),
    "keys and queries": (
        {"cu_seq_lens_q": torch.tensor([0, 2, 5]), "cu_seq_lens_k": torch.tensor([0, 3, 5])},
        "cu_seq_lens_q begins a document in row 0, column 2 and cu_seq_lens_k does not",
    ),
    "not from 0": ({"cu_seqlens": torch.tensor([1, 5])}, "cu_seqlens must start at 0, never fall and end at the 5 columns"),
    "not to the end": ({"cu_seqlens": torch.tensor([0, 4])}, r"end at the 5 columns of the input, got \[0, 4\]"),
    "falling": ({"cu_seqlens": torch.tensor([0, 4, 3, 5])}, "never fall"),
    "a row of boundaries": ({"cu_seqlens": torch.tensor([[0, 5]])}, r"must be \[documents \+ 1\] numbers"),
    "fractions": ({"cu_seqlens": torch.tensor([0.0, 5.0])}, "cu_seqlens must be whole numbers, got torch.float32"),
    "too short a maximum": ({"cu_seqlens": [0, 2, 5], "max_length_k": 2}, "max_length_k=2 is less than the longest document"),
    "a number again": ({"seq_idx": torch.tensor([[0, 1, 1, 0, 0]])}, "seq_idx comes back to a number in row 0, column 3"),
    "numbers of another width": ({"seq_idx": torch.tensor([[0, 1]])}, r"seq_idx must be \[B, T\] = \[1, 5\]"),
    "a gap": ({"position_ids": torch.tensor([[0, 1, 4, 5, 6]])}, "position_ids has 4 in row 0, column 2, expected 2, or 0"),
    "back to 2": ({"position_ids": torch.tensor([[0, 1, 2, 2, 3]])}, "position_ids has 2 in row 0, column 3, expected 3, or 0"),
    "not from the first token": ({"position_ids": 3 + torch.arange(5)[None]}, "position_ids has 3 in row 0, column 0, expected 0"),
    "three axes": ({"position_ids": torch.zeros(3, 1, 5, dtype=torch.long)}, r"position_ids must be \[B, T\]"),
    "documents in the mask": ({"attention_mask": torch.tensor([[1, 1, 2, 2, 2]])}, "pass the numbers as seq_idx"),
    "an added mask": ({"attention_mask": torch.tensor([[0.0, 0.0, 0.0, 0.0, -1e9]])}, "attention_mask must hold 1 for real tokens"),
    "a mask of other rows": ({"attention_mask": torch.ones(2, 5)}, r"attention_mask must be \[B, T\] = \[1, 5\]"),
    "columns that are not the next": ({"cache_position": torch.arange(1, 6)}, "cache_position must count the 5 columns"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_marks_that_contradict_or_mean_nothing_are_refused(case):
    keywords, message = REFUSED[case]
    with pytest.raises(RefineError, match=message) as error:
        build("delta_net")(FIVE, **keywords)
    assert "\n" not in str(error.value)


def test_documents_over_two_rows_and_behind_a_cache_are_refused():
    model, ids = build("delta_net"), tokens(2, 5)
    with pytest.raises(RefineError, match="goes over from one row of 5 columns to the next"):
        model(ids, cu_seqlens=torch.tensor([0, 4, 10]))
    cache = model(ids).past_key_values
    with pytest.raises(RefineError, match="seq_idx packs documents behind past_key_values"):
        model(ids, past_key_values=cache, seq_idx=torch.tensor([[0, 0, 0, 1, 1]]))
    with pytest.raises(RefineError, match="position_ids has 0 in row 0, column 0, expected 5"):
        model(ids, past_key_values=cache, position_ids=torch.arange(5)[None])


# --- documents of very different lengths ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "lengths", [[7000] + [12] * 100, [4096, 2048, 1024, 512, 256, 128], [5] * 40, [300, 290, 280, 3, 2, 1], [1]],
)  # fmt: skip
def test_documents_that_run_together_have_few_pads(lengths):
    begins = torch.zeros(sum(lengths), dtype=torch.bool)
    begins[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    documents = Documents.of(torch.ones(1, sum(lengths), dtype=torch.bool), begins)
    groups = documents.groups(together=False)
    assert sorted(torch.cat(groups).tolist()) == list(range(len(lengths)))
    assert sum(documents.columns_of(g).numel() for g in groups) <= 1.25 * sum(lengths)
    assert len(groups) <= 6 and len(documents.groups(together=True)) == 1


# --- models of transformers -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3_5", *(n for n in RECURRENT if n in ("bamba", "falcon_h1"))])
def test_models_of_transformers_keep_documents_apart_too(name):
    """Asked plainly, as by transformers' Trainer; and their trunk, as by TRL, which makes logits itself."""
    with float64_throughout():
        model, original, ids = stateful(name).train(), plain(name).train(), tokens()
        factor = model.model.head_factor
        for d in documents(ids):
            if d.shape[1] > 1:
                original(d, labels=d, num_items_in_batch=T - len(LENGTHS)).loss.backward()
        expected = gradients(original)
        hidden = torch.cat([original.model(d, use_cache=False).last_hidden_state for d in documents(ids)], 1) * factor
        for way in WAYS.values():
            out = model(ids, labels=ids, **way)
            torch.testing.assert_close(model.model(ids, use_cache=False, **way).last_hidden_state, hidden, **TIGHT)
            torch.testing.assert_close(out.last_hidden_state, hidden, **TIGHT)
        out.loss.backward()
        assert_same(gradients(model), expected)


def test_what_transformers_would_mix_is_refused_by_name():
    from transformers.cache_utils import DynamicCache

    model, ids = stateful("qwen3_5"), tokens()
    for called in (model, model.model):
        with pytest.raises(RefineError, match="packed documents would share the states of a DynamicCache"):
            called(ids, position_ids=POSITIONS, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(RefineError, match="packed documents would share the states"):
        model.generate(ids, position_ids=POSITIONS, max_new_tokens=2)
    with pytest.raises(RefineError, match="only when asked without states"):
        model(ids, position_ids=POSITIONS, output_hidden_states=True)
    with pytest.raises(RefineError, match="position_ids has 9 in row 0, column 2"):
        model(ids, position_ids=torch.cat([torch.arange(2), torch.arange(9, 9 + T - 2)])[None])
