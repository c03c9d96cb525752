"""Fast-weight language models as transformers models; importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from refine_nsp.models.delta_net import DeltaNetConfig, DeltaNetForCausalLM, DeltaNetModel
from refine_nsp.models.gated_delta_net import GatedDeltaNetConfig, GatedDeltaNetForCausalLM, GatedDeltaNetModel
from refine_nsp.models.lact import LaCTConfig, LaCTForCausalLM, LaCTModel
from refine_nsp.models.load import load
from refine_nsp.models.state import FastWeightCache, LayerState, PrefixStates

FAMILIES = {
    "delta_net": (DeltaNetConfig, DeltaNetModel, DeltaNetForCausalLM),
    "gated_deltanet": (GatedDeltaNetConfig, GatedDeltaNetModel, GatedDeltaNetForCausalLM),
    "lact_swiglu": (LaCTConfig, LaCTModel, LaCTForCausalLM),
}
for _model_type, (_config, _model, _causal_lm) in FAMILIES.items():
    AutoConfig.register(_model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal_lm, exist_ok=True)

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
    "load",
]
