"""Say what a source to be converted is, and refuse by the name of what differs whatever LaCT's layers cannot hold unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from refine_nsp.errors import RefineError
from refine_nsp.models.blocks import SUPPORTED_ACTIVATIONS
from refine_nsp.models.families import FAMILIES

KINDS = ("llama", "mistral", "qwen2")
DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
}  # and safetensors' names of them
# Fields whose value, unless it is one of those given, makes a model compute what LaCT's layers do not.
USUAL: dict[str, tuple[object, ...]] = {
    "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,), "mlp_bias": (None, False), "partial_rotary_factor": (None, 1.0),
    "num_local_experts": (None, 0), "num_experts": (None, 0), "n_routed_experts": (None, 0), "kv_lora_rank": (None,),
    "attention_multiplier": (None,), "embedding_multiplier": (None, 1.0), "residual_multiplier": (None, 1.0),
    "logits_scaling": (None, 1.0), "logit_scale": (None, 1.0), "clip_qkv": (None,), "no_rope_layers": (None, []),
    "use_qk_norm": (None, False), "quantization_config": (None,),
}  # fmt: skip


@dataclass(frozen=True)
class AttentionSource:
    """Holds an opened source, whose weights have transformers' names."""

    name: str  # as it was given
    config: PreTrainedConfig  # of one of the `KINDS`, checked
    dtype: torch.dtype
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]  # returns the weight of a name
    carry: Callable[
        [Path], None
    ]  # writes into a folder what belongs to a model besides its weights: tokenizer, generation config
    license: str | None = None  # as the file names it


def window_of(config: PreTrainedConfig) -> int | None:
    """Return the sliding window of any of a model's layers, or None."""
    fields = config.to_dict()
    layers = fields.get("layer_types")
    return fields.get("sliding_window") if layers is None or "sliding_attention" in layers else None


def refuse_others(name: str, config: PreTrainedConfig) -> None:
    """Raise a RefineError, which names what differs, for a model that computes something else than LaCT's layers with its weights."""
    kind = config.model_type
    if kind in FAMILIES:
        raise RefineError(f"{name} is a fast-weight model already ({kind}); train it as it is")
    found = differences(config)
    if found or kind not in KINDS:
        which = f"its {kind!r} has {'; '.join(found)}" if found else f"{kind!r} is another architecture"
        raise RefineError(
            f"{name} cannot become a LaCT model unchanged: {which}; expected a decoder of kind {', '.join(KINDS)} with plain rotary "
            "positions, RMS norms, SwiGLU and no bias but of q, k and v"
        )


def differences(config: PreTrainedConfig) -> list[str]:
    """Name what a model computes otherwise than a LaCT model with its weights would; an empty list means nothing known."""
    fields = config.to_dict()
    found = [f"{field}={fields[field]!r}" for field, usual in USUAL.items() if fields.get(field) not in usual]
    rope = fields.get("rope_parameters")
    if not rope:
        found.append("no rotary positions")
    elif any(isinstance(value, dict) for value in rope.values()):
        found.append("rotary positions that differ by layer")
    else:
        if rope.get("rope_type", "default") != "default":
            found.append(f"scaled rotary positions (rope_type={rope['rope_type']!r})")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            found.append(f"partial rotary positions (partial_rotary_factor={rope['partial_rotary_factor']})")
    activation = fields.get("hidden_act") or fields.get("hidden_activation")
    if activation not in SUPPORTED_ACTIVATIONS:
        found.append(f"another activation (hidden_act={activation!r})")
    if fields.get("attention_bias"):
        found.append("a bias of the attention's output (attention_bias=True)")
    if config.model_type == "qwen3":
        found.append("norms of q and k in each head (LaCT's attn_qk_norm is over all heads)")
    if other := set(fields.get("layer_types") or ()) - {"full_attention", "sliding_attention"}:
        found.append(f"layers that are no attention ({', '.join(sorted(other))})")
    if config.model_type not in KINDS and window_of(config) is not None:
        found.append(f"sliding layers (sliding_window={window_of(config)})")
    heads, width = fields.get("num_attention_heads"), fields.get("head_dim")
    if heads and width and heads * width != fields.get("hidden_size"):
        found.append(f"heads of another size than hidden_size / heads (head_dim={width}, {heads} heads, {fields['hidden_size']})")
    return found
