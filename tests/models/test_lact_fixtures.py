"""LaCT against numbers computed by its original classes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from refine_nsp.models import LaCTConfig, LaCTForCausalLM
from refine_nsp.ops.lact import Tokens, lact, naive_lact
from refine_nsp.ops.lact_update import Pair, Triple, UpdateRule, initial_state, read, row_norms, update
from tests.models.families import LACT


def load_case(shared, name: str, **fields):
    folder = shared / "fixtures" / "lact" / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **fields).eval()
    return model, load_file(folder / "io.safetensors"), json.loads((folder / "reference.json").read_text())


def close(actual, expected, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("L", [20, 128, 150])
def test_momentum_low_rank(shared, L):
    model, io, info = load_case(shared, "a_momentum_lowrank")
    assert {name: list(p.shape) for name, p in model.named_parameters()} == info["parameters"]
    ids = io[f"input_ids_{L}"]
    model.train()
    out = model(ids, labels=ids, output_hidden_states=True)
    close(out.logits, io[f"logits_{L}"], 1e-4)
    close(out.last_hidden_state, io[f"hidden_{L}"], 1e-4)
    close(out.loss, io[f"loss_{L}"], 1e-5)
    if L == 150:
        close(out.hidden_states[0], io["block_input_0_150"], 1e-4)
        close(out.hidden_states[1], io["block_input_1_150"], 1e-4)
    out.loss.backward()
    for name, norm in info["lengths"][str(L)]["grad_norm"].items() if "lengths" in info else info[str(L)]["grad_norm"].items():
        grad = model.get_parameter(name).grad
        if norm is None:
            assert grad is None or float(grad.norm()) == 0.0, name
        else:
            assert float(grad.norm()) == pytest.approx(norm, rel=1e-3), name


@pytest.mark.parametrize("L", [20, 128, 150])
def test_muon_in_both_precisions(shared, L):
    exact, io, _ = load_case(shared, "b_muon_momentum_lowrank", muon_dtype="float32")
    official, _, _ = load_case(shared, "b_muon_momentum_lowrank")
    ids = io[f"input_ids_{L}"]
    with torch.no_grad():
        close(exact(ids).logits, io[f"logits_muon_float32_{L}"], 1e-3)
        logits = official(ids).logits
    error = (logits - io[f"logits_{L}"]).abs()
    assert error.mean() < 0.02 and error.max() < 0.5
    if L > 32:
        assert error.mean() < 0.5 * (logits - io[f"logits_muon_float32_{L}"]).abs().mean()


@pytest.mark.parametrize("case", ["plain", "momentum", "muon", "muon_momentum", "muon_float32", "muon_momentum_float32"])
@pytest.mark.parametrize("L", [20, 128, 150])
def test_update_op(shared, case, L):
    x = load_file(shared / "fixtures" / "lact" / "ops" / "ops.safetensors")
    weights = Triple(*(x[f"{n}_{L}"][:, None] for n in ("w0", "w1", "w2")))  # one head
    q, k, v, momentum = (x[f"{n}_{L}"][:, None] for n in ("q", "k", "v", "momentum"))
    lr = torch.cat([x[f"lr{i}_{L}"] for i in range(3)], -1)[:, None]
    tokens = Tokens(k, v, lr, momentum if "momentum" in case else None)
    muon = None if "muon" not in case else torch.float32 if "float32" in case else torch.bfloat16
    for op in (naive_lact, lact):
        o, _ = op(q, tokens, weights, UpdateRule("momentum" in case, muon, False), 32)
        error = (o[:, 0] - x[f"postnorm_{case}_{L}"]).abs()
        if muon is None:
            assert error.max() < 1e-6
        elif muon == torch.float32:
            assert error.max() < 5e-5
        else:
            assert error.mean() < 1e-3


def test_update_gradients_are_those_of_the_loss_it_descends():
    """gradient_terms is minus the derivative of -<f(k), v> with respect to each weight, scaled by the learning rate."""
    torch.manual_seed(0)
    d, dh, C = 5, 7, 6
    weights = Pair(*(torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2 * dh, d), (d, dh))))
    k, v = torch.randn(C, d, dtype=torch.float64), torch.randn(C, d, dtype=torch.float64)
    lr = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64).expand(C, 3)
    grads = torch.autograd.grad((read(weights, k) * v).sum(), weights)
    rule = UpdateRule(False, None, True)
    moved = update(initial_state(weights, rule), row_norms(weights), k, v, lr, None, rule).main
    for w, m, g, s in zip(*(Pair(*p).parts() for p in (weights, moved, grads)), (0.3, 0.5, 0.7), strict=True):
        torch.testing.assert_close(m - w, s * g)


def test_published_760m_on_the_meta_device():
    config = LaCTConfig(
        hidden_size=1536, num_attn_heads=24, num_hidden_layers=24, num_lact_heads=4, w0_w2_low_rank=32, rope_theta=1e6,
        max_position_embeddings=32768, initializer_range=0.02,
    )  # fmt: skip
    with torch.device("meta"):
        model = LaCTForCausalLM(config)
    layer = {
        "attn_norm.weight": (1536,), "mlp_norm.weight": (1536,), "attn.qkv.weight": (4608, 1536),
        "attn.o_proj.weight": (1536, 1536), "attn.w0.w_left": (4, 384, 32), "attn.w0.w_right": (4, 32, 384),
        "attn.w2.w_left": (4, 384, 32), "attn.w2.w_right": (4, 32, 384), "attn.w1": (4, 384, 384),
        "attn.lr_proj.weight": (12, 1536), "attn.lr_proj.bias": (12,), "attn.qk_scale": (1536, 2),
        "attn.qk_offset": (1536, 2), "attn.ttt_scale_proj.weight": (4, 1536), "attn.ttt_scale_proj.bias": (4,),
        "attn.ttt_norm.weight": (384,), "attn.momentum_proj.0.weight": (4, 1536), "attn.momentum_proj.0.bias": (4,),
        "mlp.gate_proj.weight": (4096, 1536), "mlp.up_proj.weight": (4096, 1536), "mlp.down_proj.weight": (1536, 4096),
    }  # fmt: skip
    expected = {f"model.layers.{i}.{name}": shape for i in range(24) for name, shape in layer.items()}
    expected |= {"model.embeddings.weight": (32000, 1536), "model.norm.weight": (1536,), "lm_head.weight": (32000, 1536)}
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == expected
    assert sum(p.numel() for p in model.parameters()) == 797_625_312


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"ttt_loss_type": "l2"}, "ttt_loss_type"),
        ({"lr_parameterization": "exp"}, "lr_parameterization"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"lr_dim": 3}, "lr_dim"),
        ({"window_size": None}, "window_size"),
        ({"lact_chunk_size": 0}, "lact_chunk_size"),
        ({"num_lact_heads": 3}, "num_lact_heads"),
    ],
)
def test_an_unsupported_field_is_refused_by_name(fields, name):
    with pytest.raises(ValueError, match=name):
        LaCTConfig(**{**LACT, **fields})
