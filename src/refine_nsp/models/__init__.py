"""Fast-weight language models are transformers models here; importing this package registers them with the Auto classes."""

from refine_nsp.models.borrowed.classes import with_states
from refine_nsp.models.borrowed.window import attends_only, read_in_window, sees_tokens, window_problem
from refine_nsp.models.delta_net import DeltaNetConfig, DeltaNetForCausalLM, DeltaNetModel
from refine_nsp.models.families import FAMILIES
from refine_nsp.models.gated_delta_net import GatedDeltaNetConfig, GatedDeltaNetForCausalLM, GatedDeltaNetModel
from refine_nsp.models.lact import LaCTConfig, LaCTForCausalLM, LaCTModel
from refine_nsp.models.load import load
from refine_nsp.models.state import FastWeightCache, LayerState, PrefixStates

__all__ = [
    "FAMILIES",
    "DeltaNetConfig",
    "DeltaNetForCausalLM",
    "DeltaNetModel",
    "FastWeightCache",
    "GatedDeltaNetConfig",
    "GatedDeltaNetForCausalLM",
    "GatedDeltaNetModel",
    "LaCTConfig",
    "LaCTForCausalLM",
    "LaCTModel",
    "LayerState",
    "PrefixStates",
    "attends_only",
    "load",
    "read_in_window",
    "sees_tokens",
    "window_problem",
    "with_states",
]
