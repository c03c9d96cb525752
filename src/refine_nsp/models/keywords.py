"""Refuse keywords of `forward` that nobody reads, by name; those that ask for nothing are accepted.

transformers' models swallow what they do not know, so a misspelt `attention_mask` costs a wrong figure and no message.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from refine_nsp.errors import RefineError, closest

# Libraries pass these to any causal model. Each has a test of values that ask for nothing, and why the others cannot be served.
ASKS_NOTHING: dict[str, tuple[Callable[[object], bool], str]] = {
    "output_attentions": (lambda value: not value, "fast weights have no attention maps to return"),
    "output_router_logits": (lambda value: not value, "router logits are not returned here"),
    "is_causal": (bool, "these models read from left to right alone"),
    "token_type_ids": (lambda x: isinstance(x, Tensor) and not bool(x.any()), "these models know one type of token, 0"),
}
NEAR = 0.8  # how alike a keyword must be to a known one to be taken for a slip of the pen


def refuse_unknown(forward: Callable[..., object], keywords: Mapping[str, object]) -> None:
    """Raise a RefineError for a keyword that `forward` does not name, unless its value asks for nothing; None always does."""
    for name, value in keywords.items():
        if value is None:
            continue
        if name not in ASKS_NOTHING:
            parameters = inspect.signature(forward).parameters.values()
            named = [p.name for p in parameters if p.name != "self" and p.kind is not inspect.Parameter.VAR_KEYWORD]
            known = [*named, *ASKS_NOTHING]
            raise RefineError(f"forward has no argument {name!r}{closest(name, known)}; it takes {', '.join(known)}")
        asks_nothing, why = ASKS_NOTHING[name]
        if not asks_nothing(value):
            shown = f"with the shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise RefineError(f"forward cannot serve {name} {shown}: {why}; leave it out")


def refuse_misspelt(known: Iterable[str], keywords: Mapping[str, object]) -> None:
    """Raise a RefineError for a keyword that is nearly one of `known`. Others pass: they may be for a layer of the model."""
    names = set(known)
    for name in keywords:
        near = difflib.get_close_matches(name, names, n=1, cutoff=NEAR) if name not in names else []
        if near:
            raise RefineError(f"forward has no argument {name!r} (did you mean {near[0]!r}?)")
