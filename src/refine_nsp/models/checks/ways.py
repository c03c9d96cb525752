"""Say how a model is called, by a record of callables; those of transformers' models, ours among them, are made here.

Each callable takes the module first, so that the same record serves a copy in another precision.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import logging

from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.models.state import FastWeightCache, tensors_of

Follow = Callable[[nn.Module, Tensor, object, int, "Tensor | None"], tuple[Tensor, object]]
States = Mapping[str, Tensor]


@dataclass(frozen=True)
class Ways:
    """Lists the ways of calling a model; what it returns for every token may be logits or hidden states."""

    # (module, ids [B, T]) -> values [B, T, V]
    run: Callable[[nn.Module, Tensor], Tensor]
    # (module, ids, mask [B, T] of 0 and 1) -> values [B, T, V]; pads may stand at either end
    masked: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
    # By name of the way, (module, ids [1, T], lengths of the documents in them) -> values [1, T, V]
    packed: Mapping[str, Callable[[nn.Module, Tensor, Sequence[int]], Tensor]] = field(default_factory=dict)
    # (module, ids, cache, columns that the cache has seen, mask) -> (values, cache); the cache is None at first, and the mask, None without
    # pads, covers what the cache has seen too. Pads stand on the left.
    follow: Follow | None = None
    # The same without a word of positions or masks, where `follow` gives them
    unaided: Follow | None = None
    # (module, ids, N, whether with a cache) -> (the N greedy tokens [B, N], their logits [B, N, V])
    generate: Callable[[nn.Module, Tensor, int, bool], tuple[Tensor, Tensor]] | None = None
    # cache -> its tensors by name; names that begin with `recurrent` are states that are written again and again
    states: Callable[[object], States] | None = None
    # cache -> the same cache with its states as leaves of a new graph
    leaves: Callable[[object], object] | None = None
    # (module, whether) -> None, gradient checkpointing on or off
    checkpoint: Callable[[nn.Module, bool], None] | None = None
    # (module, folder) -> None, and (module, folder) -> what was saved there
    save: Callable[[nn.Module, Path], None] | None = None
    load: Callable[[nn.Module, Path], nn.Module] | None = None
    # The reason why a way is not there, by its name
    missing: Mapping[str, str] = field(default_factory=dict)


def ways_of(model: PreTrainedModel) -> Ways:
    """Find how a causal model of transformers is called, from the signature of its `forward`."""
    parameters = inspect.signature(model.forward).parameters
    rest = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    own = has_states(model)
    cache = "past_key_values" if own else next((n for n in ("past_key_values", "cache_params") if n in parameters), None)
    places = "position_ids" in parameters
    missing = {}
    if cache is None:
        missing["follow"] = missing["unaided"] = "it takes no cache: its states stay inside its modules"
    elif not places:
        missing["unaided"] = "it takes no position_ids"
    if not rest and not places:
        missing["packed"] = "it takes neither position_ids nor other marks of documents"
    if not model.supports_gradient_checkpointing:
        missing["checkpoint"] = "it does not support gradient checkpointing"
    calls = _Calls(cache, places, FastWeightCache if own else None)
    return Ways(
        run=calls.run,
        masked=calls.masked if "attention_mask" in parameters else None,
        packed={"position_ids": packed_by_places, "cu_seqlens": packed_by_boundaries, "collator": packed_by_collator}
        if rest or places
        else {},
        follow=calls.follow if cache else None,
        unaided=calls.unaided if cache and places else None,
        generate=generate if model.can_generate() else None,
        states=states_of if cache else None,
        leaves=leaves_of if own else None,
        checkpoint=checkpoint if model.supports_gradient_checkpointing else None,
        save=lambda module, folder: cast(PreTrainedModel, module).save_pretrained(folder),
        load=load_again,
        missing=missing,
    )


def has_states(model: nn.Module) -> bool:
    """Tell whether a model continues from a `FastWeightCache`: our families do, and models of transformers that were given states."""
    return isinstance(model, FastWeightForCausalLM) or "_refine_plain" in vars(type(model))


@dataclass(frozen=True)
class _Calls:
    """Calls a model of transformers."""

    cache: str | None  # the name that it takes its cache by
    places: bool  # whether it takes `position_ids`
    new: Callable[[], object] | None = None  # makes its first cache, unless it does itself

    def run(self, module: nn.Module, ids: Tensor) -> Tensor:
        return module(input_ids=ids, use_cache=False).logits

    def masked(self, module: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        return module(input_ids=ids, use_cache=False, **self._marks(mask, ids.shape[1])).logits

    def follow(self, module: nn.Module, ids: Tensor, cache: object, seen: int, mask: Tensor | None) -> tuple[Tensor, object]:
        B, T = ids.shape
        given: dict[str, Tensor] = {}
        if mask is not None:
            # Mamba masks what it reads, as wide as that, so `generate` gives it no mask behind a cache.
            given = {} if self.cache == "cache_params" and cache is not None else self._marks(mask, T)
        elif self.places:
            given = {"position_ids": torch.arange(seen, seen + T, device=ids.device).expand(B, T)}
        return self._follow(module, ids, cache, given)

    def unaided(self, module: nn.Module, ids: Tensor, cache: object, seen: int, mask: Tensor | None) -> tuple[Tensor, object]:
        return self._follow(module, ids, cache, {})

    def _follow(self, module: nn.Module, ids: Tensor, cache: object, given: dict[str, Tensor]) -> tuple[Tensor, object]:
        assert self.cache is not None
        if cache is None and self.new is not None:
            cache = self.new()
        past = {} if cache is None else {self.cache: cache}
        out = module(input_ids=ids, use_cache=True, **past, **given)
        after = out.get(self.cache)
        if after is None and cache is None and not module.training:  # it may fill one that it is given, although it returns none
            after = DynamicCache(config=cast(Any, module).config)
            out = module(input_ids=ids, use_cache=True, **{self.cache: after}, **given)
        return out.logits, cache if after is None else after

    def _marks(self, mask: Tensor, n_tokens: int) -> dict[str, Tensor]:
        """Give the mask, and positions as `generate` counts them where pads stand on the left."""
        given = {"attention_mask": mask}
        if self.places and bool((mask[:, 0] == 0).any()):
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -n_tokens:]
        return given


def packed_by_places(module: nn.Module, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Run documents in one row, told apart by `position_ids` that begin again."""
    places = torch.cat([torch.arange(n) for n in lengths])[None].to(ids.device)
    return module(input_ids=ids, position_ids=places, use_cache=False).logits


def packed_by_boundaries(module: nn.Module, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Run documents in one row, told apart by `cu_seq_lens_q` and `cu_seq_lens_k` alone."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(ids.device)
    longest = max(lengths)
    marks = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    return module(input_ids=ids, use_cache=False, **marks).logits


def packed_by_collator(module: nn.Module, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Run documents in one row as transformers' `DataCollatorWithFlattening` lays them out, with all the marks it has."""
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collator([{"input_ids": document.tolist()} for document in ids[0].split(list(lengths))])
    batch.pop("labels")
    given = {name: x.to(ids.device) if isinstance(x, Tensor) else x for name, x in batch.items()}
    return module(**given, use_cache=False).logits


def generate(module: nn.Module, ids: Tensor, count: int, use_cache: bool) -> tuple[Tensor, Tensor]:
    """Continue ids [B, T] greedily by `count` tokens; return these and their logits."""
    settings = GenerationConfig(
        max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=use_cache, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    model: Any = module
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


def states_of(cache: object) -> States:
    """Read the tensors of a cache of ours or of transformers; nothing where it is of another kind."""
    states = cache.layers if isinstance(cache, FastWeightCache) else []
    if isinstance(cache, Cache) and not isinstance(cache, FastWeightCache):
        states = [tensors_of(layer) for layer in cache.layers]
    return {f"{_kind(name)} {i} {name}": x for i, state in enumerate(states) for name, x in state.items()}


def _kind(name: str) -> str:
    """Tell what a tensor of `FastWeightCache` is: written again and again, or the last inputs."""
    return "inputs" if name.startswith(("conv", "open_", "window_", "keys", "values", "tokens")) else "recurrent"


def leaves_of(cache: object) -> object:
    """Make the states of a `FastWeightCache` leaves of a new graph."""
    assert isinstance(cache, FastWeightCache)
    layers = [{name: x.detach().requires_grad_(x.is_floating_point()) for name, x in layer.items()} for layer in cache.layers]
    return FastWeightCache(layers, cache.lengths, cache.columns)


def checkpoint(module: nn.Module, whether: bool) -> None:
    """Turn gradient checkpointing on or off."""
    model: Any = module
    if whether:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def load_again(module: nn.Module, folder: Path) -> nn.Module:
    """Load what was saved, as a model of the same class and with the same attention."""
    model: Any = module
    attention = model.config._attn_implementation
    return type(model).from_pretrained(
        folder, dtype=model.dtype, attn_implementation=attention, use_safetensors=True, trust_remote_code=False
    ).eval()  # fmt: skip


@contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """Silence what transformers says, and its progress bars unless `bars`."""
    level, hides = logging.get_verbosity(), logging.is_progress_bar_enabled() and not bars
    logging.set_verbosity_error()
    if hides:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if hides:
            logging.enable_progress_bar()
