"""The families by `model_type`, registered with transformers' Auto classes: a model is added here."""

from contextlib import suppress

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from refine_nsp.errors import RefineError
from refine_nsp.models.delta_net import DeltaNetConfig, DeltaNetForCausalLM, DeltaNetModel
from refine_nsp.models.gated_delta_net import GatedDeltaNetConfig, GatedDeltaNetForCausalLM, GatedDeltaNetModel
from refine_nsp.models.lact import LaCTConfig, LaCTForCausalLM, LaCTModel
from refine_nsp.ops.kernels import chosen

FAMILIES = {
    "delta_net": (DeltaNetConfig, DeltaNetModel, DeltaNetForCausalLM),
    "gated_deltanet": (GatedDeltaNetConfig, GatedDeltaNetModel, GatedDeltaNetForCausalLM),
    "lact_swiglu": (LaCTConfig, LaCTModel, LaCTForCausalLM),
}


def register() -> None:
    """With the Auto classes. flash-linear-attention, once imported, has put models of its own under two of the names."""
    for model_type, (config, model, causal_lm) in FAMILIES.items():
        AutoConfig.register(model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)


# Imports flash-linear-attention where its kernels will be used, so that ours come after it. What is wrong with the choice is said where
# a model is made: an import is no place for it.
with suppress(RefineError):
    chosen()
register()
