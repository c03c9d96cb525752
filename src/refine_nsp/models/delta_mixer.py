"""DeltaNet and Gated DeltaNet share these short convolutions, this read-out and these traces."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init

from refine_nsp.models.state import LayerState, last_inputs
from refine_nsp.ops.delta_rule import DeltaStates, OneToken
from refine_nsp.ops.kernels import delta_rule_problem
from refine_nsp.ops.norm import rms_norm_gated
from refine_nsp.ops.short_conv import short_conv


class ShortConv(nn.Module):
    """Convolves each channel over time, causally and with width W, then applies `activation`; its state is the last W - 1 inputs."""

    def __init__(self, channels: int, width: int, activation: str | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.activation = activation
        self.width = width
        self.init_weights_()

    def init_weights_(self) -> None:
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor, history: Tensor | None) -> Tensor:
        """Convolve x [B, T, D] behind `history` [B, W-1, D]."""
        return short_conv(x, self.weight[:, 0], None, self.activation, history)


class GatedRMSNorm(nn.Module):
    """Computes rms_norm(o) * weight * silu(gate) over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def init_weights_(self) -> None:
        init.ones_(self.weight)

    def forward(self, o: Tensor, gate: Tensor) -> Tensor:
        return rms_norm_gated(o, gate, self.weight, self.eps)


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


def conv_trace(inputs: dict[str, Tensor], state: LayerState | None, width: int) -> dict[str, tuple[Tensor, Tensor | None, int]]:
    """Collect what `DeltaTrace` keeps of the convolutions with inputs `q`, `k`, `v`; those of width 1 have no state."""
    if width == 1:
        return {}
    return {f"conv_{n}": (z, None if state is None else state[f"conv_{n}"], width) for n, z in inputs.items()}


def real_token_mask(lengths: Tensor | None, n_tokens: int, device: torch.device) -> Tensor | None:
    """Mark real tokens, [B, T, 1] bool on `device`; None when all tokens are real. lengths: [B] on the host."""
    if lengths is None:
        return None
    return (torch.arange(n_tokens) < lengths[:, None])[..., None].to(device, non_blocking=True)


def delta_rule_exception(key_width: int, gated: bool) -> str | None:
    """Say for `Mixer.without_kernels` why heads of this width run without kernels; None if they do not."""
    problem = delta_rule_problem(None, key_width, gated)
    return None if problem is None else f"the delta rule on PyTorch's operations ({problem})"
