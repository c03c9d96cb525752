"""Check a model of transformers when it is loaded: a few tokens show whether its states and its head are exact."""

from __future__ import annotations

import warnings

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from refine_nsp.errors import RefineError, first_line
from refine_nsp.models.borrowed.by_reference import ByReference
from refine_nsp.models.borrowed.by_tokens import ByTokens
from refine_nsp.models.borrowed.layer_cache import EXACT_KINDS, RECURRENT_KINDS, kinds_of
from refine_nsp.models.borrowed.trunk import StatefulCausalModel, StatefulTrunk
from refine_nsp.models.state import FastWeightCache, LayerState

EXACT_SINCE = "5.23"  # recurrent layers of earlier releases write into the states they are given
OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < tuple(map(int, EXACT_SINCE.split(".")))
# How far states and hidden states may be off at loading, as shares of their size: a wrong state is off by far more.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-2, torch.bfloat16: 0.15, torch.float16: 0.05}  # float32 may be TF32


def state_method(trunk: StatefulTrunk) -> ByReference | ByTokens:
    """Choose how a trunk gives states, by what its layers keep and by the release of transformers."""
    kinds = set(kinds_of(trunk.config)[0])
    exact = kinds <= set(EXACT_KINDS) and not (OLD and kinds & set(RECURRENT_KINDS))
    return ByReference(trunk) if exact else ByTokens(trunk)


@torch.no_grad()
def check(model: StatefulCausalModel) -> None:
    """Try states by reference and the head on a few tokens; where states are not exact, warn and let tokens take their place.

    Raises:
        RefineError: logits that are more than a matrix product of the last hidden state (and a known scale).
    """
    trunk, training = model.model, model.training
    if any(p.is_meta for p in model.parameters()):
        return  # weights that are not here cannot be tried
    model.eval()
    try:
        _check_head(model)
        problem = state_problem(trunk)
    finally:
        model.train(training)
    if problem is not None:
        trunk.state_method = ByTokens(trunk)
        warnings.warn(
            f"{trunk.label}: its states cannot be handed over exactly ({problem}); every prefix is read again instead (the cost of "
            "schedule=reprefill); estimator=closed_form needs no states",
            stacklevel=3,
        )


def _check_head(model: StatefulCausalModel) -> None:
    ids, head = _few_tokens(model, 1, 4), model.get_output_embeddings()
    with model.model.as_it_is():
        logits = model._refine_plain.forward(model, input_ids=ids, use_cache=False).logits
    ours = head(model.model(ids, use_cache=False).last_hidden_state)
    error = float((ours - logits).abs().mean() / logits.std().clamp(min=1e-12))
    problem = None
    if "bias" in dict(head.named_parameters()):
        problem = "its head has a bias"
    elif model.config.get_text_config(decoder=True).to_dict().get("final_logit_softcapping"):
        problem = "it caps its logits"  # which small ones, as an untrained model's, would not show
    elif error > TOLERANCE[logits.dtype] / 10:
        problem = f"its logits differ from that by {error:.2g} of their spread"
    if problem is not None:
        raise RefineError(
            f"{model.model.label} is not supported: the losses here take logits as lm_head.weight times the last hidden state, but "
            f"{problem}"
        )


def state_problem(trunk: StatefulTrunk) -> str | None:
    """Say why states by reference are not exact; None when they are."""
    method = trunk.state_method
    if not isinstance(method, ByReference):
        unknown = sorted(set(kinds_of(trunk.config)[0]) - set(EXACT_KINDS))
        if not unknown:
            return f"its recurrent layers change states in place in transformers {transformers.__version__}, from {EXACT_SINCE} on not"
        return f"its layers keep {', '.join(unknown)}, of which {', '.join(EXACT_KINDS)} are known"
    ids = _few_tokens(trunk, 2, 12)
    whole = trunk.plain(ids, use_cache=False)
    try:
        worst = max(_hidden_error(method, ids, whole), _state_error(method, ids))
        if _forgets(method, ids):
            return "its layers do not go on from their recurrent state where several tokens follow"
    except torch.OutOfMemoryError:
        raise  # says nothing of the states
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # foreign code's; the warning says which
        return f"a pass with a cache fails: {type(error).__name__}: {first_line(error)}"
    return None if worst <= TOLERANCE[whole.dtype] else f"a pass that goes on from a state differs by {worst:.2g}"


def _hidden_error(method: ByReference, ids: Tensor, whole: Tensor) -> float:
    """Measure how far rows of different lengths, continued from states, are from the whole pass [2, T, D], as a share of its spread."""
    _, states = method.run_and_take(ids, None, torch.tensor([[2], [6]]))
    x, expected = (torch.stack([t[0, 3:7], t[1, 7:11]]) for t in (ids, whole))
    return float((method.run(x, states) - expected).abs().mean() / whole.std().clamp(min=1e-12))


def _state_error(method: ByReference, ids: Tensor) -> float:
    """Measure how far states differ after a pass in pieces, one of them a single token where that is code of its own.

    Returns the worst layer's difference as a share of its state's size, however little the layer counts in the output.
    """
    _, direct = method.run_and_take(ids, None, torch.full((2, 1), ids.shape[1] - 1))
    states = None
    for piece in ids.split([4, 1, ids.shape[1] - 5] if method.same_by_single_tokens else [4, ids.shape[1] - 4], 1):
        _, states = method.run_and_take(piece, states, torch.full((2, 1), piece.shape[1] - 1))
    assert states is not None
    pairs = [(x, states.layers[i][name]) for i, layer in enumerate(direct.layers) for name, x in layer.items()]
    return max((float((a - b).abs().mean() / a.abs().mean().clamp(min=1e-12)) for a, b in pairs), default=0.0)


@torch.enable_grad()
def _forgets(method: ByReference, ids: Tensor) -> bool:
    """Tell whether a recurrent layer's state does not come from the one before where several tokens follow, as in Jamba.

    The graph that the layer leaves is asked. Values would not tell: what is left of a state after a few tokens may be below rounding.
    """
    _, states = method.run_and_take(ids[:, :4], None, torch.full((2, 1), 3))
    before: list[LayerState] = [{name: x.detach().requires_grad_() for name, x in layer.items()} for layer in states.layers]
    _, states = method.run_and_take(ids[:, 4:6], FastWeightCache(before, states.lengths, states.columns), torch.full((2, 1), 1))
    pairs = [(x, states.layers[i][name]) for i, layer in enumerate(before) for name, x in layer.items() if "recurrent" in name]
    found = [torch.autograd.grad(after.sum(), x, retain_graph=True, allow_unused=True)[0] for x, after in pairs]
    return bool(found) and (any(g is None for g in found) or not any(g.any() for g in found if g is not None))


def _few_tokens(module: PreTrainedModel, rows: int, count: int) -> Tensor:
    embeddings = module.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    ids = 1 + torch.arange(rows * count).view(rows, count) * 7
    return (ids % embeddings.shape[0]).to(embeddings.device)
