"""Any causal model of transformers as a model with states: linear-attention hybrids, Mamba-2 hybrids, and plain attention.

The model stays what it is, parameters, names, `generate`, `save_pretrained`, PEFT and Trainer included; its class is a subclass of its
own that also answers the calls of this package (`lengths`, `snapshot_positions`, `output_states`, `branch`, `step`). None of its code is
repeated here. What a layer keeps decides what can be done:

- *by reference*: keys and values, recurrent and convolution states are taken between the segments of a pass that is cut at the chosen
  positions (`models/keeping.py`).
- *by tokens*: the state of a prefix is the prefix, read again with what follows. Exact for any model, at the price of `reprefill`; it
  is taken, with a warning that names the model, where states are of another kind or do not pass the check made at loading.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.utils import TransformersKwargs

from refine_nsp.errors import RefineError, first_line
from refine_nsp.models.blocks import Branches, FastWeightForCausalLM, FastWeightModel
from refine_nsp.models.by_reference import EXACT_KINDS, RECURRENT_KINDS, kinds_of
from refine_nsp.models.edge import one_input, read
from refine_nsp.models.keeping import ByReference, ByTokens, Keeping, StatesOfPass
from refine_nsp.models.keywords import refuse_misspelt, refuse_unknown
from refine_nsp.models.layer_kernels import decide_at_each_call
from refine_nsp.models.marks import MARKS, is_packed
from refine_nsp.models.outputs import FastWeightModelOutput, as_asked
from refine_nsp.models.padding import Alignment, columns_to_tokens
from refine_nsp.models.plain_calls import argument_names, keeps_its_own, packed_signature, refuse_extra_losses
from refine_nsp.models.state import FastWeightCache, LayerState

HOUSE_ARGUMENTS = ("lengths", "snapshot_positions", "output_states")
OUTPUT_PARTS = ("out_proj", "o_proj", "norm", "o_norm", "dense", "c_proj")  # of a mixer: they neither write nor read its state
EXACT_SINCE = "5.23"  # recurrent layers of earlier releases write into the states they are given
OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < tuple(map(int, EXACT_SINCE.split(".")))
# How far states and hidden states may be off at loading, as shares of their size: a wrong state is off by far more.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-2, torch.bfloat16: 0.15, torch.float16: 0.05}  # float32 may be TF32


# --- the trunk --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class InputStates:
    """`PrefixStates` of a pass of a transformers model: states by the columns of its input."""

    states: StatesOfPass
    columns_to_tokens: Tensor | None  # [B, T] long, on the host; None: identity

    def at(self, positions: Tensor) -> FastWeightCache:
        """As `PrefixStates.at`."""
        tokens = positions = positions.cpu()
        if self.columns_to_tokens is not None:
            tokens = self.columns_to_tokens.gather(1, positions.clamp(min=0)).where(positions >= 0, positions)
        return self.states.at(tokens)


class StatefulTrunk(PreTrainedModel):
    """Mixed into a trunk (the model below the head). See `FastWeightModel.forward` for the calls it answers."""

    layers: nn.ModuleList
    keeping: Keeping
    head_factor: float
    plainly: bool
    mixers: list[Any]
    kernel_names: list[str]  # of other packages, where they can run

    @property
    def cuts_at_positions(self) -> bool:
        """See `protocols.Trunk`."""
        return isinstance(self.keeping, ByReference)

    @property
    def rereads_prefixes(self) -> bool:
        """See `protocols.Trunk`."""
        return isinstance(self.keeping, ByTokens)

    @property
    def label(self) -> str:
        """What messages call the model."""
        return f"{self.config.model_type} ({type(self).__name__})"

    @property
    def kernels(self) -> str:
        """What computes it, and how its states are kept, in words."""
        on_device = f", on a CUDA device {', '.join(self.kernel_names)}" if self.kernel_names else ""
        states = "by reference" if isinstance(self.keeping, ByReference) else "read again from tokens"
        return f"transformers' own{on_device}; states {states}"

    def read(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: FastWeightCache | None = None,
        use_cache: bool | None = None,
        lengths: Tensor | None = None,
        snapshot_positions: Tensor | None = None,
        output_states: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> FastWeightModelOutput:
        """As `FastWeightModel.forward`. The hidden states are scaled so that `lm_head` alone makes logits of them."""
        marks = {name: kwargs.pop(name, None) for name in (*MARKS, "cache_position")}
        refuse_unknown(FastWeightModel.forward, kwargs)
        if output_hidden_states:
            raise RefineError(
                f"{self.label} gives its layers' hidden states only when asked without states; leave out lengths and such"
            )
        x = one_input(input_ids, inputs_embeds)
        out = read(
            self, x, marks, attention_mask, lengths, past_key_values, use_cache, snapshot_positions, output_states, None
        )  # fmt: skip
        return as_asked(out, return_dict, self.config)

    def run_rows(
        self, x: Tensor, aligned: Alignment | None, past: FastWeightCache | None, tokens: Tensor | None, use_cache: bool,
        output_states: bool, output_hidden_states: bool,
    ) -> FastWeightModelOutput:  # fmt: skip
        """See `protocols.Trunk.run_rows`."""
        B, T = x.shape[:2]
        before = None
        if past is not None and past.is_initialized:
            before = past if past.batch_size == B else past.expand(B // past.batch_size)
        if aligned is not None and aligned.order is not None:
            x = aligned.align(x) if x.ndim == 3 else aligned.align(x[..., None])[..., 0]
        ends = (torch.full((B,), T) if aligned is None else aligned.lengths)[:, None] - 1

        wanted = [w for w in (tokens, ends if use_cache else None) if w is not None]
        snapshots = states = None
        if output_states:
            hidden, kept = self.keeping.run_keeping(x, before)
            states = InputStates(kept, columns_to_tokens(aligned, T))
            taken = kept.at(torch.cat(wanted, 1)) if wanted else None
        else:
            hidden, taken = self.keeping.run(x, before, torch.cat(wanted, 1) if wanted else None)
        after = before
        if taken is not None:
            snapshots, after = self._parted(taken, B, tokens, past, use_cache, T)
        if self.head_factor != 1.0:
            hidden = hidden * self.head_factor
        hidden = hidden if aligned is None else aligned.restore(hidden)
        return FastWeightModelOutput(
            last_hidden_state=hidden,
            past_key_values=after,
            snapshots=snapshots,
            states=states,  # type: ignore[arg-type]
        )

    @staticmethod
    def _parted(
        taken: FastWeightCache, n_rows: int, tokens: Tensor | None, given: FastWeightCache | None, use_cache: bool, n_columns: int
    ) -> tuple[FastWeightCache | None, FastWeightCache | None]:
        """Snapshots, and the states after the pass, put into the cache that was `given`; `taken` has both, row by row."""
        P = 0 if tokens is None else tokens.shape[1]
        if not use_cache:
            return taken, given
        final = taken
        snapshots = None
        if P:
            slots = torch.arange(taken.batch_size).view(n_rows, P + 1)
            snapshots, final = taken.index(slots[:, :P].flatten()), taken.index(slots[:, P])
        cache = given if given is not None else FastWeightCache()
        cache._become(FastWeightCache(final.layers, final.lengths, cache.columns + n_columns))
        return snapshots, cache

    def branch(self, cache: FastWeightCache, n: int) -> Branches:
        """Rows that go on token by token from the states of `cache`, n neighbours from each; the cache is only read."""
        return Branches(self, cache, n)  # type: ignore[arg-type]

    # --- the model as it is -------------------------------------------------------------------------------------------
    def plain(self, x: Tensor, **arguments: Any) -> Tensor:
        """Hidden states [B, T, D] of the model's own forward pass."""
        forward = type(self)._refine_plain.forward  # type: ignore[attr-defined]
        return forward(self, **{"input_ids" if x.ndim == 2 else "inputs_embeds": x}, **arguments).last_hidden_state

    @contextmanager
    def as_it_is(self) -> Iterator[None]:
        """Inside, the trunk is transformers' own: what the plain causal model calls."""
        before, self.plainly = self.plainly, True
        try:
            yield
        finally:
            self.plainly = before

    def checkpointed(self, forward: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """forward(*tensors), a segment of a pass. With gradient checkpointing the whole segment is run again in the backward pass:
        transformers' layers, checkpointed one by one, would drop the cache."""
        layers = [m for m in self.modules() if vars(m).get("gradient_checkpointing")] if self.training else []  # type: ignore[attr-defined]
        if not layers:
            return forward(*tensors)

        def unwrapped(*given: Tensor) -> tuple[Tensor, ...]:
            for layer in layers:
                vars(layer)["gradient_checkpointing"] = False
            try:
                return forward(*given)
            finally:
                for layer in layers:
                    vars(layer)["gradient_checkpointing"] = True

        return checkpoint(unwrapped, *tensors, use_reentrant=False) if torch.is_grad_enabled() else unwrapped(*tensors)


# --- classes ----------------------------------------------------------------------------------------------------------
@functools.cache
def trunk_class(plain: Any) -> Any:
    """The class of a trunk, answering the calls of this package too."""

    names = argument_names(plain)

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs |= dict(zip(names, args, strict=False))
        if self.plainly or keeps_its_own(kwargs.get("past_key_values"), kwargs):
            return plain.forward(self, **kwargs)  # type: ignore[attr-defined]
        return self.read(**kwargs)

    forward.__signature__ = packed_signature(plain)  # type: ignore[attr-defined]
    members = {"forward": forward, "config_class": plain.config_class}  # PreTrainedModel derives another from `StatefulTrunk`
    return type(plain.__name__, (StatefulTrunk, plain), _names(plain) | members)


@functools.cache
def causal_class(plain: Any) -> Any:
    """The class of a causal language model, answering the calls of this package too; `save_pretrained` writes the plain model."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        plain.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
        _install(self)

    names = argument_names(plain)
    known = {*names, *TransformersKwargs.__annotations__, *HOUSE_ARGUMENTS, *MARKS, "step"}

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, step: Any = None, **kwargs: Any) -> Any:
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
            return plain.forward(self, **kwargs)  # type: ignore[attr-defined]

    forward.__signature__ = packed_signature(plain)  # type: ignore[attr-defined]

    def load_state_dict(self: Any, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        # `save_pretrained` may write other names than the model's (experts one by one); resuming reads them back by name alone,
        # and would leave what it does not find as it is. transformers converts names only while it loads (the way back, at saving, is a
        # function of its own), and its steps are internal and change from release to release: so a second model is loaded for its names.
        if not strict and state_dict.keys() - self.state_dict().keys():
            state_dict = (
                type(self).from_pretrained(None, config=self.config, state_dict=state_dict, dtype=self.dtype).state_dict()
            )
        return plain.load_state_dict(self, state_dict, strict=strict, assign=assign)  # type: ignore[attr-defined]

    members: dict[str, Any] = {"__init__": __init__, "forward": forward, "load_state_dict": load_state_dict}
    prefix_name = plain.base_model_prefix  # type: ignore[attr-defined]
    if prefix_name != "model":
        members["model"] = property(lambda self: getattr(self, prefix_name))
    return type(plain.__name__, (plain,), _names(plain) | members)


def _names(plain: Any) -> dict[str, Any]:
    return {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__, "_refine_plain": plain}


def class_for(config: Any) -> Any:
    """The class that loads a causal model of `config`. RefineError when transformers has none."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RefineError(
            f"transformers has no causal language model for {config.model_type!r}; expected a model that predicts the next token of a text"
        )
    return causal_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def with_states(model: Any, check_states: bool = True) -> Any:
    """A causal model of transformers, in place: it also answers the calls of this package from now on.

    Args:
        model: a `PreTrainedModel`, as `AutoModelForCausalLM.from_pretrained` returns it; weights, names and config stay as they are.
        check_states: run a few tokens to see that states and head are exact; not needed where only sizes count.

    Raises:
        RefineError: logits that are more than a matrix product of the last hidden state (and a known scale).
    """
    if "_refine_plain" in vars(type(model)):
        return model
    model.__class__ = causal_class(type(model))  # type: ignore[arg-type]
    _install(model)
    if check_states:
        check(model)
    return model


def _install(model: Any) -> None:
    trunk = model.model
    trunk.__class__ = trunk_class(type(trunk))  # type: ignore[arg-type]
    trunk.plainly = False
    trunk.head_factor = head_factor(model.config)
    trunk.kernel_names = decide_at_each_call(trunk)
    kinds = kinds_of(trunk.config)[0]
    by_reference = set(kinds) <= set(EXACT_KINDS) and not (OLD and set(kinds) & set(RECURRENT_KINDS))
    trunk.keeping = ByReference(trunk) if by_reference else ByTokens(trunk)
    trunk.mixers = mark_mixers(trunk)
    by_tokens = isinstance(trunk.keeping, ByReference) and not trunk.keeping.same_by_single_tokens
    for mixer in trunk.mixers:
        mixer.shares_states = by_tokens  # then the few tokens of a rollout are run together


def head_factor(config: Any) -> float:
    """What a model multiplies its logits by (Granite divides; Falcon-H1 and Cohere multiply)."""
    fields = config.get_text_config(decoder=True).to_dict()
    factors = [float(fields.get(name) or 1.0) for name in ("lm_head_multiplier", "logit_scale", "logits_scaling")]
    return factors[0] * factors[1] / factors[2]


def mark_mixers(trunk: nn.Module) -> list[Any]:
    """The modules that write and read states (recurrent ones, or attention where there are no others), each told which of its parts do."""
    keepers = [
        m for m in trunk.modules() if hasattr(m, "layer_idx") and not any(hasattr(s, "layer_idx") for s in list(m.modules())[1:])
    ]
    recurrent = [m for m in keepers if any(isinstance(s, nn.Conv1d) for s in m.modules())]
    mixers = recurrent or [m for m in keepers if any("k_proj" in name or "kv" in name for name, _ in m.named_children())]
    for mixer in mixers:
        parts = dict.fromkeys(name.split(".")[0] for name, _ in mixer.named_parameters())
        mixer.fast_weight_names = tuple(p for p in parts if p not in OUTPUT_PARTS)  # type: ignore[assignment]
    return mixers


# --- the check made at loading ----------------------------------------------------------------------------------------
@torch.no_grad()
def check(model: Any) -> None:
    """States by reference must go on exactly, or tokens take their place; and the head must be a product. By a few tokens."""
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
        trunk.keeping = ByTokens(trunk)
        warnings.warn(
            f"{trunk.label}: its states cannot be handed over exactly ({problem}); every prefix is read again instead (the cost of "
            "schedule=reprefill); estimator=closed_form needs no states",
            stacklevel=3,
        )


def _check_head(model: Any) -> None:
    ids, head = _few_tokens(model, 1, 4), model.get_output_embeddings()
    with model.model.as_it_is():
        logits = type(model)._refine_plain.forward(model, input_ids=ids, use_cache=False).logits
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


def state_problem(trunk: Any) -> str | None:
    """Why states by reference are not exact; None when they are."""
    if not isinstance(trunk.keeping, ByReference):
        unknown = sorted(set(kinds_of(trunk.config)[0]) - set(EXACT_KINDS))
        if not unknown:
            return f"its recurrent layers change states in place in transformers {transformers.__version__}, from {EXACT_SINCE} on not"
        return f"its layers keep {', '.join(unknown)}, of which {', '.join(EXACT_KINDS)} are known"
    ids = _few_tokens(trunk, 2, 12)
    whole = trunk.plain(ids, use_cache=False)
    try:
        worst = max(_hidden_error(trunk.keeping, ids, whole), _state_error(trunk.keeping, ids))
        if _forgets(trunk.keeping, ids):
            return "its layers do not go on from their recurrent state where several tokens follow"
    except torch.OutOfMemoryError:
        raise  # says nothing of the states
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # foreign code's; the warning says which
        return f"a pass with a cache fails: {type(error).__name__}: {first_line(error)}"
    return None if worst <= TOLERANCE[whole.dtype] else f"a pass that goes on from a state differs by {worst:.2g}"


def _hidden_error(keeping: ByReference, ids: Tensor, whole: Tensor) -> float:
    """How far rows of different lengths go on from where the whole pass [2, T, D] went, as a share of its spread."""
    _, states = keeping.run(ids, None, torch.tensor([[2], [6]]))
    x, expected = (torch.stack([t[0, 3:7], t[1, 7:11]]) for t in (ids, whole))
    h, _ = keeping.run(x, states, None)
    return float((h - expected).abs().mean() / whole.std().clamp(min=1e-12))


def _state_error(keeping: ByReference, ids: Tensor) -> float:
    """How far states differ after a pass in pieces, one of a single token where that is its own code: the worst layer's, as a share of
    its size, however little the layer counts in the output."""
    _, direct = keeping.run(ids, None, torch.full((2, 1), ids.shape[1] - 1))
    states = None
    for piece in ids.split([4, 1, ids.shape[1] - 5] if keeping.same_by_single_tokens else [4, ids.shape[1] - 4], 1):
        _, states = keeping.run(piece, states, torch.full((2, 1), piece.shape[1] - 1))
    assert states is not None and direct is not None
    pairs = [(x, states.layers[i][name]) for i, layer in enumerate(direct.layers) for name, x in layer.items()]
    return max((float((a - b).abs().mean() / a.abs().mean().clamp(min=1e-12)) for a, b in pairs), default=0.0)


@torch.enable_grad()
def _forgets(keeping: ByReference, ids: Tensor) -> bool:
    """Whether a recurrent layer's state does not come from the one before where several tokens follow, as in Jamba.

    Asked of the graph that the layer leaves. Values would not tell: what is left of a state after a few tokens may be below rounding.
    """
    _, states = keeping.run(ids[:, :4], None, torch.full((2, 1), 3))
    assert states is not None
    before: list[LayerState] = [{name: x.detach().requires_grad_() for name, x in layer.items()} for layer in states.layers]
    _, states = keeping.run(ids[:, 4:6], FastWeightCache(before, states.lengths, states.columns), torch.full((2, 1), 1))
    assert states is not None
    pairs = [(x, states.layers[i][name]) for i, layer in enumerate(before) for name, x in layer.items() if "recurrent" in name]
    found = [torch.autograd.grad(after.sum(), x, retain_graph=True, allow_unused=True)[0] for x, after in pairs]
    return bool(found) and (any(g is None for g in found) or not any(g.any() for g in found if g is not None))


def _few_tokens(module: Any, rows: int, count: int) -> Tensor:
    embeddings = module.get_input_embeddings().weight
    ids = 1 + torch.arange(rows * count).view(rows, count) * 7
    return (ids % embeddings.shape[0]).to(embeddings.device)


__all__ = ["ByReference", "ByTokens", "class_for", "with_states"]
