"""Keywords of forward: what libraries pass and asks for nothing is taken, everything else is refused by name."""

import inspect

import pytest
import torch

from refine_nsp.errors import RefineError
from tests.models.families import FAMILY_NAMES, build
from tests.models.transformers_models import stateful

IDS = torch.tensor([[5, 6, 7]])
NOTHING = {
    "return_dict": True, "output_attentions": False, "output_router_logits": None, "is_causal": True, "pixel_values": None,
    "token_type_ids": torch.zeros_like(IDS), "cache_position": torch.arange(3), "num_items_in_batch": None,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_keywords_that_ask_for_nothing_change_nothing(family):
    model = build(family)
    assert torch.equal(model(IDS, **NOTHING).logits, model(IDS).logits)
    assert torch.equal(model.model(IDS, **NOTHING).last_hidden_state, model.model(IDS).last_hidden_state)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("attention_maks", "attention_mask"), ("atention_mask", "attention_mask"), ("snapshot_position", "snapshot_positions"),
        ("position_id", "position_ids"), ("lables", "labels"), ("cu_seq_len_q", "cu_seq_lens_q"), ("cu_seqlen", "cu_seqlens"),
        ("use_caches", "use_cache"), ("logit_to_keep", "logits_to_keep"),
    ],
)  # fmt: skip
def test_a_misspelt_keyword_is_refused_with_the_nearest_name(name, nearest):
    with pytest.raises(RefineError, match=f"forward has no argument '{name}' \\(did you mean '{nearest}'\\?\\)"):
        build("delta_net")(IDS, **{name: torch.ones_like(IDS)})


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"something": 1}, "forward has no argument 'something'; it takes input_ids, attention_mask"),
        ({"fused_lm_head": True}, "forward has no argument 'fused_lm_head'"),
        ({"output_attentions": True}, "forward cannot serve output_attentions True: fast weights have no attention maps"),
        ({"output_router_logits": True}, "forward cannot serve output_router_logits True"),
        ({"is_causal": False}, "forward cannot serve is_causal False"),
        ({"token_type_ids": torch.tensor([[0, 1, 1]])}, r"forward cannot serve token_type_ids with the shape \(1, 3\)"),
    ],
)
def test_what_cannot_be_served_is_refused_by_head_and_trunk(keywords, message):
    model = build("delta_net")
    for called in (model, model.model):
        with pytest.raises(RefineError, match=message) as error:
            called(IDS, **keywords)
        assert "\n" not in str(error.value)


def test_a_tuple_where_one_is_asked_for():
    model = build("gated_deltanet")
    loss, logits, *_ = model(IDS, labels=IDS, return_dict=False)
    whole = model(IDS, labels=IDS)
    assert torch.equal(loss, whole.loss) and torch.equal(logits, whole.logits)
    assert torch.equal(model.model(IDS, return_dict=False)[0], whole.last_hidden_state)
    model.config.return_dict = False
    assert torch.equal(model(IDS)[0], whole.logits)


def test_trainers_find_packed_columns_and_loss_keywords_in_the_signature():
    """transformers' Trainer drops columns that forward does not name, and counts targets where it takes any keyword."""
    for model in (build("lact_swiglu"), stateful("qwen3_5", dtype=torch.float32)):
        parameters = inspect.signature(model.forward).parameters
        packed = {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cu_seqlens", "seq_idx"}
        assert packed | {"input_ids", "attention_mask", "labels"} <= parameters.keys()
        assert any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def test_models_of_transformers_refuse_slips_of_the_pen_and_pass_on_the_rest():
    model = stateful("qwen3_5", dtype=torch.float32)
    for name in ("atention_mask", "snapshot_position", "cu_seq_lens_qs"):
        with pytest.raises(RefineError, match=f"forward has no argument '{name}' \\(did you mean"):
            model(IDS, **{name: torch.ones_like(IDS)})
    with pytest.raises(RefineError, match="forward has no argument 'something'"):
        model(IDS, lengths=torch.tensor([3]), something=1)
    targets = torch.tensor([[6, 7, -100]])
    by_shifted, by_labels = model(IDS, labels=IDS, shift_labels=targets).loss, model(IDS, labels=IDS).loss
    torch.testing.assert_close(by_shifted, by_labels)  # what transformers' losses take stays theirs
    assert torch.equal(model(IDS, None, torch.arange(3)[None]).logits, model(IDS).logits)  # by place, as transformers' code calls
