"""DeltaNet (Yang et al. 2024, arXiv 2406.06484) is linear attention whose memory is written by the delta rule.

Per head, with S in [Dk, Dv]: S <- S + k (beta (v - S'k))', o = S'q / sqrt(Dk).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from refine_nsp.errors import RefineError
from refine_nsp.models.blocks import FastWeightForCausalLM, FastWeightModel
from refine_nsp.models.delta_mixer import DeltaRuleConfig, DeltaRuleMixer
from refine_nsp.ops.norm import l2_norm


class DeltaNetConfig(DeltaRuleConfig):
    """Configures DeltaNet, with the fields and defaults of flash-linear-attention's `delta_net`."""

    model_type = "delta_net"

    expand_k: float = 1.0
    expand_v: float = 1.0
    use_gate: bool = False
    use_beta: bool = True
    use_output_norm: bool = True
    num_heads: int = 16
    qk_norm: str = "l2"
    qk_activation: str = "silu"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.refuse_unsupported(qk_norm=("l2", "sum"), qk_activation=("silu", "relu", "elu", "identity"))
        for name, width in (("expand_k", self.key_width), ("expand_v", self.value_width)):
            if width % self.num_heads:
                raise RefineError(
                    f"DeltaNetConfig: hidden_size * {name} = {width} must be a multiple of num_heads={self.num_heads}"
                )

    @property
    def key_width(self) -> int:
        return int(self.hidden_size * self.expand_k)

    @property
    def value_width(self) -> int:
        return int(self.hidden_size * self.expand_v)


class DeltaNetMixer(DeltaRuleMixer):
    """Applies the plain delta rule; see `DeltaRuleMixer`."""

    fast_weight_names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "b_proj", "q_conv1d", "k_conv1d", "v_conv1d")
    gated = False

    def __init__(self, config: DeltaNetConfig) -> None:
        self.use_beta, self.qk_norm, H = config.use_beta, config.qk_norm, config.num_heads
        super().__init__(config, H, H, config.key_width, config.value_width, config.use_gate, config.qk_activation)

    def _make_gates(self, hidden_size: int) -> None:
        if self.use_beta:
            self.b_proj = nn.Linear(hidden_size, self.heads, bias=False)

    def _gates(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        beta = self.b_proj(x).sigmoid() if self.use_beta else x.new_ones(*x.shape[:2], self.heads)
        if self.allow_neg_eigval:
            beta = beta * 2.0
        return (beta if mask is None else beta * mask), None

    def _normalised(self, z: Tensor, mask: Tensor | None) -> Tensor:
        if self.qk_activation == "relu":
            z = F.relu(z)
        elif self.qk_activation == "elu":
            z = F.elu(z) + 1.0
        if self.qk_norm == "l2":
            return l2_norm(z)
        if mask is not None:
            # A pad whose activations sum to zero would give 0/0, and 0 * NaN writes NaN even with beta 0.
            z = z.masked_fill(~mask[..., None], 1.0)
        return z / z.sum(-1, keepdim=True)


class DeltaNetModel(FastWeightModel):
    config_class = DeltaNetConfig
    mixer_class = DeltaNetMixer


class DeltaNetForCausalLM(FastWeightForCausalLM):
    config_class = DeltaNetConfig
    trunk_class = DeltaNetModel
