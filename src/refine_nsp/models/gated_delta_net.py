"""Gated DeltaNet (Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464) adds a decay of the whole memory per token to the delta rule.

Per value head, with S in [Dk, Dv]: S <- exp(g) S, then S <- S + k (beta (v - S'k))', o = S'q / sqrt(Dk), with
g = -exp(A_log) * softplus(a + dt_bias).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from refine_nsp.errors import RefineError
from refine_nsp.models.blocks import SUPPORTED_ACTIVATIONS, FastWeightForCausalLM, FastWeightModel
from refine_nsp.models.delta_mixer import DeltaRuleConfig, DeltaRuleMixer


class GatedDeltaNetConfig(DeltaRuleConfig):
    """Configures Gated DeltaNet, with the fields and defaults of flash-linear-attention's `gated_deltanet`; its gate is swish."""

    model_type = "gated_deltanet"

    expand_v: float = 2.0
    use_gate: bool = True
    head_dim: int = 256
    num_heads: int = 6
    num_v_heads: int | None = None
    output_gate_activation: str = "swish"
    num_hidden_layers: int = 21

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.refuse_unsupported(output_gate_activation=SUPPORTED_ACTIVATIONS)
        if self.value_heads % self.num_heads:
            raise RefineError(
                f"GatedDeltaNetConfig: num_v_heads={self.value_heads} must be a multiple of num_heads={self.num_heads}"
            )
        if not math.isclose(self.head_dim * self.expand_v, self.head_v_dim, rel_tol=1e-5):
            width = self.head_dim * self.expand_v
            raise RefineError(f"GatedDeltaNetConfig: head_dim * expand_v = {width} must be a whole number")

    @property
    def value_heads(self) -> int:
        return self.num_heads if self.num_v_heads is None else self.num_v_heads

    @property
    def head_v_dim(self) -> int:
        return int(self.head_dim * self.expand_v)


class GatedDeltaNetMixer(DeltaRuleMixer):
    """Applies the gated delta rule; see `DeltaRuleMixer`."""

    fast_weight_names: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "b_proj", "a_proj", "q_conv1d", "k_conv1d", "v_conv1d", "A_log", "dt_bias",
    )  # fmt: skip
    gated = True

    def __init__(self, config: GatedDeltaNetConfig) -> None:
        H, HV, Dk, Dv = config.num_heads, config.value_heads, config.head_dim, config.head_v_dim
        super().__init__(config, H, HV, H * Dk, HV * Dv, config.use_gate)
        self.init_weights_()

    def _make_gates(self, hidden_size: int) -> None:
        self.a_proj = nn.Linear(hidden_size, self.value_heads, bias=False)
        self.b_proj = nn.Linear(hidden_size, self.value_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads))

    def init_weights_(self) -> None:
        """Draw A uniform in (0, 16) and dt log-uniform in (0.001, 0.1), as in the original."""
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(1e-3, 16).log_())
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp_().clamp_(min=1e-4)
        init.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))

    def _gates(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        beta = self.b_proj(x).to(dtype).sigmoid()
        if self.allow_neg_eigval:
            beta = beta * 2.0
        g = -self.A_log.to(dtype).exp() * F.softplus(self.a_proj(x).to(dtype) + self.dt_bias.to(dtype))
        return (beta, g) if mask is None else (beta * mask, g.masked_fill(~mask, 0.0))


class GatedDeltaNetModel(FastWeightModel):
    config_class = GatedDeltaNetConfig
    mixer_class = GatedDeltaNetMixer


class GatedDeltaNetForCausalLM(FastWeightForCausalLM):
    config_class = GatedDeltaNetConfig
    trunk_class = GatedDeltaNetModel
