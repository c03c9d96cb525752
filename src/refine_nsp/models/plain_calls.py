"""How models of transformers are called: positional arguments by name, and what their own code would get wrong refused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers.cache_utils import Cache

from refine_nsp.errors import RefineError
from refine_nsp.models.marks import MARKS, is_packed
from refine_nsp.models.state import FastWeightCache


def argument_names(plain: Any) -> list[str]:
    """What the plain model calls its positional arguments, in their order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(plain.forward).parameters.values() if p.kind in kinds and p.name != "self"]


def packed_signature(plain: Any) -> inspect.Signature:
    """The plain model's, with the marks of packed documents: transformers' Trainer drops columns that are not in it."""
    signature = inspect.signature(plain.forward)
    parameters = list(signature.parameters.values())
    missing = [name for name in MARKS if name not in signature.parameters]
    at = next((i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_KEYWORD), len(parameters))
    parameters[at:at] = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in missing]
    return signature.replace(parameters=parameters)


def keeps_its_own(past: Any, keywords: Mapping[str, Any]) -> bool:
    """Whether a call brings a cache of transformers, which knows nothing of packed documents: a RefineError where there are any."""
    if not isinstance(past, Cache) or isinstance(past, FastWeightCache):
        return False
    if is_packed(keywords):
        raise RefineError(
            f"packed documents would share the states of a {type(past).__name__}; pass use_cache=False, or a refine_nsp FastWeightCache"
        )
    return True


def refuse_extra_losses(model: Any, keywords: Mapping[str, Any]) -> None:
    """Raise a RefineError where a model of transformers adds a loss of its own to the cross-entropy."""
    if keywords.get("labels") is not None and model.config.get_text_config(decoder=True).to_dict().get("output_router_logits"):
        raise RefineError(
            f"{model.model.label}: output_router_logits=True adds a loss of the experts, which is not computed with states or for packed "
            "documents; set it to False in the config, or train on rows of one document"
        )
