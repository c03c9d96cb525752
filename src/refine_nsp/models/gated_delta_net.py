"""Gated DeltaNet (Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464) adds a decay of the whole memory per token to the delta rule.

Per value head, with S in [Dk, Dv]: S <- exp(g) S, then S <- S + k (beta (v - S'k))', o = S'q / sqrt(Dk), with
g = -exp(A_log) * softplus(a + dt_bias). Parameter names and config fields are those of flash-linear-attention's
`gated_deltanet`, so its checkpoints load unchanged.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from refine_nsp.errors import RefineError
from refine_nsp.models.blocks import (
    SUPPORTED_ACTIVATIONS,
    FamilyConfig,
    FastWeightForCausalLM,
    FastWeightModel,
    RMSNorm,
    refuse_unsupported,
)
from refine_nsp.models.delta_mixer import DeltaTrace, GatedRMSNorm, ShortConv, conv_trace, delta_rule_exception, real_token_mask
from refine_nsp.models.state import LayerState, rows_of_their_own
from refine_nsp.ops.delta_rule import delta_rule
from refine_nsp.ops.norm import l2_norm


class GatedDeltaNetConfig(FamilyConfig):
    """Configures Gated DeltaNet, with the fields and defaults of flash-linear-attention's `gated_deltanet`.

    `attn_mode`, `fuse_*` and `max_position_embeddings` do not change what is computed (as there). `attn` (softmax-attention
    layers), `attnres_block_size`, `use_l2warp` and another `output_gate_activation` than swish are refused.
    """

    model_type = "gated_deltanet"
    keys_to_ignore_at_inference = ["past_key_values", "last_hidden_state"]

    attn_mode: str = "chunk"
    hidden_size: int = 2048
    expand_v: float = 2.0
    use_gate: bool = True
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    conv_size: int = 4
    head_dim: int = 256
    num_heads: int = 6
    num_v_heads: int | None = None
    output_gate_activation: str = "swish"
    max_position_embeddings: int = 2048
    hidden_ratio: float | None = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    num_hidden_layers: int = 21
    norm_eps: float = 1e-6
    attn: dict | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    fuse_norm: bool = True
    fuse_swiglu: bool = True
    fuse_cross_entropy: bool = True
    fuse_linear_cross_entropy: bool = False
    use_l2warp: bool = False
    vocab_size: int = 32000
    attnres_block_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        refuse_unsupported(
            self,
            {
                "attn": (None,),
                "attnres_block_size": (None,),
                "use_l2warp": (False,),
                "hidden_act": SUPPORTED_ACTIVATIONS,
                "output_gate_activation": SUPPORTED_ACTIVATIONS,
            },
        )
        if self.value_heads % self.num_heads:
            raise RefineError(
                f"GatedDeltaNetConfig: num_v_heads = {self.value_heads} must be a multiple of num_heads = {self.num_heads}"
            )
        if not math.isclose(self.head_dim * self.expand_v, self.head_v_dim, rel_tol=1e-5):
            raise RefineError(
                f"GatedDeltaNetConfig: head_dim * expand_v = {self.head_dim * self.expand_v} must be a whole number"
            )

    @property
    def value_heads(self) -> int:
        return self.num_heads if self.num_v_heads is None else self.num_v_heads

    @property
    def head_v_dim(self) -> int:
        return int(self.head_dim * self.expand_v)


class GatedDeltaNetMixer(nn.Module):
    """Applies the gated delta rule: turns x [B, T, D] into y [B, T, D] and a trace.

    Its states are `recurrent` [R, HV, Dk, Dv] and `conv_*` [R, W-1, D'].
    """

    fast_weight_names: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "b_proj", "a_proj", "q_conv1d", "k_conv1d", "v_conv1d", "A_log", "dt_bias",
    )  # fmt: skip
    memory_names: tuple[str, ...] = ()
    shares_states = False

    def __init__(self, config: GatedDeltaNetConfig) -> None:
        super().__init__()
        self.config = config
        key_width = config.num_heads * config.head_dim
        value_width = config.value_heads * config.head_v_dim
        self.q_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, value_width, bias=False)
        self.a_proj = nn.Linear(config.hidden_size, config.value_heads, bias=False)
        self.b_proj = nn.Linear(config.hidden_size, config.value_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(config.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(config.value_heads))
        if config.use_short_conv:
            self.q_conv1d = ShortConv(key_width, config.conv_size, "silu")
            self.k_conv1d = ShortConv(key_width, config.conv_size, "silu")
            self.v_conv1d = ShortConv(value_width, config.conv_size, "silu")
        if config.use_gate:
            self.g_proj = nn.Linear(config.hidden_size, value_width, bias=False)
            self.o_norm: nn.Module = GatedRMSNorm(config.head_v_dim, config.norm_eps)
        else:
            self.o_norm = RMSNorm(config.head_v_dim, config.norm_eps)
        self.o_proj = nn.Linear(value_width, config.hidden_size, bias=False)
        self.init_weights_()

    def init_weights_(self) -> None:
        """Draw A uniform in (0, 16) and dt log-uniform in (0.001, 0.1), as in the original."""
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(1e-3, 16).log_())
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp_().clamp_(min=1e-4)
        init.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))

    @property
    def without_kernels(self) -> str | None:
        return delta_rule_exception(self.config.head_dim, gated=True)

    def forward(
        self, x: Tensor, lengths: Tensor | None, state: LayerState | None, offsets: Tensor, branches: int | None = None
    ) -> tuple[Tensor, DeltaTrace]:
        if branches is not None and state is not None:
            state, _ = rows_of_their_own(state, offsets, branches)
        c = self.config
        inputs = {"q": self.q_proj(x), "k": self.k_proj(x), "v": self.v_proj(x)}
        q, k, v = (self._convolve(name, z, state) for name, z in inputs.items())
        q, k = (l2_norm(z.unflatten(-1, (c.num_heads, c.head_dim))) for z in (q, k))
        v = v.unflatten(-1, (c.value_heads, c.head_v_dim))
        beta, g = self._gates(x, lengths)
        o, states = delta_rule(q, k, v, beta, g, None if state is None else state["recurrent"], lengths=lengths)
        if c.use_gate:
            o = self.o_norm(o, self.g_proj(x).unflatten(-1, (c.value_heads, c.head_v_dim)))
        else:
            o = self.o_norm(o)
        convolved = inputs if c.use_short_conv else {}
        return self.o_proj(o.flatten(-2).to(x.dtype)), DeltaTrace(states, conv_trace(convolved, state, c.conv_size))

    def _convolve(self, name: str, z: Tensor, state: LayerState | None) -> Tensor:
        if not self.config.use_short_conv:
            return F.silu(z)
        conv = {"q": self.q_conv1d, "k": self.k_conv1d, "v": self.v_conv1d}[name]
        return conv(z, None if state is None else state.get(f"conv_{name}"))

    def _gates(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute beta and log decay, both [B, T, HV] in float32 or better, and 0 at pads, which neither write nor decay."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        beta = self.b_proj(x).to(dtype).sigmoid()
        if self.config.allow_neg_eigval:
            beta = beta * 2.0
        g = -self.A_log.to(dtype).exp() * F.softplus(self.a_proj(x).to(dtype) + self.dt_bias.to(dtype))
        mask = real_token_mask(lengths, x.shape[1], x.device)
        return (beta, g) if mask is None else (beta * mask, g.masked_fill(~mask, 0.0))


class GatedDeltaNetModel(FastWeightModel):
    config_class = GatedDeltaNetConfig
    mixer_class = GatedDeltaNetMixer


class GatedDeltaNetForCausalLM(FastWeightForCausalLM):
    config_class = GatedDeltaNetConfig
    trunk_class = GatedDeltaNetModel


__all__ = ["GatedDeltaNetConfig", "GatedDeltaNetForCausalLM", "GatedDeltaNetModel"]
