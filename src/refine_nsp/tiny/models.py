"""Make the tiny bases as pretraining starts them, induction-friendly: the query for a value already resembles the value's key.

Without that, recall does not appear within minutes of training.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from refine_nsp.errors import RefineError
from refine_nsp.models import (
    DeltaNetConfig,
    DeltaNetForCausalLM,
    GatedDeltaNetConfig,
    GatedDeltaNetForCausalLM,
    LaCTConfig,
    LaCTForCausalLM,
)
from refine_nsp.models.delta_mixer import DeltaRuleMixer
from refine_nsp.models.lact import LaCTMixer
from refine_nsp.tiny.pretrain_settings import PretrainConfig


def new_delta_net(args: PretrainConfig, vocab_size: int) -> DeltaNetForCausalLM:
    """Make a DeltaNet that starts induction-friendly."""
    return induction_friendly(DeltaNetForCausalLM(DeltaNetConfig(num_heads=args.num_heads, **_sizes(args, vocab_size))))


def new_gated_delta_net(args: PretrainConfig, vocab_size: int) -> GatedDeltaNetForCausalLM:
    """Make a Gated DeltaNet that starts induction-friendly and with a long memory; its heads share out the width, as DeltaNet's do."""
    if args.hidden_size % args.num_heads:
        raise RefineError(f"hidden_size={args.hidden_size} must be a multiple of num_heads={args.num_heads}")
    width = args.hidden_size // args.num_heads
    sizes = {"num_heads": args.num_heads, "head_dim": width, "expand_v": 1.0, **_sizes(args, vocab_size)}
    return remember_long(induction_friendly(GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**sizes))))


def new_lact(args: PretrainConfig, vocab_size: int) -> LaCTForCausalLM:
    """Make a LaCT whose window and chunk are short, and which starts induction-friendly too."""
    return lact_induction_friendly(
        LaCTForCausalLM(
            LaCTConfig(
                num_attn_heads=args.num_heads, num_lact_heads=args.num_heads, lact_chunk_size=args.window,
                window_size=args.window, w0_w2_low_rank=32, initializer_range=0.02, qkv_bias=True, ttt_nope=True,
                **_sizes(args, vocab_size),
            )
        )
    )  # fmt: skip


def _sizes(args: PretrainConfig, vocab_size: int) -> dict[str, Any]:
    """Return the sizes that all kinds of model have."""
    return {
        "vocab_size": vocab_size, "hidden_size": args.hidden_size, "num_hidden_layers": args.num_hidden_layers,
        "intermediate_size": args.intermediate_size, "tie_word_embeddings": True,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip


NEW_MODELS = {"delta_net": new_delta_net, "gated_deltanet": new_gated_delta_net, "lact_swiglu": new_lact}
DeltaRuleModel = TypeVar("DeltaRuleModel", DeltaNetForCausalLM, GatedDeltaNetForCausalLM)


@torch.no_grad()
def induction_friendly(model: DeltaRuleModel) -> DeltaRuleModel:
    """Make q and k alike, and k one token late: a key stands for the two tokens before it, a query for the two up to it.

    With three heads or more, recall appears in a tenth of the tokens, because the first two heads get work of their own, and o_proj undoes
    v_proj, so that a value that is read comes out as the vector that it was written from.
    """
    for layer in model.model.layers:
        mixer = layer.attn
        mixer.q_proj.weight.copy_(mixer.k_proj.weight)
        for conv, taps in ((mixer.q_conv1d, [-2, -1]), (mixer.k_conv1d, [-3, -2]), (mixer.v_conv1d, [-1])):
            conv.weight.mul_(0.1)
            conv.weight[:, 0, taps] += 1.0
    if model.config.num_heads >= 3:
        for layer in model.model.layers:
            values = layer.attn.v_proj.weight
            undone(values, layer.attn.o_proj.weight, size=float(values.std()) * len(values) ** 0.5)
            look_three_back(layer.attn, head=1)
        summarises(model.model.layers[0].attn, head=0)
    return model


def undone(values: torch.Tensor, output: torch.Tensor, size: float) -> None:
    """Set two weights [D, D] to an orthogonal matrix (`values`) and to its transpose (`output`), both times `size`."""
    orthogonal, _ = torch.linalg.qr(torch.randn_like(values))
    values.copy_(size * orthogonal)
    output.copy_(size * orthogonal.T)


def look_three_back(mixer: DeltaRuleMixer, head: int) -> None:
    """Let a head's key stand for the three tokens before it, and its query for the three up to it, for keys of several pieces."""
    channels = _channels(mixer, head)
    for conv, taps in ((mixer.q_conv1d, [-3, -2, -1]), (mixer.k_conv1d, [-4, -3, -2])):
        conv.weight[channels] = 0.03 * torch.randn_like(conv.weight[channels])
        conv.weight[channels, 0, taps] += (2 / 3) ** 0.5


def summarises(mixer: DeltaRuleMixer, head: int) -> None:
    """Let a head read at every token what it writes there, a random mixture of the last four tokens, so that a token carries them on."""
    channels = _channels(mixer, head)
    for conv in (mixer.q_conv1d, mixer.k_conv1d):
        conv.weight[channels] = 0.0
        conv.weight[channels, 0, -1] = 1.0
    mixture = torch.randn_like(mixer.v_conv1d.weight[channels])
    mixer.v_conv1d.weight[channels] = 1.5 * mixture / mixture.norm(dim=-1, keepdim=True)
    mixer.o_proj.weight[:, channels] = mixer.o_proj.weight.std() * torch.randn_like(mixer.o_proj.weight[:, channels])


def _channels(mixer: DeltaRuleMixer, head: int) -> slice:
    """Return the channels of a head in q, k and v, which are equally wide here."""
    width = mixer.q_proj.weight.shape[0] // mixer.heads
    return slice(head * width, (head + 1) * width)


@torch.no_grad()
def remember_long(model: GatedDeltaNetForCausalLM) -> GatedDeltaNetForCausalLM:
    """Let a layer's heads forget by 1/e in 1,000 to 10,000 tokens at first, evenly on a log scale; originally in 1 to 1,000 or more."""
    for layer in model.model.layers:
        mixer = layer.attn
        mixer.A_log.zero_()
        rate = torch.logspace(-3, -4, len(mixer.dt_bias))
        mixer.dt_bias.copy_(rate.expm1().log())  # its softplus is the rate
    return model


@torch.no_grad()
def lact_induction_friendly(model: LaCTForCausalLM) -> LaCTForCausalLM:
    """Do for a model without convolutions what `induction_friendly` does.

    The first layer's two heads look one and two tokens back and put what they see into channels next to the token's own. In later layers a
    key stands for the two tokens before it, a query for the two up to it. Their fast weights start with w1 small and its learning rate
    large, so that a read returns what was written and not what they started from; o_proj undoes v, so that a value comes out as the vector
    that it was written from. Together this gave two and a half times the recall after half a million tokens.
    """
    D = model.config.hidden_size
    half, quarter = D // 2, D // 4  # half the channels for the token, a quarter each for the two before it
    features = torch.randn(quarter, half) / half**0.5
    # The token must be larger than what the other layers add at first, or it drowns in that.
    token = 3 * model.config.initializer_range
    model.model.embeddings.weight[:, :half] *= token / model.config.initializer_range
    model.model.embeddings.weight[:, half:] *= 0.1
    for index, layer in enumerate(model.model.layers):
        mixer = layer.attn
        q, k, v = (mixer.qkv.weight[i * D : (i + 1) * D] for i in range(3))
        if index == 0:
            mixer.o_proj.weight.zero_()
            for head in range(2):
                rows = slice(head * half, head * half + quarter)
                v[rows, :half] = features
                # The copy is as large as an embedding, which the norm before has scaled to about 1.4 in its half of the channels.
                beside = slice(half + head * quarter, half + (head + 1) * quarter)
                mixer.o_proj.weight[beside, rows] = 0.7 * token * torch.eye(quarter)
                look_back(mixer, head, head + 1)
            continue
        # At this size the norm behind the fast weights loses a third of a read to its epsilon; at a fifteenth of it, nearly all.
        mixer.w1 *= 0.3
        mixer.lr_proj.bias.view(2, 3)[:, 1] = 15.0  # each head's w1 learns at a rate of about 8
        undone(v, mixer.o_proj.weight, size=0.3)  # small values, which the silu in front of the fast weights hardly bends
        mixer.ttt_scale_proj.bias.fill_(1.0)
        for head in range(2):
            first, second, end = head * half, head * half + quarter, (head + 1) * half
            q[first:end] *= 0.1
            k[first:end] *= 0.1
            q[first:second, :half] += features
            q[second:end, half : half + quarter] += torch.eye(quarter)
            k[first:second, half : half + quarter] += torch.eye(quarter)
            k[second:end, half + quarter :] += torch.eye(quarter)
    return model


def look_back(mixer: LaCTMixer, head: int, tokens: int) -> None:
    """Bias a head's attention to the token `tokens` back, by the fastest rotary pairs; the fast weights do not see the bias."""
    pairs, size = 8, 30.0**0.5
    D, d = mixer.config.hidden_size, mixer.config.hidden_size // mixer.config.num_attn_heads
    theta = mixer.config.rope_theta ** (-torch.arange(pairs) / (d // 2))
    q, k = (i * D + head * d for i in range(2))
    mixer.qkv.bias[k : k + pairs] = size
    mixer.qkv.bias[q : q + pairs] = size * torch.cos(theta * tokens)
    mixer.qkv.bias[q + d // 2 : q + d // 2 + pairs] = -size * torch.sin(theta * tokens)
    channels = slice(head * d, (head + 1) * d)
    for column, start in ((0, q), (1, k)):
        mixer.qk_offset[channels, column] = -mixer.qkv.bias[start : start + d]
