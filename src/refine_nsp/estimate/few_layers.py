"""Build a model without its weights, whole or of a few of its layers: one of each kind tells what the others need."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from refine_nsp.models import with_states
from refine_nsp.models.families import FAMILIES

WithAdapters = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Blueprint:
    """Hold what a causal language model is built from; weights are not needed."""

    config: PreTrainedConfig
    dtype: torch.dtype  # of the weights
    adapters: WithAdapters | None = None  # wraps a model in LoRA adapters

    def build(self, layers: Sequence[int] | None = None) -> PreTrainedModel:
        """Build a random model of these of the layers, or of all."""
        config = copy.deepcopy(self.config.get_text_config(decoder=True))
        model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        if layers is not None:
            keep_layers(model, layers)
        model = model if config.model_type in FAMILIES else with_states(model)
        # PEFT's wrapper answers for all that the model inside has.
        return model if self.adapters is None else cast(PreTrainedModel, self.adapters(model))

    def on_meta(self, layers: Sequence[int] | None = None) -> PreTrainedModel:
        """Build the same without memory for weights. Random ones would fail the check that `with_states` makes; these are not checked."""
        with torch.device("meta"):
            return self.build(layers)


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """Name the kind of every layer as the configuration does."""
    text = config.get_text_config(decoder=True)
    for field in ("layer_types", "layers_block_type"):
        kinds = vars(text).get(field)
        if isinstance(kinds, Sequence) and not isinstance(kinds, str):
            return [str(k) for k in kinds]
    attention = vars(text).get("attn_layer_indices") or []
    return ["attention" if i in attention else "layer" for i in range(text.num_hidden_layers)]


def kinds_of_layers(model: PreTrainedModel) -> list[Hashable]:
    """Tell the layers of a model apart by the names that its configuration has for them, and the shapes of their weights."""
    names = layer_kinds(model.config)
    shapes = [tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()) for layer in layers_of(model)]
    return list(zip(names, shapes, strict=True))


def few_layers(kinds: Sequence[Hashable]) -> tuple[list[int], dict[int, int]]:
    """Choose the first layer of each kind; and the second of each, with how often what it adds is there beyond the first."""
    by_kind: dict[Hashable, list[int]] = {}
    for i, kind in enumerate(kinds):
        by_kind.setdefault(kind, []).append(i)
    return [same[0] for same in by_kind.values()], {same[1]: len(same) - 1 for same in by_kind.values() if len(same) > 1}


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Find the list of a model's layers."""
    count = len(layer_kinds(model.config))
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def keep_layers(model: PreTrainedModel, which: Sequence[int]) -> None:
    """Make a model one of these of its layers, in place, and its configuration too."""
    layers, config, count = layers_of(model), model.config, len(layer_kinds(model.config))
    kept = [layers[i] for i in which]
    del layers[:]
    layers.extend(kept)
    for i, layer in enumerate(kept):
        for module in layer.modules():
            if "layer_idx" in vars(module):
                vars(module)["layer_idx"] = i
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == count and not name.endswith("_indices"):
            setattr(config, name, [value[i] for i in which])
    if vars(config).get("attn_layer_indices"):
        config.attn_layer_indices = [new for new, old in enumerate(which) if old in config.attn_layer_indices]
    config.num_hidden_layers = len(which)


def parameter_bytes(model: nn.Module, trainable: bool = False) -> int:
    """Count the bytes of a model's parameters; with `trainable`, only of those that require gradients."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not trainable)
