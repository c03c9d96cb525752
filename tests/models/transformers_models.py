"""Tiny random models of transformers' own classes, and float64 that stays float64 in them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconH1Config,
    GraniteMoeHybridConfig,
    KimiLinearConfig,
    LlamaConfig,
    MistralConfig,
    NemotronHConfig,
    OlmoHybridConfig,
    PreTrainedConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

from refine_nsp.models import with_states
from refine_nsp.models.borrowed import check
from refine_nsp.models.borrowed.layer_cache import RECURRENT_KINDS, kinds_of

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
RECURRENT = [name for name in NAMES if name not in ("llama", "qwen3", "mistral")]


class Float64Stays(TorchFunctionMode):
    """Casts of float64 to float32 do nothing. transformers computes norms, decays and the delta rule in float32 whatever the weights
    are, which would hide an error of a state behind rounding; here the same code runs in float64 throughout."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        wide = any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in args[:1])
        if wide and func == torch.Tensor.float:
            return args[0]
        if wide:
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
            kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in kwargs.items()}
        return func(*args, **kwargs)


@contextmanager
def float64_throughout() -> Iterator[None]:
    """`Float64Stays`, also where the backward pass runs a forward pass again, which modes do not reach."""
    settings = inspect.unwrap(checkpoint).__kwdefaults__
    before = settings["context_fn"]
    settings["context_fn"] = lambda: (nullcontext(), Float64Stays())
    try:
        with Float64Stays():
            yield
    finally:
        settings["context_fn"] = before


def plain(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """transformers' model, in eval mode, every parameter moved off its initial value."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    config._attn_implementation = config._experts_implementation = "eager"  # the others have no float64
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def stateful(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """The same model, answering the calls of this package, with its states by reference."""
    model = plain(name, seed, dtype)
    skip_if_old(model)
    return with_states(model)


def skip_if_old(model: Any) -> None:
    """Skip the test where this transformers is too old for the model's states by reference."""
    if check.OLD and set(kinds_of(model.config)[0]) & set(RECURRENT_KINDS):
        pytest.skip(f"states of {type(model).__name__} by reference need transformers {check.EXACT_SINCE}")
