"""The equalities that hold of a model whose states are exact: each reads the same text in two ways and returns both results.

What is compared is every value that the model returns for real tokens, or gradients, or states. Nothing is judged here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from refine_nsp.errors import first_line
from refine_nsp.models.checks.precision import in_dtype
from refine_nsp.models.checks.ways import Ways

Tensors = Mapping[str, Tensor]
# A model that raises one of these refuses a call in words, so it misleads nobody: the line says "refuses" and does not fail.
REFUSALS = (ValueError, TypeError, NotImplementedError, ImportError)
Pair = tuple[Tensors, Tensors]  # what was expected, and what was found
W = TypeVar("W")


class NotApplicable(Exception):
    """A check asks for what the model does not have; the message says what."""


class Broken(Exception):
    """What a check asks for does not hold, which no difference of numbers would say; the message says why."""


@dataclass(frozen=True)
class Probe:
    """Holds a model to try, in eval mode, and the tokens to try it with."""

    module: nn.Module
    ways: Ways  # how it is called
    ids: Tensor  # [B, T] long, on the module's device; rows differ in every column
    cut: int  # tokens of the prefix, with at least four behind it
    single: int  # how many tokens behind it are read one by one
    same_by_single_tokens: bool = True  # whether one token is expected to leave the state that several do
    seen: dict[str, Tensor] = field(default_factory=dict)  # what a pass over `ids` without gradients returned

    def of(self, module: nn.Module) -> Probe:
        """Ask the same of another module, such as a copy in another precision."""
        return replace(self, module=module, seen={})

    def need(self, name: str, way: W | None) -> W:
        """Return a way of calling, or raise `NotApplicable` with the reason why it is not there."""
        if way is None:
            raise NotApplicable(self.ways.missing.get(name, f"its Ways have no {name}"))
        return way

    def run(self, ids: Tensor | None = None) -> Tensor:
        """Read ids in one pass without a cache; by default all rows, which is done once where no gradients are asked for."""
        if ids is not None or torch.is_grad_enabled():
            return self.ways.run(self.module, self.ids if ids is None else ids)
        if "whole" not in self.seen:
            self.seen["whole"] = self.ways.run(self.module, self.ids)
        return self.seen["whole"]

    def follow(self, ids: Tensor, cache: object = None, seen: int = 0, mask: Tensor | None = None) -> tuple[Tensor, object]:
        """Read ids behind what a cache holds of `seen` columns."""
        values, cache = self.need("follow", self.ways.follow)(self.module, ids, cache, seen, mask)
        if cache is None:
            raise Broken("it returns no cache although it is asked to keep one")
        return values, cache

    def states(self, cache: object) -> Tensors:
        """Read the tensors of a cache."""
        found = self.ways.states(cache) if self.ways.states is not None else {}
        if not found:
            raise NotApplicable(f"its cache ({type(cache).__name__}) is of a kind that is not known here")
        return found


def one(values: Tensor) -> Tensors:
    """Name the values of a pass, so that they can be compared as states and gradients are."""
    return {"values": values}


def continuation(probe: Probe) -> Pair:
    """Compare a prefix, and several tokens that continue from it, with the whole."""
    first, cache = probe.follow(probe.ids[:, : probe.cut])
    rest, _ = probe.follow(probe.ids[:, probe.cut :], cache, probe.cut)
    return one(probe.run()), one(torch.cat([first, rest], 1))


def positions(probe: Probe) -> Pair:
    """Compare a continuation that is not told its positions with the whole."""
    return continuation(replace(probe, ways=replace(probe.ways, follow=probe.need("unaided", probe.ways.unaided))))


def single_tokens(probe: Probe) -> Pair:
    """Compare tokens read one by one behind a prefix with the whole."""
    end = probe.cut + probe.single
    _, cache = probe.follow(probe.ids[:, : probe.cut])
    found = []
    for t in range(probe.cut, end):
        values, cache = probe.follow(probe.ids[:, t : t + 1], cache, t)
        found.append(values)
    return one(probe.run()[:, probe.cut : end]), one(torch.cat(found, 1))


def states_after_pieces(probe: Probe) -> Pair:
    """Compare the states after a text read in pieces, one a single token, with those after one pass, each by its own size."""
    _, direct = probe.follow(probe.ids)
    T, cut, seen = probe.ids.shape[1], probe.cut, 0
    cache: object = None
    pieces = [cut, 1, T - cut - 1] if probe.same_by_single_tokens else [cut, T - cut]
    for piece in probe.ids.split(pieces, 1):
        _, cache = probe.follow(piece, cache, seen)
        seen += piece.shape[1]
    expected, found = probe.states(direct), probe.states(cache)
    if expected.keys() != found.keys() or any(x.shape != found[name].shape for name, x in expected.items()):
        raise Broken("the states after pieces are of other shapes than those after one pass")
    sizes = {name: x.abs().mean().clamp(min=1e-30) for name, x in expected.items() if x.is_floating_point()}
    return {n: expected[n] / size for n, size in sizes.items()}, {n: found[n] / size for n, size in sizes.items()}


@torch.enable_grad()
def recurrence(probe: Probe) -> None:
    """See that a recurrent state comes from the one before, by the graph: what is left after a few tokens may be below rounding."""
    if probe.ways.leaves is None:
        raise NotApplicable("its cache gives no states that a graph could begin with")
    _, cache = probe.follow(probe.ids[:, : probe.cut])
    cache = probe.ways.leaves(cache)
    before = dict(probe.states(cache))
    _, cache = probe.follow(probe.ids[:, probe.cut : probe.cut + 2], cache, probe.cut)
    after = probe.states(cache)
    pairs = [(x, after[name]) for name, x in before.items() if name.startswith("recurrent")]
    if not pairs:
        raise NotApplicable("it keeps no recurrent states")
    found = [
        torch.autograd.grad(y.sum(), x, retain_graph=True, allow_unused=True)[0] if y.requires_grad else None for x, y in pairs
    ]
    if any(g is None for g in found) or not any(g.any() for g in found if g is not None):
        raise Broken("its layers do not go on from their recurrent state where several tokens follow")


def _padded(probe: Probe, left: bool, pad: int = 0) -> tuple[Tensor, Tensor, list[int]]:
    """Make rows of different lengths of the first tokens of each: ids and mask [B, T], and the lengths."""
    B, T = probe.ids.shape
    lengths = [T - (5 * b) % (T // 2) for b in range(B)]
    lengths[0] = T
    ids, mask = torch.full_like(probe.ids, pad), torch.zeros_like(probe.ids)
    for b, n in enumerate(lengths):
        where = slice(T - n, T) if left else slice(0, n)
        ids[b, where], mask[b, where] = probe.ids[b, :n], 1
    return ids, mask, lengths


def _real(values: Tensor, lengths: Sequence[int], left: bool) -> Tensors:
    """Take the values of real tokens, row by row."""
    T = values.shape[1]
    return {f"row {b}": values[b, T - n :] if left else values[b, :n] for b, n in enumerate(lengths)}


def padded(probe: Probe, left: bool) -> Pair:
    """Compare rows of different lengths, padded on one side, with the same tokens without pads."""
    ids, mask, lengths = _padded(probe, left)
    found = probe.need("masked", probe.ways.masked)(probe.module, ids, mask)
    return _real(probe.run(), lengths, False), _real(found, lengths, left)


def pads_content(probe: Probe) -> Pair:
    """Compare rows whose pads are one token with the same rows whose pads are another."""
    masked = probe.need("masked", probe.ways.masked)
    expected: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for left in (False, True):
        for into, pad in ((expected, 0), (found, int(probe.ids[0, 0]))):
            ids, mask, lengths = _padded(probe, left, pad)
            rows = _real(masked(probe.module, ids, mask), lengths, left)
            into |= {f"{name} {left}": x for name, x in rows.items()}
    return expected, found


def _prefixes(probe: Probe, count: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Make prefixes of different lengths, padded on the left: ids and mask [B, cut], what follows each [B, count], and the lengths."""
    cut = probe.cut
    lengths = [cut - (2 * b) % (cut - 1) for b in range(len(probe.ids))]
    ids, mask = torch.zeros_like(probe.ids[:, :cut]), torch.zeros_like(probe.ids[:, :cut])
    for b, n in enumerate(lengths):
        ids[b, cut - n :], mask[b, cut - n :] = probe.ids[b, :n], 1
    return ids, mask, torch.stack([probe.ids[b, n : n + count] for b, n in enumerate(lengths)]), lengths


def decoding_behind_pads(probe: Probe) -> Pair:
    """Compare prefixes of different lengths, padded on the left and continued token by token, with each row alone."""

    def decode(prefix: Tensor, rest: Tensor, mask: Tensor | None) -> Tensor:
        _, cache = probe.follow(prefix, None, 0, mask)
        found, seen = [], prefix.shape[1]
        for token in rest.split(1, 1):
            mask = None if mask is None else torch.cat([mask, torch.ones_like(token)], 1)
            values, cache = probe.follow(token, cache, seen, mask)
            found.append(values)
            seen += 1
        return torch.cat(found, 1)

    probe.need("masked", probe.ways.masked)
    ids, mask, rest, lengths = _prefixes(probe, probe.single)
    found = decode(ids, rest, mask)
    alone = [decode(probe.ids[b : b + 1, :n], rest[b : b + 1], None) for b, n in enumerate(lengths)]
    return one(torch.cat(alone)), one(found)


def continuation_behind_pads(probe: Probe) -> Pair:
    """Compare prefixes of different lengths, padded on the left and continued, with the whole of each row."""
    cut, count = probe.cut, probe.ids.shape[1] - probe.cut
    ids, mask, rest, lengths = _prefixes(probe, count)
    _, cache = probe.follow(ids, None, 0, mask)
    found, _ = probe.follow(rest, cache, cut, torch.cat([mask, torch.ones_like(rest)], 1))
    expected = probe.run()
    return one(torch.stack([expected[b, n : n + count] for b, n in enumerate(lengths)])), one(found)


def rows(probe: Probe) -> Pair:
    """Compare a row with the same row next to others of another content."""
    other = torch.cat([probe.ids[:1], probe.ids[1:].flip(1)])
    return one(probe.run()[:1]), one(probe.run(other)[:1])


def batch_size(probe: Probe) -> Pair:
    """Compare rows that run together with the same rows one by one."""
    return one(torch.cat([probe.run(row[None]) for row in probe.ids])), one(probe.run())


def packed(probe: Probe, way: str) -> Pair:
    """Compare documents packed in one row with the documents apart."""
    run = probe.need("packed", probe.ways.packed.get(way))
    T = probe.ids.shape[1]
    lengths = [T // 2, T // 3, T - T // 2 - T // 3]
    documents = [row[:n] for row, n in zip(probe.ids.repeat(3, 1), lengths, strict=False)]
    try:
        found = run(probe.module, torch.cat(documents)[None], lengths)
    except REFUSALS as error:
        raise NotApplicable(f"refused: {first_line(error)}") from error
    return one(torch.cat([probe.run(document[None]) for document in documents], 1)), one(found)


def _gradients(module: nn.Module, values: Tensor, targets: Tensor) -> Tensors:
    """Return the gradients of the cross-entropy of values [B, T, V] and targets [B, T]."""
    named = {n: p for n, p in module.named_parameters() if p.is_floating_point()}
    # What reaches the first layer has gone through all others.
    parameters = {n: p for n, p in named.items() if ".0." in n} or named
    wide = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
    loss = nn.functional.cross_entropy(wide.flatten(0, 1), targets.flatten() % values.shape[-1])
    if not loss.requires_grad:
        raise Broken("its output has no gradient")
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


@torch.enable_grad()
def gradient(probe: Probe) -> Pair:
    """Compare gradients of a continuation's loss through the cached state of its prefix with those through the whole."""
    targets = probe.ids[:, probe.cut :].flip(1)
    expected = _gradients(probe.module, probe.run()[:, probe.cut :], targets)
    _, cache = probe.follow(probe.ids[:, : probe.cut])
    values, _ = probe.follow(probe.ids[:, probe.cut :], cache, probe.cut)
    return expected, _gradients(probe.module, values, targets)


def _with_checkpointing_and_without(probe: Probe, result: Callable[[bool], Tensors]) -> Pair:
    """Return the result of training passes without gradient checkpointing and with it."""
    switch = probe.need("checkpoint", probe.ways.checkpoint)
    found = []
    probe.module.train()
    try:
        for whether in (False, True):
            switch(probe.module, whether)
            torch.manual_seed(0)
            found.append(result(whether))
    finally:
        switch(probe.module, False)
        probe.module.eval()
    return found[0], found[1]


@torch.enable_grad()
def checkpointing(probe: Probe) -> Pair:
    """Compare outputs and gradients of a training pass with gradient checkpointing with those without."""

    def result(whether: bool) -> Tensors:
        values = probe.run()
        return {"values": values.detach()} | dict(_gradients(probe.module, values, probe.ids.flip(1)))

    return _with_checkpointing_and_without(probe, result)


@torch.enable_grad()
def checkpointing_with_cache(probe: Probe) -> Pair:
    """Compare a continuation from a cached state in training, with gradient checkpointing, with the same without."""
    follow = probe.need("follow", probe.ways.follow)

    def result(whether: bool) -> Tensors:
        try:
            _, cache = follow(probe.module, probe.ids[:, : probe.cut], None, 0, None)
            if cache is None and not whether:
                raise NotApplicable("it returns no cache in training, with gradient checkpointing or without")
            if cache is None:
                raise Broken("it returns no cache then, and a line in the log is all that says so")
            return one(follow(probe.module, probe.ids[:, probe.cut :], cache, probe.cut, None)[0].detach())
        except REFUSALS as error:
            if whether:
                raise NotApplicable(f"refused: {first_line(error)}") from error
            raise

    return _with_checkpointing_and_without(probe, result)


def generation(probe: Probe) -> Pair:
    """Compare greedy answers with and without a cache: logits up to the first token that differs, which only a tie explains."""
    generate, prompts = probe.need("generate", probe.ways.generate), probe.ids[:, : probe.cut]
    tokens, expected = generate(probe.module, prompts, probe.single, False)
    others, found = generate(probe.module, prompts, probe.single, True)
    same = (tokens == others).long().cumprod(1).sum(1)  # [B] tokens that agree
    keep = torch.arange(probe.single, device=same.device) <= same[:, None]
    return one(expected[keep]), one(found[keep])


def save_and_load(probe: Probe) -> Pair:
    """Compare a model with what is loaded from what it saves."""
    save, load = probe.need("save", probe.ways.save), probe.need("save", probe.ways.load)
    with tempfile.TemporaryDirectory() as folder:
        save(probe.module, Path(folder))
        again = load(probe.module, Path(folder)).to(probe.ids.device)
        return one(probe.run()), one(probe.ways.run(again, probe.ids))


def state_precision(probe: Probe) -> None:
    """See that a bfloat16 model keeps its recurrent states in float32."""
    _, cache = probe.follow(probe.ids[:1, :4])
    dtypes = {name: x.dtype for name, x in probe.states(cache).items() if name.startswith("recurrent")}
    if not dtypes:
        raise NotApplicable("its cache holds no recurrent states")
    low = {name: d for name, d in dtypes.items() if d not in (torch.float32, torch.float64)}
    if low:
        kinds = ", ".join(sorted({str(d).removeprefix("torch.") for d in low.values()}))
        raise Broken(f"{len(low)} of {len(dtypes)} recurrent states are {kinds}")


def kernels(probe: Probe) -> Pair:
    """Compare a pass on a CUDA device, by whatever kernels are installed, with PyTorch's operations on the CPU."""
    installed = [name for name in ("fla", "mamba_ssm", "causal_conv1d") if find_spec(name) is not None]
    if not installed:
        raise NotApplicable("flash-linear-attention, mamba-ssm and causal-conv1d are not installed")
    if not probe.ids.is_cuda:
        raise NotApplicable("the model is not on a CUDA device, where kernels run")
    on_cpu = in_dtype(probe.module, next(probe.module.parameters()).dtype).to("cpu")
    return one(probe.ways.run(on_cpu, probe.ids.cpu()).to(probe.ids.device)), one(probe.run())
