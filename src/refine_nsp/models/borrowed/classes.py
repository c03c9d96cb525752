"""Give states to any causal model of transformers: linear-attention hybrids, Mamba-2 hybrids, and plain attention.

The model stays what it is, parameters, names, `generate`, `save_pretrained`, PEFT and Trainer included; its class is a subclass of its
own that also answers the calls of this package (`lengths`, `snapshot_positions`, `output_states`, `step`). States are given by reference
(`by_reference.py`), or, with a warning that names the model, by tokens (`by_tokens.py`) where they are of a kind that cannot be handed over
or do not pass the check made at loading (`check.py`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any, cast

from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import TransformersKwargs

from refine_nsp.errors import RefineError
from refine_nsp.models.blocks import FastWeightForCausalLM, FastWeightModel
from refine_nsp.models.borrowed.by_reference import ByReference
from refine_nsp.models.borrowed.check import check, state_method
from refine_nsp.models.borrowed.layer_kernels import decide_at_each_call
from refine_nsp.models.borrowed.trunk import StatefulCausalModel, StatefulTrunk
from refine_nsp.models.document_marks import MARKS, is_packed, takes_marks
from refine_nsp.models.keywords import refuse_misspelt
from refine_nsp.models.protocols import StateMixer
from refine_nsp.models.state import FastWeightCache

HOUSE_ARGUMENTS = ("lengths", "snapshot_positions", "output_states")
OUTPUT_PARTS = ("out_proj", "o_proj", "norm", "o_norm", "dense", "c_proj")  # of a mixer: they neither write nor read its state


@functools.cache  # two models of one class stay of one class
def trunk_class(plain: type[PreTrainedModel]) -> type[StatefulTrunk]:
    """Make the class of a trunk that answers the calls of this package too."""
    names = argument_names(plain)

    @takes_marks
    @functools.wraps(plain.forward)
    def forward(self: StatefulTrunk, *args: Any, **kwargs: Any) -> object:
        kwargs |= dict(zip(names, args, strict=False))
        if self.answers_plainly or keeps_its_own(kwargs.get("past_key_values"), kwargs):
            return plain.forward(self, **kwargs)
        if kwargs.get("output_hidden_states"):
            raise RefineError(f"{self.label} gives its layers' hidden states only when asked without states; leave out lengths")
        return FastWeightModel.forward(self, **kwargs)

    # `PreTrainedModel` would take the class of the configuration from `StatefulTrunk`.
    members = {"forward": forward, "config_class": plain.config_class}
    return type(plain.__name__, (StatefulTrunk, plain), _names(plain) | members)


@functools.cache  # two models of one class stay of one class
def causal_class(plain: type[PreTrainedModel]) -> type[StatefulCausalModel]:
    """Make the class of a causal model that answers the calls of this package too; `save_pretrained` writes the plain model."""
    names = argument_names(plain)
    known = {*names, *TransformersKwargs.__annotations__, *HOUSE_ARGUMENTS, *MARKS, "step"}

    def __init__(self: StatefulCausalModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        plain.__init__(self, config, *args, **kwargs)
        _install(self)

    @takes_marks
    @functools.wraps(plain.forward)
    def forward(
        self: StatefulCausalModel, *args: Any, step: Callable[[StatefulCausalModel], object] | None = None, **kwargs: Any
    ) -> object:
        if step is not None:
            return step(self)
        kwargs |= dict(zip(names, args, strict=False))
        packed, past = is_packed(kwargs), kwargs.get("past_key_values")
        asked = any(kwargs.get(name) is not None and kwargs.get(name) is not False for name in HOUSE_ARGUMENTS)
        if asked or isinstance(past, FastWeightCache) or (packed and not keeps_its_own(past, kwargs)):
            refuse_extra_losses(self, kwargs)
            return FastWeightForCausalLM.forward(self, **kwargs)
        refuse_misspelt(known, kwargs)
        with self.model.as_it_is():
            return plain.forward(self, **kwargs)

    def load_state_dict(
        self: StatefulCausalModel, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> object:
        # `save_pretrained` may write other names than the model's (experts one by one), and resuming would leave what it does not find as
        # it is. transformers converts names only while it loads: so a second model is loaded for its names.
        if not strict and state_dict.keys() - self.state_dict().keys():
            again = type(self).from_pretrained(None, config=self.config, state_dict=state_dict, dtype=self.dtype)
            state_dict = again.state_dict()
        return plain.load_state_dict(self, state_dict, strict=strict, assign=assign)

    members: dict[str, object] = {"__init__": __init__, "forward": forward, "load_state_dict": load_state_dict}
    prefix_name = plain.base_model_prefix
    if prefix_name != "model":
        members["model"] = property(lambda self: getattr(self, prefix_name))
    return type(plain.__name__, (plain,), _names(plain) | members)


def _names(plain: type) -> dict[str, object]:
    return {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__, "_refine_plain": plain}


def class_for(config: PreTrainedConfig) -> type[StatefulCausalModel]:
    """Find the class that loads a causal model of `config`, or raise a RefineError when transformers has none."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RefineError(
            f"transformers has no causal language model for {config.model_type!r}; expected one that continues a text"
        )
    return causal_class(cast(Hashable, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]))


def with_states(model: PreTrainedModel, check_states: bool = True) -> StatefulCausalModel:
    """Let a causal model of transformers answer the calls of this package too, in place.

    Args:
        model: as `AutoModelForCausalLM.from_pretrained` returns it; weights, names and config stay as they are.
        check_states: run a few tokens to see that states and head are exact; not needed where only sizes count.

    Raises:
        RefineError: logits that are more than a matrix product of the last hidden state (and a known scale).
    """
    stateful = cast(StatefulCausalModel, model)
    if "_refine_plain" in vars(type(model)):
        return stateful
    model.__class__ = causal_class(cast(Hashable, type(model)))
    _install(stateful)
    if check_states:
        check(stateful)
    return stateful


def _install(model: StatefulCausalModel) -> None:
    trunk = model.model
    trunk.__class__ = trunk_class(cast(Hashable, type(trunk)))
    trunk.answers_plainly = False
    trunk.head_factor = head_factor(model.config)
    trunk.kernel_names = decide_at_each_call(trunk)
    trunk.state_method = method = state_method(trunk)
    trunk.mixers = mark_mixers(trunk)
    # The few tokens of a rollout are run together where one by one would be another computation.
    together = isinstance(method, ByReference) and not method.same_by_single_tokens
    for mixer in trunk.mixers:
        mixer.shares_states = together


def head_factor(config: PreTrainedConfig) -> float:
    """Find what a model multiplies its logits by (Granite divides; Falcon-H1 and Cohere multiply)."""
    fields = config.get_text_config(decoder=True).to_dict()
    factors = [float(fields.get(name) or 1.0) for name in ("lm_head_multiplier", "logit_scale", "logits_scaling")]
    return factors[0] * factors[1] / factors[2]


def mark_mixers(trunk: nn.Module) -> list[StateMixer]:
    """Find the modules that write and read states, recurrent ones or else attention, and note in each which of its parts do."""
    keepers = [
        m for m in trunk.modules() if hasattr(m, "layer_idx") and not any(hasattr(s, "layer_idx") for s in list(m.modules())[1:])
    ]
    recurrent = [m for m in keepers if any(isinstance(s, nn.Conv1d) for s in m.modules())]
    modules = recurrent or [m for m in keepers if any("k_proj" in name or "kv" in name for name, _ in m.named_children())]
    mixers = [cast(StateMixer, module) for module in modules]
    for mixer, module in zip(mixers, modules, strict=True):
        parts = dict.fromkeys(name.split(".")[0] for name, _ in module.named_parameters())
        mixer.fast_weight_names = tuple(p for p in parts if p not in OUTPUT_PARTS)
        mixer.memory_names = ()
    return mixers


def argument_names(plain: type[PreTrainedModel]) -> list[str]:
    """List the names of the plain model's positional arguments, in their order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(plain.forward).parameters.values() if p.kind in kinds and p.name != "self"]


def keeps_its_own(past: object, keywords: Mapping[str, object]) -> bool:
    """Tell whether a call brings a cache of transformers, which knows nothing of packed documents: a RefineError where there are any."""
    if not isinstance(past, Cache) or isinstance(past, FastWeightCache):
        return False
    if is_packed(keywords):
        raise RefineError(
            f"packed documents would share the states of a {type(past).__name__}; pass use_cache=False or a FastWeightCache"
        )
    return True


def refuse_extra_losses(model: StatefulCausalModel, keywords: Mapping[str, object]) -> None:
    """Raise a RefineError where a model of transformers adds a loss of its own to the cross-entropy."""
    if keywords.get("labels") is not None and model.config.get_text_config(decoder=True).to_dict().get("output_router_logits"):
        raise RefineError(
            f"{model.model.label}: output_router_logits=True adds a loss of the experts, which is not computed with states or for packed "
            "documents; set it to False in the config, or train on rows of one document"
        )
