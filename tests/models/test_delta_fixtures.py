"""DeltaNet and Gated DeltaNet against numbers computed by flash-linear-attention's own classes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import refine_nsp.models as models
from refine_nsp.models import DeltaNetConfig, GatedDeltaNetConfig
from tests.models.families import DELTA_NET, GATED

LOGITS = dict(rtol=1e-4, atol=5e-5)
STATES = dict(rtol=1e-4, atol=2e-6)


@pytest.fixture(params=["delta_net", "gated_deltanet"])
def case(request, shared):
    folder = shared / "fixtures" / "fla" / request.param
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference = load_file(folder / "reference.safetensors")
    return model, reference, json.loads((folder / "reference.json").read_text())


def assert_cache(cache, reference: dict, prefix: str, transposed: bool, rows=slice(None)) -> None:
    for i, layer in enumerate(cache.layers):
        expected = reference[f"{prefix}.cache.{i}.recurrent_state"]
        state = layer["recurrent"].transpose(-1, -2) if transposed else layer["recurrent"]
        torch.testing.assert_close(state[rows], expected[rows], **STATES)
        for name in "qkv":
            conv = reference[f"{prefix}.cache.{i}.conv_state.{name}"][:, :, 1:].transpose(1, 2)  # we keep W - 1 inputs
            torch.testing.assert_close(layer[f"conv_{name}"][rows], conv[rows], **LOGITS)


@torch.no_grad()
def test_forward_prefill_decode_and_states(case):
    model, ref, info = case
    transposed = info["case"] == "gated_deltanet"
    ids = ref["input_ids"]
    out = model(ids, use_cache=False, output_hidden_states=True)
    torch.testing.assert_close(out.logits, ref["logits"], **LOGITS)
    for i, hidden in enumerate(out.hidden_states):
        torch.testing.assert_close(hidden, ref[f"hidden_states.{i}"], **LOGITS)
    torch.testing.assert_close(model(ref["short.input_ids"]).logits, ref["short.logits"], **LOGITS)
    prefill = model(ids[:, :75])
    torch.testing.assert_close(prefill.logits, ref["prefill.logits"], **LOGITS)
    cache = prefill.past_key_values
    assert_cache(cache, ref, "prefill", transposed)
    decoded = torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(75, 150)], 1)
    torch.testing.assert_close(decoded, ref["decode.logits"], **LOGITS)
    assert_cache(cache, ref, "decode", transposed)


@torch.no_grad()
def test_padding(case):
    model, ref, info = case
    transposed = info["case"] == "gated_deltanet"
    ids, mask = ref["left_pad.input_ids"], ref["left_pad.attention_mask"]
    out = model(ids[:, :150], attention_mask=mask[:, :150])
    real = mask[:, :150].bool()
    torch.testing.assert_close(out.logits[real], ref["left_pad.logits"][real], **LOGITS)
    cache = out.past_key_values
    assert_cache(cache, ref, "left_pad", transposed)
    for j, t in enumerate(range(150, 156)):
        step = model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits
        torch.testing.assert_close(step[:, 0], ref["left_pad.decode.logits"][:, j], **LOGITS)
    ids, mask = ref["right_pad.input_ids"], ref["right_pad.attention_mask"]
    out = model(ids, attention_mask=mask)
    torch.testing.assert_close(out.logits[mask.bool()], ref["right_pad.logits"][mask.bool()], **LOGITS)
    assert_cache(out.past_key_values, ref, "right_pad", transposed)


def test_loss_and_gradients(case):
    model, ref, info = case
    model.train()
    loss = model(ref["input_ids"], labels=ref["input_ids"]).loss
    torch.testing.assert_close(loss, ref["loss"], rtol=1e-4, atol=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        norm = torch.tensor(info["grad_norms"][name])
        torch.testing.assert_close(parameter.grad.norm(), norm, rtol=2e-3, atol=1e-5, check_dtype=False)
        if f"grad.{name}" in ref:
            torch.testing.assert_close(parameter.grad, ref[f"grad.{name}"], rtol=2e-3, atol=1e-5)


def test_state_dict_names_and_shapes(case):
    model, _, info = case
    assert {name: list(p.shape) for name, p in model.state_dict().items()} == info["state_dict"]


def test_published_delta_net_1_3b_on_the_meta_device():
    config = DeltaNetConfig(hidden_size=2048, num_hidden_layers=24, num_heads=16, vocab_size=32000)
    with torch.device("meta"):
        model = models.DeltaNetForCausalLM(config)
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    layer = {
        "attn_norm.weight": (2048,), "attn.q_proj.weight": (2048, 2048), "attn.k_proj.weight": (2048, 2048),
        "attn.v_proj.weight": (2048, 2048), "attn.b_proj.weight": (16, 2048), "attn.q_conv1d.weight": (2048, 1, 4),
        "attn.k_conv1d.weight": (2048, 1, 4), "attn.v_conv1d.weight": (2048, 1, 4), "attn.o_norm.weight": (128,),
        "attn.o_proj.weight": (2048, 2048), "mlp_norm.weight": (2048,), "mlp.gate_proj.weight": (5632, 2048),
        "mlp.up_proj.weight": (5632, 2048), "mlp.down_proj.weight": (2048, 5632),
    }  # fmt: skip
    expected = {f"model.layers.{i}.{name}": shape for i in range(24) for name, shape in layer.items()}
    expected |= {
        "model.embeddings.weight": (32000, 2048),
        "model.norm.weight": (2048,),
        "lm_head.weight": (32000, 2048),
    }
    assert shapes == expected
    assert len(shapes) == 339 and sum(p.numel() for p in model.parameters()) == 1_365_677_056


@pytest.mark.parametrize(
    ("config_class", "fields", "name"),
    [
        (DeltaNetConfig, {"attn": {"layers": [0], "num_heads": 2}}, "attn="),
        (DeltaNetConfig, {"attnres_block_size": 2}, "attnres_block_size"),
        (DeltaNetConfig, {"use_l2warp": True}, "use_l2warp"),
        (DeltaNetConfig, {"hidden_act": "gelu"}, "hidden_act"),
        (DeltaNetConfig, {"qk_norm": "layer"}, "qk_norm"),
        (DeltaNetConfig, {"qk_activation": "tanh"}, "qk_activation"),
        (DeltaNetConfig, {"num_heads": 3}, "num_heads"),
        (GatedDeltaNetConfig, {"num_v_heads": 3}, "num_v_heads"),
        (GatedDeltaNetConfig, {"expand_v": 0.7}, "expand_v"),
        (GatedDeltaNetConfig, {"output_gate_activation": "sigmoid"}, "output_gate_activation"),
    ],
)
def test_an_unsupported_field_is_refused_by_name(config_class, fields, name):
    base = DELTA_NET if config_class is DeltaNetConfig else GATED
    with pytest.raises(ValueError, match=name):
        config_class(**{**base, **fields})
