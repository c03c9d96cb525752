"""Register the families, by `model_type`, with transformers' Auto classes. A new family is added here."""

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
    """Register the families with the Auto classes, also where flash-linear-attention has put its own models under their names."""
    for model_type, (config, model, causal_lm) in FAMILIES.items():
        AutoConfig.register(model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)


# This imports flash-linear-attention where its kernels will be used, so that our models are registered after its own. A choice of kernels
# that cannot be had is refused where a model is made; an import should not fail for it.
with suppress(RefineError):
    chosen()
register()
