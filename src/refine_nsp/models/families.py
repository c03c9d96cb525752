"""The families by `model_type`, registered with transformers' Auto classes: a model is added here."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from refine_nsp.models.delta_net import DeltaNetConfig, DeltaNetForCausalLM, DeltaNetModel
from refine_nsp.models.gated_delta_net import GatedDeltaNetConfig, GatedDeltaNetForCausalLM, GatedDeltaNetModel
from refine_nsp.models.lact import LaCTConfig, LaCTForCausalLM, LaCTModel

FAMILIES = {
    "delta_net": (DeltaNetConfig, DeltaNetModel, DeltaNetForCausalLM),
    "gated_deltanet": (GatedDeltaNetConfig, GatedDeltaNetModel, GatedDeltaNetForCausalLM),
    "lact_swiglu": (LaCTConfig, LaCTModel, LaCTForCausalLM),
}
for _model_type, (_config, _model, _causal_lm) in FAMILIES.items():
    AutoConfig.register(_model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal_lm, exist_ok=True)
