"""Let a model of transformers that is attention alone read with a sliding window it was not made with, by the masks its layers take.

What it then predicts at token t, token t alone has seen: in every layer it attends to the last W tokens, itself among them. That is what
the model becomes when its layers get a window (DESIGN, section 9: attention made a LaCT, whose memory is empty).
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from refine_nsp.errors import RefineError, first_line
from refine_nsp.models.borrowed.check import FOREIGN_ERRORS, TOLERANCE
from refine_nsp.models.borrowed.layer_cache import kinds_of
from refine_nsp.models.borrowed.trunk import StatefulTrunk
from refine_nsp.models.protocols import Trunk

MASKED_KINDS = ("full_attention", "sliding_attention")
TAKE_MASKS = ("sdpa", "eager")  # implementations of attention that take a mask of every pair of tokens


def attends_only(trunk: Trunk) -> TypeGuard[StatefulTrunk]:
    """Tell whether every layer of a trunk is attention, which a mask can put a window on."""
    return isinstance(trunk, StatefulTrunk) and set(kinds_of(trunk.config)[0]) <= set(MASKED_KINDS)


def sees_tokens(config: PreTrainedConfig) -> int | None:
    """Count the tokens that the widest layer of an attention model sees; None where it sees all."""
    windows = kinds_of(config)[1]
    return None if not windows or None in windows else max(w for w in windows if w is not None)


def read_in_window(trunk: Trunk, ids: Tensor, W: int) -> Tensor:
    """Return the final-norm output [B, T, D] of tokens [B, T], each layer attending to the last W tokens at most.

    Raises:
        RefineError: the model's layers are no attention, or it takes no mask of pairs.
    """
    if not attends_only(trunk):
        raise RefineError(f"{trunk.label} is not attention alone, on which masks can put a window")
    implementation = trunk.config._attn_implementation
    if implementation not in TAKE_MASKS:
        raise RefineError(
            f"{trunk.label} attends by {implementation}, which takes no mask for a window; load it with attn_implementation "
            f"{' or '.join(TAKE_MASKS)}"
        )
    widths = {kind: W if own is None else min(W, own) for kind, own in zip(*kinds_of(trunk.config), strict=True)}
    masks = {kind: _band(ids, width, trunk.dtype if implementation == "eager" else None) for kind, width in widths.items()}
    mask = masks if len(masks) > 1 else next(iter(masks.values()))
    hidden = trunk.plain(ids, attention_mask=mask, use_cache=False)
    return hidden if trunk.head_factor == 1.0 else hidden * trunk.head_factor


def _band(ids: Tensor, W: int, dtype: torch.dtype | None) -> Tensor:
    """Mark which tokens see which, [1, 1, T, T]: bool, or with a dtype what is added to scores of attention."""
    places = torch.arange(ids.shape[1], device=ids.device)
    back = places[:, None] - places
    seen = ((back >= 0) & (back < W))[None, None]
    return seen if dtype is None else torch.zeros(seen.shape, dtype=dtype, device=ids.device).masked_fill(~seen, -torch.inf)


@torch.no_grad()
def window_problem(trunk: Trunk) -> str | None:
    """Say why a trunk cannot be read in a window by masks; None where a few tokens show that it can."""
    if not attends_only(trunk):
        return f"{trunk.label} is not attention alone"
    vocabulary = trunk.get_input_embeddings().weight
    assert isinstance(vocabulary, Tensor)
    ids = ((1 + torch.arange(12)[None] * 7) % len(vocabulary)).to(vocabulary.device)
    try:
        whole, wide = trunk.plain(ids, use_cache=False), read_in_window(trunk, ids, ids.shape[1])
    except torch.OutOfMemoryError:
        raise  # says nothing of the masks
    except RefineError as error:
        return str(error)
    except FOREIGN_ERRORS as error:  # the message says which
        return f"a pass with a mask fails: {type(error).__name__}: {first_line(error)}"
    off = float((whole * trunk.head_factor - wide).abs().mean() / wide.std().clamp(min=1e-12))
    return None if off <= TOLERANCE[trunk.dtype] else f"with a mask that hides nothing it differs by {off:.2g}"
