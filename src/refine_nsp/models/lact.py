"""LaCT (Zhang et al. 2025, arXiv 2505.23884) has sliding-window attention plus large-chunk fast weights in every layer.

Config fields and parameter names are those of the original `lact_swiglu`, so its checkpoints load unchanged. Chunks are anchored at
a row's first real token. The state holds the tokens of the open chunk, so decoding crosses chunk boundaries exactly (`ops/lact.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from refine_nsp.errors import RefineError
from refine_nsp.models.blocks import FamilyConfig, FastWeightForCausalLM, FastWeightModel, RMSNorm
from refine_nsp.models.state import LayerState, last_inputs, rows_of_their_own
from refine_nsp.ops.lact import LaCTStates, Tokens, lact, lact_branches
from refine_nsp.ops.lact_update import Triple, UpdateRule
from refine_nsp.ops.rotary import apply_rotary, rotary_tables
from refine_nsp.ops.window_attention import branched_window_attention, window_attention

BASE_LEARNING_RATE = 0.001
RATE_SHIFT = BASE_LEARNING_RATE + math.log(-math.expm1(-BASE_LEARNING_RATE))  # softplus of it is the base rate
NORM_EPS = 1e-5  # of the q/k norms and of the read-out norm: the original does not pass norm_eps to them


class LaCTConfig(FamilyConfig):
    """Configures LaCT, with the fields and defaults of the original `lact_swiglu`.

    `fuse_*`, `last_layer_fuse_norm`, `use_fused_kernel`, `elementwise_affine`, `max_position_embeddings` and `fp32_states` do not
    change what is computed in float32 (fast weights are kept in float32 or better here). Other `ttt_loss_type` or
    `lr_parameterization` than the original implements are refused. `muon_dtype` is ours: Newton-Schulz in "bfloat16" (as published)
    or "float32".
    """

    model_type = "lact_swiglu"

    num_attn_heads: int = 32
    num_lact_heads: int = 4
    inter_multi: float = 1
    qkv_bias: bool = False
    attn_qk_norm: bool = False
    lact_chunk_size: int = 2048
    use_muon: bool = False
    muon_dtype: str = "bfloat16"
    lr_dim: int = 1
    qkv_silu: bool = True
    no_v_silu: bool = False
    lr_parameterization: str = "mamba"
    learnable_ttt_scale: bool = True
    use_momentum: bool = True
    ttt_loss_type: str = "dot_product"
    ttt_prenorm: bool = False
    ttt_nope: bool = False
    w0_w2_low_rank: int = -1
    window_size: int = 2048
    rope_theta: float = 10000.0
    initializer_range: float = 0.006
    elementwise_affine: bool = True
    last_layer_fuse_norm: bool = True
    fw_init_gain: float = 0.5
    use_fused_kernel: bool = False
    fp32_states: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.refuse_unsupported(
            ttt_loss_type=("dot_product",), lr_parameterization=("mamba", "Mamba", "MAMBA"), muon_dtype=("bfloat16", "float32")
        )
        for name in ("lact_chunk_size", "window_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise RefineError(f"LaCTConfig: {name} must be a whole number of at least 1, got {value!r}")
        for name in ("num_attn_heads", "num_lact_heads"):
            if self.hidden_size % getattr(self, name):
                raise RefineError(
                    f"LaCTConfig: hidden_size={self.hidden_size} must be a multiple of {name}={getattr(self, name)}"
                )
        if (self.hidden_size // self.num_attn_heads) % 2:
            raise RefineError(f"LaCTConfig: the attention head width {self.hidden_size // self.num_attn_heads} must be even")
        if self.lr_dim != 1 and not (self.lr_dim == self.fw_head_dim == self.fw_hidden_dim):
            raise RefineError(
                f"LaCTConfig: lr_dim={self.lr_dim} must be 1, or the fast-weight head width {self.fw_head_dim} with inter_multi 1"
            )

    @property
    def fw_head_dim(self) -> int:
        """Compute the width Dk = Dv of a fast-weight head."""
        return self.hidden_size // self.num_lact_heads

    @property
    def fw_hidden_dim(self) -> int:
        """Compute the width inside a fast-weight network."""
        return int(self.fw_head_dim * self.inter_multi)

    @property
    def update_rule(self) -> UpdateRule:
        muon = {"bfloat16": torch.bfloat16, "float32": torch.float32}[self.muon_dtype] if self.use_muon else None
        return UpdateRule(self.use_momentum, muon, self.ttt_prenorm)


class LowRankFastWeight(nn.Module):
    """Makes an initial fast weight w_left @ w_right + 0.5 I, [H, Dh, D]."""

    def __init__(self, heads: int, rows: int, columns: int, rank: int, gain: float) -> None:
        super().__init__()
        self.w_left = nn.Parameter(torch.empty(heads, rows, rank))
        self.w_right = nn.Parameter(torch.empty(heads, rank, columns))
        self.rank, self.columns, self.gain = rank, columns, gain
        self.init_weights_()

    def init_weights_(self) -> None:
        init.normal_(self.w_left, std=self.gain / math.sqrt(self.rank))
        init.normal_(self.w_right, std=self.gain / math.sqrt(self.columns))

    def forward(self) -> Tensor:
        w = self.w_left @ self.w_right
        return w + 0.5 * torch.eye(*w.shape[-2:], dtype=w.dtype, device=w.device)


@dataclass(frozen=True)
class LaCTTrace:
    """Traces a LaCT mixer: it holds the fast weights' states, and the window's keys and values with those before the pass."""

    states: LaCTStates
    keys: Tensor  # [B, T, Ha, d]
    values: Tensor
    window_before: tuple[Tensor, Tensor] | None  # [B, W - 1, Ha, d]
    window: int

    def at(self, positions: Tensor) -> LayerState:
        """Rebuild the fast weights' state (see `ops/lact.py`) and `window_k`, `window_v` [B*P, W - 1, Ha, d]."""
        state = {name: x.flatten(0, 1) for name, x in self.states.at(positions).items()}
        before = (None, None) if self.window_before is None else self.window_before
        for name, x, history in (("window_k", self.keys, before[0]), ("window_v", self.values, before[1])):
            state[name] = last_inputs(x, history, self.window - 1, positions).flatten(0, 1)
        return state


class LaCTMixer(nn.Module):
    """Adds what the fast weights recall to window attention: turns x [B, T, D] into y [B, T, D] and a trace."""

    fast_weight_names: tuple[str, ...] = ("qkv", "w0", "w1", "w2", "lr_proj", "momentum_proj", "qk_scale", "qk_offset")
    memory_names: tuple[str, ...] = (*fast_weight_names[1:], "ttt_scale_proj", "ttt_norm")  # attention alone has the other ones
    shares_states = True
    w0: nn.Parameter | LowRankFastWeight
    w2: nn.Parameter | LowRankFastWeight
    without_kernels = "fast weights on PyTorch's matrix products, window attention as torch chooses"

    def __init__(self, config: LaCTConfig) -> None:
        super().__init__()
        self.config = config
        D, H, d, dh = config.hidden_size, config.num_lact_heads, config.fw_head_dim, config.fw_hidden_dim
        self.qkv = nn.Linear(D, 3 * D, bias=config.qkv_bias)
        if config.attn_qk_norm:
            self.q_norm, self.k_norm = RMSNorm(D, NORM_EPS), RMSNorm(D, NORM_EPS)
        self.o_proj = nn.Linear(D, D, bias=False)
        low_rank = config.w0_w2_low_rank > 0
        for name in ("w0", "w2"):
            rank, gain = config.w0_w2_low_rank, config.fw_init_gain
            setattr(self, name, LowRankFastWeight(H, dh, d, rank, gain) if low_rank else nn.Parameter(torch.empty(H, dh, d)))
        self.w1 = nn.Parameter(torch.empty(H, d, dh))
        self.lr_proj = nn.Linear(D, 3 * config.lr_dim * H)
        self.qk_scale = nn.Parameter(torch.empty(D, 2))
        self.qk_offset = nn.Parameter(torch.empty(D, 2))
        if config.learnable_ttt_scale:
            self.ttt_scale_proj = nn.Linear(D, H)
        self.ttt_norm = RMSNorm(d, NORM_EPS)
        if config.use_momentum:
            self.momentum_proj = nn.Sequential(nn.Linear(D, H), nn.Sigmoid())
        self.init_weights_()

    def init_weights_(self) -> None:
        init.ones_(self.qk_scale)
        init.zeros_(self.qk_offset)
        for weight in (self.w0, self.w2):
            if isinstance(weight, nn.Parameter):
                init.normal_(weight, std=1.0 / math.sqrt(self.config.fw_head_dim))
        init.normal_(self.w1, std=1.0 / math.sqrt(self.config.fw_hidden_dim))

    def forward(
        self, x: Tensor, lengths: Tensor | None, state: LayerState | None, offsets: Tensor, branches: int | None = None
    ) -> tuple[Tensor, LaCTTrace | None]:
        c = self.config
        if branches is not None and state is not None:
            if x.shape[1] <= c.lact_chunk_size:
                return self._branch(x, state, offsets, branches), None
            state, offsets = rows_of_their_own(state, offsets, branches)
        q, k, v, tables = self._project(x, offsets)
        attended, keys, values = self._attend(q, k, v, state, offsets, tables)
        fast_q, tokens = self._fast_inputs(x, q, k, v, tables)
        recalled, states = lact(
            fast_q, tokens, self._initial_weights(), c.update_rule, c.lact_chunk_size, state, offsets, lengths
        )
        before = None if state is None else (state["window_k"], state["window_v"])
        return self._combine(x, attended, recalled), LaCTTrace(states, keys, values, before, c.window_size)

    def _branch(self, x: Tensor, state: LayerState, offsets: Tensor, branches: int) -> Tensor:
        """Compute `forward` for at most a chunk of tokens, neither copying nor joining the state's large fast weights and window."""
        c = self.config
        q, k, v, tables = self._project(x, offsets.repeat_interleave(branches))
        heads = [z.unflatten(-1, (c.num_attn_heads, -1)) for z in (q, k, v)]
        own = [z.transpose(1, 2) for z in (*(apply_rotary(z, *tables) for z in heads[:2]), heads[2])]
        past_k, past_v = (state[name].transpose(1, 2) for name in ("window_k", "window_v"))
        filled = offsets.clamp(max=c.window_size - 1).to(x.device, non_blocking=True)
        attended = branched_window_attention(own[0], past_k, past_v, own[1], own[2], c.window_size, filled)
        fast_q, tokens = self._fast_inputs(x, q, k, v, tables)
        recalled = lact_branches(fast_q, tokens, self._initial_weights(), c.update_rule, c.lact_chunk_size, state, offsets)
        return self._combine(x, attended.transpose(1, 2).flatten(2), recalled)

    def _project(self, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Compute q, k, v [B, T, D], and the rotary tables of their positions."""
        c = self.config
        q, k, v = self.qkv(x).chunk(3, -1)
        if c.attn_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        positions = (offsets[:, None] + torch.arange(x.shape[1])).to(x.device, non_blocking=True)
        return q, k, v, rotary_tables(positions, c.hidden_size // c.num_attn_heads, c.rope_theta, x.dtype)

    def _combine(self, x: Tensor, attended: Tensor, recalled: Tensor) -> Tensor:
        """Combine attended [B, T, D] and recalled [B, H, T, d] to y [B, T, D]."""
        recalled = self.ttt_norm(recalled)
        if self.config.learnable_ttt_scale:
            recalled = recalled * F.silu(self.ttt_scale_proj(x)).transpose(1, 2)[..., None]
        return self.o_proj(attended + recalled.transpose(1, 2).flatten(2))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: LayerState | None, offsets: Tensor, tables: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the attention output [B, T, D], and this pass's rotated keys and values [B, T, Ha, d]."""
        q, k, v = (z.unflatten(-1, (self.config.num_attn_heads, -1)) for z in (q, k, v))
        q, keys = apply_rotary(q, *tables), apply_rotary(k, *tables)
        all_keys, all_values, past = keys, v, torch.zeros_like(offsets)
        if state is not None:
            all_keys, all_values = torch.cat([state["window_k"], keys], 1), torch.cat([state["window_v"], v], 1)
            past = offsets.clamp(max=self.config.window_size - 1)
        q, all_keys, all_values = (z.transpose(1, 2) for z in (q, all_keys, all_values))
        o = window_attention(q, all_keys, all_values, self.config.window_size, past)
        return o.transpose(1, 2).flatten(2), keys, v

    def _fast_inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tokens]:
        """Compute queries [B, H, T, d], and the tokens to learn from before they join the open chunk."""
        c = self.config
        q = q * self.qk_scale[:, 0] + self.qk_offset[:, 0]
        k = k * self.qk_scale[:, 1] + self.qk_offset[:, 1]
        if c.qkv_silu:
            q, k = F.silu(q), F.silu(k)
            v = v if c.no_v_silu else F.silu(v)
        q, k = (_unit(z.unflatten(-1, (c.num_lact_heads, -1))) for z in (q, k))
        if not c.ttt_nope:
            # The rotation pairs channels within attention heads, whose split differs from that of the fast-weight heads.
            q, k = (
                apply_rotary(z.flatten(2).unflatten(-1, (c.num_attn_heads, -1)), *tables)
                .flatten(2)
                .unflatten(-1, (c.num_lact_heads, -1))
                for z in (q, k)
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        lr = F.softplus(self.lr_proj(x).to(wide) + RATE_SHIFT).unflatten(-1, (c.num_lact_heads, -1))
        momentum = self.momentum_proj(x).to(wide)[..., None].transpose(1, 2) if c.use_momentum else None
        v = v.unflatten(-1, (c.num_lact_heads, -1))
        return q.transpose(1, 2), Tokens(k.transpose(1, 2), v.transpose(1, 2), lr.transpose(1, 2), momentum)

    def _initial_weights(self) -> Triple:
        """Return the fast weights before any update, [1, H, ...], in float32 or better."""
        w0, w2 = (w() if isinstance(w, LowRankFastWeight) else w for w in (self.w0, self.w2))
        wide = torch.promote_types(self.w1.dtype, torch.float32)
        return Triple(*(w.to(wide)[None] for w in (w0, self.w1, w2)))


def _unit(x: Tensor) -> Tensor:
    """Compute x / (|x| + 1e-5) over the last axis, with the norm in float32 or better."""
    norm = x.to(torch.promote_types(x.dtype, torch.float32)).norm(dim=-1, keepdim=True)
    return (x / (norm + 1e-5)).to(x.dtype)


class LaCTModel(FastWeightModel):
    config_class = LaCTConfig
    mixer_class = LaCTMixer


class LaCTForCausalLM(FastWeightForCausalLM):
    config_class = LaCTConfig
    trunk_class = LaCTModel
