"""Tiny models of every family and of every config field that changes what is computed."""

import torch

from refine_nsp.models import (
    DeltaNetConfig,
    DeltaNetForCausalLM,
    GatedDeltaNetConfig,
    GatedDeltaNetForCausalLM,
    LaCTConfig,
    LaCTForCausalLM,
)

DELTA_NET = dict(hidden_size=32, num_heads=2, num_hidden_layers=2, vocab_size=64, intermediate_size=48)
GATED = dict(hidden_size=32, num_heads=2, head_dim=12, num_hidden_layers=2, vocab_size=64, intermediate_size=48)
LACT = dict(
    hidden_size=32, num_attn_heads=4, num_lact_heads=2, num_hidden_layers=2, vocab_size=64, intermediate_size=48,
    lact_chunk_size=16, window_size=12, w0_w2_low_rank=4, initializer_range=0.1,
)  # fmt: skip

DELTA_NET_VARIANTS = {
    "default": {},
    "relu": {"qk_activation": "relu"},
    "elu_sum": {"qk_activation": "elu", "qk_norm": "sum"},
    "identity": {"qk_activation": "identity"},
    "gate": {"use_gate": True},
    "neg_eigval": {"allow_neg_eigval": True},
    "no_conv": {"use_short_conv": False},
    "no_conv_relu": {"use_short_conv": False, "qk_activation": "relu"},
    "no_beta": {"use_beta": False},
    "tied": {"tie_word_embeddings": True},
    "expand": {"expand_k": 0.5, "expand_v": 2.0},
    "conv_2": {"conv_size": 2},
}
GATED_VARIANTS = {
    "default": {},
    "grouped": {"num_v_heads": 4},
    "no_gate": {"use_gate": False},
    "no_conv": {"use_short_conv": False},
    "neg_eigval": {"allow_neg_eigval": True},
    "tied": {"tie_word_embeddings": True},
    "expand_1": {"expand_v": 1.0},
}

LACT_VARIANTS = {
    "default": {},
    "full_rank": {"w0_w2_low_rank": -1},
    "no_momentum": {"use_momentum": False},
    "muon": {"use_muon": True, "muon_dtype": "float32"},
    "prenorm": {"ttt_prenorm": True},
    "prenorm_muon": {"ttt_prenorm": True, "use_muon": True, "muon_dtype": "float32", "use_momentum": False},
    "nope": {"ttt_nope": True},
    "qk_norm_bias": {"attn_qk_norm": True, "qkv_bias": True},
    "inter_multi": {"inter_multi": 1.5, "use_muon": True, "muon_dtype": "float32"},
    "no_scale": {"learnable_ttt_scale": False},
    "no_silu": {"qkv_silu": False},
    "no_v_silu": {"no_v_silu": True},
    "chunk_1": {"lact_chunk_size": 1, "window_size": 1},
    "long_window": {"lact_chunk_size": 24, "window_size": 200},
    "long_chunk": {"lact_chunk_size": 400},
    "lr_dim": {"lr_dim": 16},
    "heads": {"num_attn_heads": 2, "num_lact_heads": 4},
    "tied": {"tie_word_embeddings": True},
}


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float64, **fields: object):
    """A tiny model in eval mode, every parameter moved off its initial value so that nothing is trivially 0 or 1."""
    config_class, model_class, base = {
        "delta_net": (DeltaNetConfig, DeltaNetForCausalLM, DELTA_NET),
        "gated_deltanet": (GatedDeltaNetConfig, GatedDeltaNetForCausalLM, GATED),
        "lact_swiglu": (LaCTConfig, LaCTForCausalLM, LACT),
    }[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**base, **fields})).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for name, parameter in model.named_parameters():
            if name.endswith("lr_proj.bias"):
                parameter.fill_(4.0)  # learning rates near 0.05, so that LaCT's updates matter
    return model


ALL_VARIANTS = [("delta_net", name, fields) for name, fields in DELTA_NET_VARIANTS.items()]
ALL_VARIANTS += [("gated_deltanet", name, fields) for name, fields in GATED_VARIANTS.items()]
ALL_VARIANTS += [("lact_swiglu", name, fields) for name, fields in LACT_VARIANTS.items()]
VARIANT_IDS = [f"{family}-{name}" for family, name, _ in ALL_VARIANTS]
FAMILY_NAMES = ["delta_net", "gated_deltanet", "lact_swiglu"]
