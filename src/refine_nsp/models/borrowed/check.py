"""Check a model of transformers when it is loaded: a few tokens show whether its states and its head are exact.

The equalities are those of `models/checks`, asked of states by reference instead of transformers' own cache.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import replace

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from refine_nsp.errors import RefineError, first_line
from refine_nsp.models.borrowed.by_reference import ByReference
from refine_nsp.models.borrowed.by_tokens import ByTokens
from refine_nsp.models.borrowed.layer_cache import EXACT_KINDS, RECURRENT_KINDS, kinds_of
from refine_nsp.models.borrowed.trunk import StatefulCausalModel, StatefulTrunk
from refine_nsp.models.checks.equalities import (
    Broken,
    NotApplicable,
    Probe,
    continuation_behind_pads,
    recurrence,
    states_after_pieces,
)
from refine_nsp.models.checks.precision import average
from refine_nsp.models.checks.ways import Ways, leaves_of, states_of
from refine_nsp.models.state import FastWeightCache

CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # of Gemma, RecurrentGemma, xLSTM
EXACT_SINCE = "5.23"  # recurrent layers of earlier releases write into the states they are given
OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < tuple(map(int, EXACT_SINCE.split(".")))
# What a borrowed model's own code may raise on calls that it was not made for.
FOREIGN_ERRORS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
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

    A RefineError where logits are more than a matrix product of the last hidden state (and a known scale).
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
    elif any(model.config.get_text_config(decoder=True).to_dict().get(name) for name in CAPS):
        problem = "it caps its logits"  # which small ones, as an untrained model's, would not show
    elif error > TOLERANCE[logits.dtype] / 10:
        problem = f"its logits differ from that by {error:.2g} of their spread"
    if problem is not None:
        expected = "the losses here take logits as lm_head.weight times the last hidden state"
        raise RefineError(f"{model.model.label} is not supported: {expected}, but {problem}")


def state_problem(trunk: StatefulTrunk) -> str | None:
    """Say why states by reference are not exact; None when they are."""
    method = trunk.state_method
    if not isinstance(method, ByReference):
        unknown = sorted(set(kinds_of(trunk.config)[0]) - set(EXACT_KINDS))
        if not unknown:
            return f"its recurrent layers change states in place in transformers {transformers.__version__}, from {EXACT_SINCE} on not"
        return f"its layers keep {', '.join(unknown)}, of which {', '.join(EXACT_KINDS)} are known"
    ids = _few_tokens(trunk, 2, 12)
    probe = Probe(trunk, ways_by_reference(method), ids, cut=4, single=1, same_by_single_tokens=method.same_by_single_tokens)
    try:
        pairs = [continuation_behind_pads(replace(probe, cut=7)), states_after_pieces(probe)]
        with suppress(NotApplicable):  # no layer keeps a recurrent state
            recurrence(probe)
    except torch.OutOfMemoryError:
        raise  # says nothing of the states
    except Broken as said:
        return str(said)
    except FOREIGN_ERRORS as error:  # the warning says which
        return f"a pass with a cache fails: {type(error).__name__}: {first_line(error)}"
    worst = max(average(*pair) for pair in pairs)
    return None if worst <= TOLERANCE[trunk.dtype] else f"a pass that goes on from a state differs by {worst:.2g}"


def ways_by_reference(method: ByReference) -> Ways:
    """Say how a trunk's hidden states are had with states by reference; pads of a first pass stand on the left, as `Ways` has them."""

    def run(module: nn.Module, ids: Tensor) -> Tensor:
        return method.trunk.plain(ids, use_cache=False)

    def follow(module: nn.Module, ids: Tensor, cache: object, seen: int, mask: Tensor | None) -> tuple[Tensor, object]:
        assert cache is None or isinstance(cache, FastWeightCache)
        B, T = ids.shape
        ends = torch.full((B, 1), T - 1)
        if cache is None and mask is not None:
            ends = mask.sum(1, keepdim=True).cpu() - 1
            columns = (torch.arange(T) + T - 1 - ends).clamp(max=T - 1)  # real tokens to the left
            ids = ids.gather(1, columns.to(ids.device, non_blocking=True))
        return method.run_and_take(ids, cache, ends)

    return Ways(run=run, follow=follow, states=states_of, leaves=leaves_of)


def _few_tokens(module: PreTrainedModel, rows: int, count: int) -> Tensor:
    embeddings = module.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    ids = 1 + torch.arange(rows * count).view(rows, count) * 7
    return (ids % embeddings.shape[0]).to(embeddings.device)
