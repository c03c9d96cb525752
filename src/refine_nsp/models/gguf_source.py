"""Open a GGUF file as a source to be converted: each weight is dequantised when it is asked for, under transformers' names.

llama.cpp stores the rows of q and k of its architecture "llama" in the order of interleaved rotary pairs; they are put back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from refine_nsp.errors import RefineError, first_line
from refine_nsp.models.attention_source import AttentionSource, refuse_others

ARCHITECTURES = ("llama", "qwen2")
SPECIAL = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight",
}  # fmt: skip
INSIDE = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def open_gguf(path: Path) -> AttentionSource:
    """Open the file; a RefineError where it is damaged, or holds a model that LaCT's layers cannot hold unchanged."""
    if not path.is_file():
        raise RefineError(f"no file {path}; expected a GGUF file, a folder or a hub name")
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise RefineError(f"{path} is a GGUF file, which the package gguf reads: pip install 'refine-nsp[gguf]'") from error
    try:
        reader = GGUFReader(path)
        facts: dict[str, object] = {
            key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.ggml.") or "_id" in key
        }
        architecture = facts["general.architecture"]
    except Exception as error:  # of a file that is none the reader raises whatever it stumbles over
        raise RefineError(f"{path} is damaged or no GGUF file ({type(error).__name__}: {first_line(error)})") from error
    stored = {_renamed(tensor.name): tensor for tensor in reader.tensors}
    _refuse_others(path, str(architecture), facts, set(stored))
    config = _config(path, facts)
    config.vocab_size = int(stored["model.embed_tokens.weight"].shape[1]) if "model.embed_tokens.weight" in stored else 0
    refuse_others(str(path), config)
    fields = config.to_dict()
    heads = {"q_proj": fields["num_attention_heads"], "k_proj": fields["num_key_value_heads"]}

    def read(name: str) -> Tensor:
        tensor = stored[name]
        weight = torch.from_numpy(
            np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
        )  # a copy: the file is read-only
        part = name.split(".")[-2]
        return _half_split(weight, heads[part]) if architecture == "llama" and part in heads else weight

    shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in stored.items()}
    licence = facts.get("general.license")
    return AttentionSource(
        str(path), config, torch.float32, shapes, read, lambda out: _carry(path, out), None if licence is None else str(licence)
    )


def _renamed(name: str) -> str:
    """Return transformers' name of a weight; an unknown one stays, to be named where names are checked."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, kind = match.groups()
        return f"model.layers.{layer}.{INSIDE[part]}.{kind}" if part in INSIDE else name
    return OUTSIDE.get(name, name)


def _half_split(weight: Tensor, heads: int) -> Tensor:
    """Put rows [.. pair 0 first, pair 0 second, pair 1 first ..] of each head into the order of all firsts, then all seconds."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _refuse_others(path: Path, architecture: str, facts: Mapping[str, object], names: set[str]) -> None:
    """Raise a RefineError for what transformers' reading of the file would not tell."""
    if architecture not in ARCHITECTURES:
        raise RefineError(f"{path} holds a model of architecture {architecture!r}; expected one of {', '.join(ARCHITECTURES)}")
    found = []
    if (scaling := facts.get(f"{architecture}.rope.scaling.type", "none")) != "none" or "rope_freqs.weight" in names:
        found.append(f"scaled rotary positions ({'rope_freqs' if scaling == 'none' else scaling})")
    if experts := facts.get(f"{architecture}.expert_count"):
        found.append(f"{experts} experts")
    width, heads = facts.get(f"{architecture}.embedding_length"), facts.get(f"{architecture}.attention.head_count")
    for key in ("rope.dimension_count", "attention.key_length"):
        value = facts.get(f"{architecture}.{key}")
        if isinstance(value, int) and isinstance(width, int) and isinstance(heads, int) and value * heads != width:
            found.append(f"heads or rotary positions of another size than hidden_size / heads ({key}={value})")
    if found:
        raise RefineError(f"{path} cannot become a LaCT model unchanged: it has {'; '.join(found)}")


def _config(path: Path, facts: Mapping[str, object]) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except Exception as error:
        raise RefineError(f"cannot read the configuration in {path}: {first_line(error)}") from error
    for name, key in SPECIAL.items():  # transformers' own are the architecture's defaults
        setattr(config, name, facts.get(f"tokenizer.ggml.{key}"))
    return config


def _carry(path: Path, out: Path) -> None:
    """Write the tokenizer that the file holds."""
    try:
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False).save_pretrained(out)
    except Exception as error:
        raise RefineError(f"cannot read the tokenizer in {path}: {first_line(error)}") from error
