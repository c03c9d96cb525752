"""Any causal model of transformers as a model with states: linear-attention hybrids, Mamba-2 hybrids, and plain attention.

The model stays what it is, parameters, names, `generate`, `save_pretrained`, PEFT and Trainer included; its class is a subclass of its
own that also answers the calls of this package (`lengths`, `snapshot_positions`, `output_states`, `branch`, `step`). None of its code is
repeated here. What a layer keeps decides what can be done:

- *by reference*: keys and values, recurrent and convolution states are taken between the segments of a pass that is cut at the chosen
  positions. Tokens are real up to a row's length and nobody asks for a state behind it, so pads need no masks: causality keeps
  them from what stands before.
- *by tokens*: the state of a prefix is the prefix, read again with what follows. Exact for any model, at the price of `reprefill`; it
  is taken, with a warning that names the model, where states are of another kind or do not pass the check made at loading.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.cache_utils import Cache

from refine_nsp.errors import RefineError, first_line
from refine_nsp.models.blocks import Branches, FastWeightForCausalLM, FastWeightModelOutput
from refine_nsp.models.by_reference import EXACT_KINDS, RECURRENT_KINDS, ReferenceCache, kinds_of, nothing_yet, prefix, trimmed
from refine_nsp.models.padding import alignment, columns_to_tokens, snapshot_tokens
from refine_nsp.models.state import FastWeightCache, LayerState

SEGMENT_TOKENS = 64  # states that are asked for after a pass are kept every so many tokens, or ...
SEGMENTS = 16  # ... so many times, whichever is rarer: segments repeat a layer's keys, and tails behind them are run again
HOUSE_ARGUMENTS = ("lengths", "snapshot_positions", "output_states")
OUTPUT_PARTS = ("out_proj", "o_proj", "norm", "o_norm", "dense", "c_proj")  # of a mixer: they neither write nor read its state
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}  # of hidden states, by their spread


# --- where states come from -------------------------------------------------------------------------------------------
class StatesOfPass(Protocol):
    """What is kept of a pass, to take states from when its outputs are known."""

    def at(self, tokens: Tensor) -> FastWeightCache:
        """States after `tokens` [B, P] long, on the host (-1: before the first), as B*P rows, row-major."""
        ...


class Keeping(Protocol):
    """How the states of a trunk are kept. x: ids [B, T] or embeddings [B, T, D]; past: states of B rows, or None."""

    def run(
        self, x: Tensor, past: FastWeightCache | None, wanted: Tensor | None
    ) -> tuple[Tensor, FastWeightCache | None]:
        """Hidden states [B, T, D], and the states after tokens `wanted` [B, P] long, on the host (-1: before the first), B*P rows."""
        ...

    def run_keeping(self, x: Tensor, past: FastWeightCache | None) -> tuple[Tensor, StatesOfPass]:
        """Hidden states [B, T, D], and what states at any token can be taken from."""
        ...


class ByReference:
    """States are taken where the pass is cut, differentiable, and go on from there."""

    def __init__(self, trunk: Any) -> None:
        self.trunk = trunk
        kinds, self.windows = kinds_of(trunk.config)
        self.recurs = any(kind in RECURRENT_KINDS for kind in kinds)
        parameters = inspect.signature(trunk.forward).parameters
        self.cache_name = "past_key_values" if "past_key_values" in parameters else "cache_params"
        self.takes_positions = "position_ids" in parameters

    def run(
        self, x: Tensor, past: FastWeightCache | None, wanted: Tensor | None
    ) -> tuple[Tensor, FastWeightCache | None]:
        if wanted is None and past is None:
            return self.trunk.plain(x, use_cache=False), None
        tokens = [] if wanted is None else wanted.unique().tolist()
        hidden, taken = [], Taken(self, past, wanted)
        for start, end in pairwise([0, *self.cuts(tokens, x.shape[1]), x.shape[1]]):
            h, after = self.segment(x[:, start:end], taken.last)
            hidden.append(h)
            taken.take([t for t in tokens if start <= t < end], start, end, after)
        return torch.cat(hidden, 1) if len(hidden) > 1 else hidden[0], taken.all_rows() if wanted is not None else None

    def run_keeping(self, x: Tensor, past: FastWeightCache | None) -> tuple[Tensor, StatesOfPass]:
        T = x.shape[1]
        step = max(SEGMENT_TOKENS, math.ceil(T / SEGMENTS)) if self.recurs else T
        hidden: list[Tensor] = []
        kept: list[FastWeightCache] = [] if past is None else [past]
        for start in range(0, T, step):
            h, after = self.segment(x[:, start : start + step], kept[-1] if kept else None)
            hidden.append(h)
            if not kept:
                kept.append(FastWeightCache(nothing_yet(after.layers), torch.zeros(len(x), dtype=torch.long)))
            kept.append(after)
        states: StatesOfPass = Tails(self, x, kept[:-1], step) if self.recurs else Slices(self, kept[0], kept[-1], T)
        return torch.cat(hidden, 1) if len(hidden) > 1 else hidden[0], states

    def cuts(self, tokens: Sequence[int], n_tokens: int) -> list[int]:
        """Where a pass is cut for states after `tokens`: nowhere if keys and values are all there is, for a prefix' are a slice."""
        return [t + 1 for t in tokens if 0 <= t < n_tokens - 1] if self.recurs else []

    def segment(self, x: Tensor, past: FastWeightCache | None) -> tuple[Tensor, FastWeightCache]:
        """A pass on from `past`, uncut; its windows are whole, so that slices can be taken of them."""
        B, T = x.shape[:2]
        lengths = torch.zeros(B, dtype=torch.long) if past is None or past.lengths is None else past.lengths
        columns = int(lengths.max())
        layers = [] if past is None or columns == 0 else prefix(trimmed(past.layers, columns), self.windows, 0)
        arguments: dict[str, Any] = {"use_cache": True}
        if self.takes_positions:
            arguments["position_ids"] = (lengths[:, None] + torch.arange(T)).to(x.device)
        if columns > int(lengths.min()):
            real = torch.arange(columns + T) >= columns - lengths[:, None]
            arguments["attention_mask"] = real.long().to(x.device)
        names: list[list[str]] = []

        def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = iter(tensors)
            view = ReferenceCache(self.trunk.config, [{name: next(given) for name in layer} for layer in layers], columns)
            h = self.trunk.plain(x, **arguments, **{self.cache_name: view})
            after = view.states()
            names[:] = [list(layer) for layer in after]
            return h, *(tensor for layer in after for tensor in layer.values())

        hidden, *tensors = self.trunk.checkpointed(forward, [tensor for layer in layers for tensor in layer.values()])
        given = iter(tensors)
        after = [{name: next(given) for name in layer} for layer in names]
        return hidden, FastWeightCache(after, lengths + T, columns + T)


class Taken:
    """The states a pass takes on its way: parts by position, in the end one row for each that was wanted."""

    def __init__(self, keeping: ByReference, past: FastWeightCache | None, wanted: Tensor | None) -> None:
        self.keeping, self.past, self.wanted = keeping, past, wanted
        self.last = past  # where the pass is
        self.parts: list[FastWeightCache] = []
        self.slots: list[Tensor] = []

    def take(self, tokens: Sequence[int], start: int, end: int, after: FastWeightCache) -> None:
        """States after `tokens` of the segment start..end, which the pass left with the states `after`."""
        if self.last is None or not self.last.is_initialized:
            self.last = FastWeightCache(nothing_yet(after.layers), torch.zeros(after.batch_size, dtype=torch.long))
        if start == 0 and self.wanted is not None and bool((self.wanted < 0).any()):
            self._add(-1, self.last)
        for t in tokens:
            layers = prefix(after.layers, self.keeping.windows, end - 1 - t)
            assert after.lengths is not None
            self._add(t, FastWeightCache(layers, after.lengths - (end - 1 - t), after.columns - (end - 1 - t)))
        self.last = after

    def _add(self, token: int, states: FastWeightCache) -> None:
        assert self.wanted is not None
        slots = (self.wanted == token).flatten().nonzero()[:, 0]
        rows = slots // self.wanted.shape[1]
        self.parts.append(states if torch.equal(rows, torch.arange(states.batch_size)) else states.index(rows))
        self.slots.append(slots)

    def all_rows(self) -> FastWeightCache:
        """B*P rows, row-major, without the columns of keys that none of them has."""
        if len(self.parts) == 1:
            states = self.parts[0]
        else:
            states = FastWeightCache.concatenate(self.parts).index(torch.cat(self.slots).argsort())
        assert states.lengths is not None
        columns = int(states.lengths.max()) if len(states.lengths) else 0
        return FastWeightCache(trimmed(states.layers, columns) if columns else states.layers, states.lengths, columns)


@dataclass(frozen=True)
class Slices:
    """Of a model that keeps keys and values only: a prefix' are the first of the pass'. before, after: the pass' states."""

    keeping: ByReference
    before: FastWeightCache
    after: FastWeightCache
    n_tokens: int

    def at(self, tokens: Tensor) -> FastWeightCache:
        taken = Taken(self.keeping, self.before, tokens)
        taken.take([t for t in tokens.unique().tolist() if t >= 0], 0, self.n_tokens, self.after)
        return taken.all_rows()


@dataclass(frozen=True)
class Tails:
    """States every `step` tokens (the first before any), from which the few tokens up to a position are run again, all in one batch."""

    keeping: ByReference
    x: Tensor
    kept: list[FastWeightCache]
    step: int

    def at(self, tokens: Tensor) -> FastWeightCache:
        counts = (tokens + 1).flatten()  # [B*P] tokens of each prefix
        of_row = torch.arange(len(self.x)).repeat_interleave(tokens.shape[1])
        kept = (counts // self.step).clamp(max=len(self.kept) - 1)
        first, rest = kept * self.step, counts - kept * self.step
        used = kept.unique().tolist()
        slots = [(kept == i).nonzero()[:, 0] for i in used]
        parts = [self.kept[i].index(of_row[slot]) for i, slot in zip(used, slots, strict=True)]
        start = FastWeightCache.concatenate(parts).index(torch.cat(slots).argsort())
        width = int(rest.max()) if len(rest) else 0
        if width == 0:
            return start
        columns = (first[:, None] + torch.arange(width)).clamp(max=self.x.shape[1] - 1).to(self.x.device)
        _, states = self.keeping.run(self.x[of_row.to(self.x.device)[:, None], columns], start, rest[:, None] - 1)
        assert states is not None
        return states


class ByTokens:
    """The state of a prefix is its tokens, newest last: what follows is read together with them."""

    def __init__(self, trunk: Any) -> None:
        self.trunk = trunk

    def run(
        self, x: Tensor, past: FastWeightCache | None, wanted: Tensor | None
    ) -> tuple[Tensor, FastWeightCache | None]:
        hidden, states = self.run_keeping(x, past)
        return hidden, states.at(wanted) if wanted is not None else None

    def run_keeping(self, x: Tensor, past: FastWeightCache | None) -> tuple[Tensor, Reread]:
        if x.ndim == 3:
            raise RefineError(f"inputs_embeds cannot be read again, which is how states of {self.trunk.label} are kept; pass input_ids")
        B, T = x.shape
        lengths = torch.zeros(B, dtype=torch.long) if past is None or past.lengths is None else past.lengths
        columns = int(lengths.max())
        if past is None or columns == 0:
            return self.trunk.plain(x, use_cache=False), Reread(x, lengths, 0)
        whole = torch.cat([past.layers[0]["tokens"][:, -columns:], x], 1)
        # Behind their holes the rows begin at the left, where no mask is needed.
        shift = (torch.arange(columns + T) + (columns - lengths)[:, None]).clamp(max=columns + T - 1)
        hidden = self.trunk.plain(whole.gather(1, shift.to(x.device)), use_cache=False)
        new = (lengths[:, None] + torch.arange(T)).to(x.device)
        return hidden.gather(1, new[..., None].expand(-1, -1, hidden.shape[-1])), Reread(whole, lengths, columns)


@dataclass(frozen=True)
class Reread:
    """Tokens [B, columns + T] of the past and of a pass; lengths: [B] those of the past, whose hole is at the start."""

    tokens: Tensor
    lengths: Tensor
    columns: int

    def at(self, tokens: Tensor) -> FastWeightCache:
        lengths = (self.lengths[:, None] + tokens + 1).flatten()
        width = int(lengths.max()) if len(lengths) else 0
        ends = (self.columns + tokens + 1).flatten()
        columns = (ends[:, None] - width + torch.arange(width)).clamp(min=0).to(self.tokens.device)
        rows = torch.arange(len(self.tokens), device=self.tokens.device).repeat_interleave(tokens.shape[1])
        state: LayerState = {"tokens": self.tokens[rows[:, None], columns]}
        return FastWeightCache([state], lengths, width)


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


class StatefulTrunk:
    """Mixed into a trunk (the model below the head). See `FastWeightModel.forward` for the calls it answers."""

    config: Any
    training: bool
    keeping: Keeping
    head_factor: float
    plainly: bool
    mixers: list[Any]

    @property
    def label(self) -> str:
        """What messages call the model."""
        return f"{self.config.model_type} ({type(self).__name__})"

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
        **ignored: Any,
    ) -> FastWeightModelOutput:
        """As `FastWeightModel.forward`. The hidden states are scaled so that `lm_head` alone makes logits of them."""
        if (input_ids is None) == (inputs_embeds is None):
            raise RefineError("pass either input_ids or inputs_embeds")
        x = input_ids if input_ids is not None else inputs_embeds
        assert x is not None
        B, T = x.shape[:2]
        use_cache = use_cache if use_cache is not None else (self.config.use_cache and not self.training)
        aligned = alignment(attention_mask, lengths, T)
        tokens = snapshot_tokens(snapshot_positions, aligned, B, T)
        past = self._past(past_key_values, B, bool(use_cache))
        if aligned is not None and aligned.order is not None:
            x = aligned.align(x) if x.ndim == 3 else aligned.align(x[..., None])[..., 0]
        ends = (torch.full((B,), T) if aligned is None else aligned.lengths)[:, None] - 1

        wanted = [w for w in (tokens, ends if use_cache else None) if w is not None]
        snapshots = states = None
        if output_states:
            hidden, kept = self.keeping.run_keeping(x, past)
            states = InputStates(kept, columns_to_tokens(aligned, T))
            taken = kept.at(torch.cat(wanted, 1)) if wanted else None
        else:
            hidden, taken = self.keeping.run(x, past, torch.cat(wanted, 1) if wanted else None)
        if taken is not None:
            snapshots, past = self._parted(taken, B, tokens, past_key_values, bool(use_cache), T)
        if self.head_factor != 1.0:
            hidden = hidden * self.head_factor
        hidden = hidden if aligned is None else aligned.restore(hidden)
        return FastWeightModelOutput(
            last_hidden_state=hidden, past_key_values=past, snapshots=snapshots, states=states  # type: ignore[arg-type]
        )

    def _past(self, past: FastWeightCache | None, n_rows: int, use_cache: bool) -> FastWeightCache | None:
        """States to go on from, of `n_rows` rows; None: none yet."""
        if past is None or not past.is_initialized:
            return None
        if n_rows % past.batch_size or (use_cache and past.batch_size != n_rows):
            raise RefineError(
                f"past_key_values has {past.batch_size} rows but the input has {n_rows}; use cache.expand(N) to repeat rows, or "
                "use_cache=False to go on from each with a whole number of rows"
            )
        return past if past.batch_size == n_rows else past.expand(n_rows // past.batch_size)

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
        layers = [m for m in self.modules() if vars(m).get("gradient_checkpointing")]  # type: ignore[attr-defined]
        if not (layers and self.training):
            return forward(*tensors)

        def unwrapped(*given: Tensor) -> tuple[Tensor, ...]:
            for layer in layers:
                layer.gradient_checkpointing = False
            try:
                return forward(*given)
            finally:
                for layer in layers:
                    layer.gradient_checkpointing = True

        return checkpoint(unwrapped, *tensors, use_reentrant=False) if torch.is_grad_enabled() else unwrapped(*tensors)


# --- classes ----------------------------------------------------------------------------------------------------------
@functools.cache
def trunk_class(plain: type) -> type:
    """The class of a trunk, answering the calls of this package too."""

    @functools.wraps(plain.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        past = kwargs.get("past_key_values")
        if self.plainly or (isinstance(past, Cache) and not isinstance(past, FastWeightCache)):
            return plain.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        return self.read(*args, **kwargs)

    return type(plain.__name__, (StatefulTrunk, plain), _names(plain) | {"forward": forward})


@functools.cache
def causal_class(plain: type) -> type:
    """The class of a causal language model, answering the calls of this package too; `save_pretrained` writes the plain model."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        plain.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
        _install(self)

    @functools.wraps(plain.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, step: Any = None, **kwargs: Any) -> Any:
        if step is not None:
            return step(self)
        asked = any(kwargs.get(name) is not None and kwargs.get(name) is not False for name in HOUSE_ARGUMENTS)
        if asked or isinstance(kwargs.get("past_key_values"), FastWeightCache):
            return FastWeightForCausalLM.forward(self, *args, **kwargs)
        with self.model.as_it_is():
            return plain.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    def load_state_dict(self: Any, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        # `save_pretrained` may write other names than the model's (experts one by one); resuming reads them back by name alone,
        # and would leave what it does not find as it is.
        if not strict and state_dict.keys() - self.state_dict().keys():
            state_dict = type(self).from_pretrained(None, config=self.config, state_dict=state_dict, dtype=self.dtype).state_dict()
        return plain.load_state_dict(self, state_dict, strict=strict, assign=assign)  # type: ignore[attr-defined]

    members: dict[str, Any] = {"__init__": __init__, "forward": forward, "load_state_dict": load_state_dict}
    prefix_name = plain.base_model_prefix  # type: ignore[attr-defined]
    if prefix_name != "model":
        members["model"] = property(lambda self: getattr(self, prefix_name))
    return type(plain.__name__, (plain,), _names(plain) | members)


def _names(plain: type) -> dict[str, Any]:
    return {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__, "_refine_plain": plain}


def class_for(config: Any) -> Any:
    """The class that loads a causal model of `config`. RefineError when transformers has none."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RefineError(
            f"transformers has no causal language model for {config.model_type!r}; expected a model that predicts the next token of a text"
        )
    return causal_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def with_states(model: PreTrainedModel) -> Any:
    """A causal model of transformers, in place: it also answers the calls of this package from now on.

    Args:
        model: for example what `AutoModelForCausalLM.from_pretrained` returns; weights, names and config stay as they are.

    Raises:
        RefineError: logits that are more than a matrix product of the last hidden state (and a known scale).
    """
    if "_refine_plain" not in vars(type(model)):
        model.__class__ = causal_class(type(model))
        _install(model)
    check(model)
    return model


def _install(model: Any) -> None:
    trunk = model.model
    trunk.__class__ = trunk_class(type(trunk))
    trunk.plainly = False
    trunk.head_factor = head_factor(model.config)
    kinds = kinds_of(trunk.config)[0]
    trunk.keeping = ByReference(trunk) if set(kinds) <= set(EXACT_KINDS) else ByTokens(trunk)
    trunk.mixers = mark_mixers(trunk)


def head_factor(config: Any) -> float:
    """What a model multiplies its logits by (Granite divides, Falcon-H1 multiplies)."""
    fields = config.get_text_config(decoder=True).to_dict()
    return float(fields.get("lm_head_multiplier") or 1.0) / float(fields.get("logits_scaling") or 1.0)


def mark_mixers(trunk: nn.Module) -> list[nn.Module]:
    """The modules that write and read states (recurrent ones, or attention where there are no others), each told which of its parts do."""
    keepers = [m for m in trunk.modules() if hasattr(m, "layer_idx") and not any(hasattr(s, "layer_idx") for s in list(m.modules())[1:])]
    recurrent = [m for m in keepers if any(isinstance(s, nn.Conv1d) for s in m.modules())]
    mixers = recurrent or [m for m in keepers if any("k_proj" in name or "kv" in name for name, _ in m.named_children())]
    for mixer in mixers:
        parts = dict.fromkeys(name.split(".")[0] for name, _ in mixer.named_parameters())
        mixer.fast_weight_names = tuple(p for p in parts if p not in OUTPUT_PARTS)  # type: ignore[assignment]
        mixer.shares_states = False  # type: ignore[assignment]
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
            "schedule=reprefill); estimator=exact needs no states",
            stacklevel=3,
        )


def _check_head(model: Any) -> None:
    ids = _few_tokens(model, 1, 4)
    with model.model.as_it_is():
        logits = type(model)._refine_plain.forward(model, input_ids=ids, use_cache=False).logits
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    ours = head(model.model(ids, use_cache=False).last_hidden_state)
    error = float((ours - logits).abs().mean() / logits.std().clamp(min=1e-12))
    if bias is not None or error > TOLERANCE[logits.dtype]:
        what = "its head has a bias" if bias is not None else f"its logits differ from the head's by {error:.2g} of their spread"
        raise RefineError(
            f"{model.model.label}: the losses here take logits as lm_head.weight times the last hidden state, but {what}; models "
            "that bend or cap their logits are not supported"
        )


def state_problem(trunk: Any) -> str | None:
    """Why states by reference are not exact; None when they are."""
    if not isinstance(trunk.keeping, ByReference):
        unknown = sorted(set(kinds_of(trunk.config)[0]) - set(EXACT_KINDS))
        return f"its layers keep {', '.join(unknown)}, of which {', '.join(EXACT_KINDS)} are known"
    limits = {tuple(limit) for m in trunk.modules() if (limit := vars(m).get("time_step_limit")) is not None}
    if limits - {(0.0, math.inf)}:
        return f"a single token goes on without its time step's limits {sorted(limits)[0]}, unlike several"
    ids = _few_tokens(trunk, 2, 12)
    whole = trunk.plain(ids, use_cache=False)
    try:
        _, states = trunk.keeping.run(ids, None, torch.tensor([[2], [6]]))
        worst = 0.0
        for start, end in ((0, 1), (1, 4)):  # one token goes another way than several
            x = torch.stack([ids[0, 3 + start : 3 + end], ids[1, 7 + start : 7 + end]])
            h, states = trunk.keeping.run(x, states, torch.full((2, 1), end - start - 1))
            expected = torch.stack([whole[0, 3 + start : 3 + end], whole[1, 7 + start : 7 + end]])
            worst = max(worst, float((h - expected).abs().mean() / whole.std().clamp(min=1e-12)))
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"a pass with a cache fails: {type(error).__name__}: {first_line(error)}"
    return None if worst <= TOLERANCE[whole.dtype] else f"a pass with a cache differs by {worst:.2g} of the spread"


def _few_tokens(module: Any, rows: int, count: int) -> Tensor:
    embeddings = module.get_input_embeddings().weight
    ids = 1 + torch.arange(rows * count).view(rows, count) * 7
    return (ids % embeddings.shape[0]).to(embeddings.device)


__all__ = ["ByReference", "ByTokens", "class_for", "with_states"]
