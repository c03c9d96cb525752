"""DeltaNet (Yang et al. 2024, arXiv 2406.06484) is linear attention whose memory is written by the delta rule.

Per head, with S in [Dk, Dv]: S <- S + k (beta (v - S'k))', o = S'q / sqrt(Dk). Parameter names and config fields are those of
flash-linear-attention's `delta_net`, so its checkpoints load unchanged.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

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


class DeltaNetConfig(FamilyConfig):
    """Configures DeltaNet, with the fields and defaults of flash-linear-attention's `delta_net`.

    `attn_mode`, `fuse_*`, `use_output_norm` and `max_position_embeddings` do not change what is computed (as there).
    `attn` (softmax-attention layers), `attnres_block_size` and `use_l2warp` are refused when set.
    """

    model_type = "delta_net"
    keys_to_ignore_at_inference = ["past_key_values", "last_hidden_state"]

    attn_mode: str = "chunk"
    hidden_size: int = 2048
    expand_k: float = 1.0
    expand_v: float = 1.0
    use_gate: bool = False
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    conv_size: int = 4
    use_beta: bool = True
    use_output_norm: bool = True
    num_heads: int = 16
    qk_norm: str = "l2"
    qk_activation: str = "silu"
    max_position_embeddings: int = 2048
    hidden_ratio: float | None = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    num_hidden_layers: int = 24
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
                "qk_norm": ("l2", "sum"),
                "qk_activation": ("silu", "relu", "elu", "identity"),
            },
        )
        for name, width in (("expand_k", self.key_width), ("expand_v", self.value_width)):
            if width % self.num_heads:
                raise RefineError(
                    f"DeltaNetConfig: hidden_size * {name} = {width} must be a multiple of num_heads = {self.num_heads}"
                )

    @property
    def key_width(self) -> int:
        return int(self.hidden_size * self.expand_k)

    @property
    def value_width(self) -> int:
        return int(self.hidden_size * self.expand_v)


def sum_norm(x: Tensor) -> Tensor:
    """Compute x / sum(x) over the last axis."""
    return x / x.sum(-1, keepdim=True)


class DeltaNetMixer(nn.Module):
    """Applies the delta rule: turns x [B, T, D] into y [B, T, D] and a trace.

    Its states are `recurrent` [R, H, Dk, Dv] and `conv_*` [R, W-1, D'].
    """

    fast_weight_names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "b_proj", "q_conv1d", "k_conv1d", "v_conv1d")
    memory_names: tuple[str, ...] = ()
    shares_states = False

    def __init__(self, config: DeltaNetConfig) -> None:
        super().__init__()
        self.config = config
        self.head_k_dim = config.key_width // config.num_heads
        self.head_v_dim = config.value_width // config.num_heads
        self.q_proj = nn.Linear(config.hidden_size, config.key_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.value_width, bias=False)
        if config.use_beta:
            self.b_proj = nn.Linear(config.hidden_size, config.num_heads, bias=False)
        if config.use_short_conv:
            # With another q/k activation the convolution is linear and the activation follows per head.
            activation = "silu" if config.qk_activation == "silu" else None
            self.q_conv1d = ShortConv(config.key_width, config.conv_size, activation)
            self.k_conv1d = ShortConv(config.key_width, config.conv_size, activation)
            self.v_conv1d = ShortConv(config.value_width, config.conv_size, "silu")
        if config.use_gate:
            self.g_proj = nn.Linear(config.hidden_size, config.value_width, bias=False)
            self.o_norm: nn.Module = GatedRMSNorm(self.head_v_dim, config.norm_eps)
        else:
            self.o_norm = RMSNorm(self.head_v_dim, config.norm_eps)
        self.o_proj = nn.Linear(config.value_width, config.hidden_size, bias=False)

    @property
    def without_kernels(self) -> str | None:
        return delta_rule_exception(self.head_k_dim, gated=False)

    def forward(
        self, x: Tensor, lengths: Tensor | None, state: LayerState | None, offsets: Tensor, branches: int | None = None
    ) -> tuple[Tensor, DeltaTrace]:
        if branches is not None and state is not None:
            state, _ = rows_of_their_own(state, offsets, branches)
        inputs = {"q": self.q_proj(x), "k": self.k_proj(x), "v": self.v_proj(x)}
        q, k, v = self._convolve(inputs, state)
        q, k = (self._activate(z.unflatten(-1, (self.config.num_heads, self.head_k_dim))) for z in (q, k))
        v = v.unflatten(-1, (self.config.num_heads, self.head_v_dim))
        mask = real_token_mask(lengths, x.shape[1], x.device)
        if self.config.qk_norm == "sum" and mask is not None:
            # A pad whose activations sum to zero would give 0/0, and 0 * NaN writes NaN even with beta 0.
            k = k.masked_fill(~mask[..., None], 0.0)
        before = None if state is None else state["recurrent"]
        o, states = delta_rule(q, k, v, self._beta(x, lengths), initial_state=before, lengths=lengths)
        if self.config.use_gate:
            o = self.o_norm(o, self.g_proj(x).unflatten(-1, (self.config.num_heads, self.head_v_dim)))
        else:
            o = self.o_norm(o)
        convolved = inputs if self.config.use_short_conv else {}
        return self.o_proj(o.flatten(-2).to(x.dtype)), DeltaTrace(states, conv_trace(convolved, state, self.config.conv_size))

    def _convolve(self, inputs: dict[str, Tensor], state: LayerState | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        if self.config.use_short_conv:
            history = {name: None if state is None else state.get(f"conv_{name}") for name in "qkv"}
            return self.q_conv1d(q, history["q"]), self.k_conv1d(k, history["k"]), self.v_conv1d(v, history["v"])
        if self.config.qk_activation == "silu":
            q, k = F.silu(q), F.silu(k)
        return q, k, F.silu(v)

    def _activate(self, z: Tensor) -> Tensor:  # [B, T, H, Dk]
        if self.config.qk_activation == "relu":
            z = F.relu(z)
        elif self.config.qk_activation == "elu":
            z = F.elu(z) + 1.0
        return l2_norm(z) if self.config.qk_norm == "l2" else sum_norm(z)

    def _beta(self, x: Tensor, lengths: Tensor | None) -> Tensor:  # [B, T, H], 0 at pads: they write nothing
        if self.config.use_beta:
            beta = self.b_proj(x).sigmoid()
        else:
            beta = x.new_ones(*x.shape[:2], self.config.num_heads)
        if self.config.allow_neg_eigval:
            beta = beta * 2.0
        mask = real_token_mask(lengths, x.shape[1], x.device)
        return beta if mask is None else beta * mask


class DeltaNetModel(FastWeightModel):
    config_class = DeltaNetConfig
    mixer_class = DeltaNetMixer


class DeltaNetForCausalLM(FastWeightForCausalLM):
    config_class = DeltaNetConfig
    trunk_class = DeltaNetModel


__all__ = ["DeltaNetConfig", "DeltaNetForCausalLM", "DeltaNetModel"]
