"""Tiny random models of transformers' own classes, and float64 that stays float64 in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconH1Config,
    FalconMambaConfig,
    Gemma3TextConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    KimiLinearConfig,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    NemotronHConfig,
    OlmoHybridConfig,
    PreTrainedConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    Zamba2Config,
)

from refine_nsp.models import with_states
from refine_nsp.models.borrowed import check
from refine_nsp.models.borrowed.layer_cache import RECURRENT_KINDS, kinds_of
from refine_nsp.models.checks.precision import Float64Stays, float64_throughout

__all__ = ["Float64Stays", "float64_throughout"]

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=3)
COMMON = SIZES | IDS
DELTA = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=2, mamba_d_state=8, mamba_chunk_size=16)
MIXED = dict(num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "linear_attention"])
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**COMMON, num_hidden_layers=2),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=8, num_hidden_layers=2),
    "mistral": lambda: MistralConfig(**COMMON, num_hidden_layers=2, sliding_window=12),
    "qwen3_next": lambda: Qwen3NextConfig(
        **COMMON, **DELTA, **MIXED, **EXPERTS, head_dim=8, num_experts=4, shared_expert_intermediate_size=16
    ),
    "qwen3_5": lambda: Qwen3_5TextConfig(**COMMON, **DELTA, **MIXED, head_dim=8),
    "olmo_hybrid": lambda: OlmoHybridConfig(**COMMON, **DELTA, **MIXED),
    "kimi_linear": lambda: KimiLinearConfig(
        **COMMON | {"num_key_value_heads": 4}, **MIXED, **EXPERTS, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, num_local_experts=4, linear_head_dim=8, linear_num_heads=2,
    ),
    "bamba": lambda: BambaConfig(**COMMON, **MAMBA, num_hidden_layers=3, attn_layer_indices=[1]),
    "falcon_h1": lambda: FalconH1Config(
        **COMMON, **MAMBA, head_dim=8, mamba_d_ssm=64, num_hidden_layers=2, lm_head_multiplier=0.5, key_multiplier=0.7
    ),
    "granite_4": lambda: GraniteMoeHybridConfig(
        **COMMON, **MAMBA, **MIXED, num_local_experts=4, shared_intermediate_size=24, logits_scaling=3.0
    ),
    "nemotron_h": lambda: NemotronHConfig(
        **COMMON, head_dim=8, mamba_num_heads=4, mamba_head_dim=16, n_groups=2, ssm_state_size=8, chunk_size=16,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"], moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16, n_routed_experts=4,
    ),
}  # fmt: skip
NAMES = list(CONFIGS)
# Models that `refine_nsp.models.checks` is tried on too; their states are not handed over by reference, or nobody tested that.
OTHERS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma3": lambda: Gemma3TextConfig(
        **COMMON, head_dim=8, num_hidden_layers=3, sliding_window=12, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "jamba": lambda: JambaConfig(
        **COMMON, num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=4, mamba_dt_rank=4
    ),
    "zamba2": lambda: Zamba2Config(
        **COMMON | {"num_key_value_heads": 4}, num_hidden_layers=4, mamba_d_state=8, mamba_ngroups=1, n_mamba_heads=4, chunk_size=16,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"], adapter_rank=4, num_mem_blocks=1,
        use_shared_attention_adapter=False,
    ),
    "lfm2": lambda: Lfm2Config(
        **COMMON, num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False
    ),
    "mamba": lambda: MambaConfig(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2, time_step_rank=4, **IDS),
    "mamba2": lambda: Mamba2Config(
        vocab_size=64, hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=2, chunk_size=16, num_hidden_layers=2, **IDS
    ),
    "falcon_mamba": lambda: FalconMambaConfig(
        vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2, time_step_rank=4, **IDS
    ),
    "recurrent_gemma": lambda: RecurrentGemmaConfig(
        **COMMON, num_hidden_layers=3, lru_width=32, head_dim=8, attention_window_size=12
    ),
}  # fmt: skip
RECURRENT = [name for name in NAMES if name not in ("llama", "qwen3", "mistral")]


def plain(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """transformers' model, in eval mode, every parameter moved off its initial value."""
    torch.manual_seed(seed)
    config = (CONFIGS | OTHERS)[name]()
    config._attn_implementation = config._experts_implementation = "eager"  # the others have no float64
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


CHECKED: set[tuple[str, int, torch.dtype]] = set()


def stateful(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """The same model, answering the calls of this package, with its states by reference, which are checked the first time alone."""
    model = plain(name, seed, dtype)
    skip_if_old(model)
    first = (name, seed, dtype) not in CHECKED
    CHECKED.add((name, seed, dtype))
    return with_states(model, check_states=first)


def skip_if_old(model: Any) -> None:
    """Skip the test where this transformers is too old for the model's states by reference."""
    if check.OLD and set(kinds_of(model.config)[0]) & set(RECURRENT_KINDS):
        pytest.skip(f"states of {type(model).__name__} by reference need transformers {check.EXACT_SINCE}")
