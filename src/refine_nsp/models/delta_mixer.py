"""DeltaNet and Gated DeltaNet share this mixer: projections, short convolutions, the delta rule and its read-out.

Parameter names and config fields are those of flash-linear-attention, so its checkpoints load unchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from refine_nsp.models.blocks import FamilyConfig, RMSNorm
from refine_nsp.models.state import LayerState, last_inputs, rows_of_their_own
from refine_nsp.ops.delta_rule import DeltaStates, OneToken, delta_rule
from refine_nsp.ops.kernels import delta_rule_problem
from refine_nsp.ops.norm import l2_norm
from refine_nsp.ops.short_conv import short_conv


class DeltaRuleConfig(FamilyConfig):
    """Configures a delta-rule model.

    `attn_mode`, `fuse_*`, `use_output_norm` and `max_position_embeddings` do not change what is computed (as in the original). `attn`
    (softmax-attention layers), `attnres_block_size` and `use_l2warp` are refused when set.
    """

    attn_mode: str = "chunk"
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    conv_size: int = 4
    attn: dict | None = None
    fuse_linear_cross_entropy: bool = False
    use_l2warp: bool = False
    attnres_block_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.refuse_unsupported(attn=(None,), attnres_block_size=(None,), use_l2warp=(False,))


class ShortConv(nn.Module):
    """Convolves each channel over time, causally and with width W, then applies `activation`; its state is the last W - 1 inputs."""

    def __init__(self, channels: int, width: int, activation: str | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.activation = activation
        self.init_weights_()

    def init_weights_(self) -> None:
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor, history: Tensor | None) -> Tensor:
        """Convolve x [B, T, D] behind `history` [B, W-1, D]."""
        return short_conv(x, self.weight[:, 0], None, self.activation, history)


@dataclass(frozen=True)
class DeltaTrace:
    """Traces a delta-rule mixer: it holds its states, and the inputs of its convolutions with their histories."""

    states: DeltaStates | OneToken
    conv_inputs: dict[str, tuple[Tensor, Tensor | None, int]]  # name -> inputs [B, T, D], history [B, W-1, D], width

    def at(self, positions: Tensor) -> LayerState:
        """Rebuild `recurrent` [B*P, HV, Dk, Dv] and `conv_q`, `conv_k`, `conv_v` [B*P, W-1, D] after the tokens at `positions`."""
        state = {"recurrent": self.states.at(positions).flatten(0, 1)}
        for name, (x, history, width) in self.conv_inputs.items():
            state[name] = last_inputs(x, history, width - 1, positions).flatten(0, 1)
        return state


class DeltaRuleMixer(nn.Module):
    """Applies the delta rule: turns x [B, T, D] into y [B, T, D] and a trace.

    Its states are `recurrent` [R, HV, Dk, Dv] and `conv_*` [R, W-1, D'].
    """

    fast_weight_names: tuple[str, ...]
    memory_names: tuple[str, ...] = ()
    shares_states = False
    gated: bool

    def __init__(
        self, config: DeltaRuleConfig, heads: int, value_heads: int, key_width: int, value_width: int, use_gate: bool,
        qk_activation: str = "silu",
    ) -> None:  # fmt: skip
        """Make H query/key heads and HV value heads, of Dk = key_width / H and Dv = value_width / HV."""
        super().__init__()
        D, W = config.hidden_size, config.conv_size
        self.use_short_conv, self.conv_size, self.allow_neg_eigval = config.use_short_conv, W, config.allow_neg_eigval
        self.heads, self.value_heads, self.use_gate, self.qk_activation = heads, value_heads, use_gate, qk_activation
        self.head_k_dim = key_width // heads
        self.q_proj, self.k_proj = nn.Linear(D, key_width, bias=False), nn.Linear(D, key_width, bias=False)
        self.v_proj = nn.Linear(D, value_width, bias=False)
        self._make_gates(D)
        if config.use_short_conv:
            # With another q/k activation the convolution is linear and the activation follows per head.
            activation = "silu" if qk_activation == "silu" else None
            self.q_conv1d, self.k_conv1d = ShortConv(key_width, W, activation), ShortConv(key_width, W, activation)
            self.v_conv1d = ShortConv(value_width, W, "silu")
        if use_gate:
            self.g_proj = nn.Linear(D, value_width, bias=False)
        self.o_norm = RMSNorm(value_width // value_heads, config.norm_eps)
        self.o_proj = nn.Linear(value_width, D, bias=False)

    def _make_gates(self, hidden_size: int) -> None:
        """Make the parameters that `_gates` reads."""
        raise NotImplementedError

    def _gates(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Compute the write strength and the log decay (None: no decay), [B, T, HV], both 0 at pads, which neither write nor decay.

        mask: [B, T, 1] bool, true at real tokens; None: all are real.
        """
        raise NotImplementedError

    def _normalised(self, z: Tensor, mask: Tensor | None) -> Tensor:
        """Normalise queries or keys [B, T, H, Dk]; with a mask as in `_gates`, they are finite at pads."""
        return l2_norm(z)

    @property
    def without_kernels(self) -> str | None:
        problem = delta_rule_problem(None, self.head_k_dim, self.gated)
        return None if problem is None else f"the delta rule on PyTorch's operations ({problem})"

    def forward(
        self, x: Tensor, lengths: Tensor | None, state: LayerState | None, offsets: Tensor, branches: int | None = None
    ) -> tuple[Tensor, DeltaTrace]:
        if branches is not None and state is not None:
            state, _ = rows_of_their_own(state, offsets, branches)
        mask = None
        if lengths is not None:
            mask = (torch.arange(x.shape[1]) < lengths[:, None])[..., None].to(x.device, non_blocking=True)
        before = state or {}
        inputs = {"q": self.q_proj(x), "k": self.k_proj(x), "v": self.v_proj(x)}
        q, k, v = (self._convolve(name, z, before.get(f"conv_{name}")) for name, z in inputs.items())
        q, k = (self._normalised(z.unflatten(-1, (self.heads, -1)), real) for z, real in ((q, None), (k, mask)))
        beta, g = self._gates(x, mask)
        v = v.unflatten(-1, (self.value_heads, -1))
        o, states = delta_rule(q, k, v, beta, g, before.get("recurrent"), lengths=lengths)
        o = self.o_norm(o, self.g_proj(x).unflatten(-1, (self.value_heads, -1)) if self.use_gate else None)
        # A convolution of width 1 has no state.
        kept = inputs if self.use_short_conv and self.conv_size > 1 else {}
        convolved = {f"conv_{n}": (z, before.get(f"conv_{n}"), self.conv_size) for n, z in kept.items()}
        return self.o_proj(o.flatten(-2).to(x.dtype)), DeltaTrace(states, convolved)

    def _convolve(self, name: str, z: Tensor, history: Tensor | None) -> Tensor:
        if self.use_short_conv:
            return self.get_submodule(f"{name}_conv1d")(z, history)
        return F.silu(z) if name == "v" or self.qk_activation == "silu" else z
