"""Answer many prompts, batched by length and within bounded memory; a prefix that several prompts share is read once.

Prompts are read in blocks of tokens, and the state of a shared prefix is copied for each of its continuations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from refine_nsp.errors import RefineError
from refine_nsp.models.protocols import CausalModel
from refine_nsp.models.state import FastWeightCache

PREFILL_BLOCK = 1024  # tokens of a row per forward pass
SHARED_TOKENS = 128  # a shorter common prefix is not worth a pass of its own


@dataclass(frozen=True)
class Decoding:
    """Says how tokens are chosen: greedily, or by sampling as transformers' `generate` does.

    Sampling is at `temperature`, among the `top_k` likeliest (0: all), and of these among the likeliest whose probabilities reach `top_p`.
    """

    greedy: bool = True
    temperature: float = 1.0
    top_k: int = 0
    seed: int = 0
    top_p: float = 1.0

    def warpers(self) -> LogitsProcessorList:
        """Make transformers' own filters of logits, which raise a ValueError for a setting that they refuse."""
        temperature = [TemperatureLogitsWarper(self.temperature)] if self.temperature != 1 else []
        top_k = [TopKLogitsWarper(self.top_k)] if self.top_k != 0 else []
        return LogitsProcessorList([*temperature, *top_k, *([TopPLogitsWarper(self.top_p)] if self.top_p < 1 else [])])


@dataclass(frozen=True)
class Request:
    """Asks for the answer to a prompt."""

    key: int  # its place among the requests
    ids: list[int]
    budget: int  # tokens to generate at the most
    stop: Callable[[list[int]], bool] | None = None  # says of the tokens so far whether they end the answer, for stop strings


@torch.no_grad()
def prefill(
    model: CausalModel, rows: Sequence[Sequence[int]], cache: FastWeightCache | None = None
) -> tuple[Tensor, FastWeightCache]:
    """Read rows of one token or more, continuing from `cache`; return the hidden state after each row's last [B, D], and the states."""
    device = model.device
    lengths = torch.tensor([len(r) for r in rows], device=device)
    ids = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(r, dtype=torch.long) for r in rows], batch_first=True).to(device)
    last = None
    state = FastWeightCache() if cache is None else cache.copy()
    for start in range(0, ids.shape[1], PREFILL_BLOCK):
        block = ids[:, start : start + PREFILL_BLOCK]
        inside = (lengths - start).clamp(0, block.shape[1])
        out = model.model(block, lengths=inside, past_key_values=state, use_cache=True)
        h = out.last_hidden_state
        ends = h[torch.arange(len(rows), device=device), (inside - 1).clamp(min=0)]
        last = ends if last is None else torch.where((inside > 0)[:, None], ends, last)
    assert last is not None
    return last, state


@torch.no_grad()
def decode(
    model: CausalModel, hidden: Tensor, cache: FastWeightCache, requests: Sequence[Request], eos: set[int], decoding: Decoding,
    keep_rows: bool = False,
) -> list[list[int]]:  # fmt: skip
    """Continue each row until an end token, its request's stop or its budget; return the tokens without the end token.

    Finished rows leave the batch, unless `keep_rows` (rows that have weights of their own must stay in place). Sampling is seeded by
    request, so an answer does not depend on what it was batched with.
    """
    outputs: list[list[int]] = [[] for _ in requests]
    generators = [torch.Generator().manual_seed(decoding.seed * 1_000_003 + r.key) for r in requests]
    rows = list(range(len(requests)))  # the request of each row of the batch
    going = [j for j in rows if requests[j].budget > 0]  # rows of the batch that are not finished
    cache = cache.copy()  # the caller's stays as it is
    while True:
        tokens = choose(model.lm_head(hidden).float(), [generators[i] for i in rows], decoding)
        for j in going:
            outputs[rows[j]].append(tokens[j])
        going = [j for j in going if not _ended(outputs[rows[j]], requests[rows[j]], eos)]
        if not going:
            break
        if len(going) < len(rows) and not keep_rows:
            index = torch.tensor(going, device=hidden.device)
            cache, tokens, rows = cache.index(index), [tokens[j] for j in going], [rows[j] for j in going]
            going = list(range(len(rows)))
        step = torch.tensor(tokens, device=hidden.device)[:, None]
        hidden = model.model(step, past_key_values=cache, use_cache=True).last_hidden_state[:, 0]
    return [o[:-1] if o and o[-1] in eos else o for o in outputs]


def _ended(tokens: list[int], request: Request, eos: set[int]) -> bool:
    return len(tokens) >= request.budget or tokens[-1] in eos or (request.stop is not None and request.stop(tokens))


def choose(logits: Tensor, generators: Sequence[torch.Generator], decoding: Decoding) -> list[int]:
    """Choose one token a row from logits [B, V]."""
    if decoding.greedy:
        return logits.argmax(-1).tolist()
    p = probabilities(logits, decoding).cpu()
    return [int(torch.multinomial(row, 1, generator=g)) for row, g in zip(p, generators, strict=True)]


def probabilities(logits: Tensor, decoding: Decoding) -> Tensor:
    """Compute the distributions [B, V] that `choose` samples from: the softmax of the logits that the settings leave."""
    no_tokens = torch.empty(len(logits), 0, dtype=torch.long)  # these filters look at logits alone
    return decoding.warpers()(cast(torch.LongTensor, no_tokens), cast(torch.FloatTensor, logits)).softmax(-1)


def end_tokens(model: CausalModel, tokenizer: PreTrainedTokenizerBase | None = None) -> set[int]:
    """Collect the tokens that end an answer, from the model's generation settings and the tokenizer's EOS; there may be none."""
    eos = model.generation_config.eos_token_id
    tokens = set(eos) if isinstance(eos, list) else {eos}
    own = tokenizer.eos_token_id if tokenizer is not None else None
    return {int(t) for t in (*tokens, own) if t is not None}


def shared_groups(requests: Sequence[Request]) -> list[tuple[int, list[Request]]]:
    """Group requests that begin alike, with the number of tokens they share (0 for one alone); each keeps a token of its own."""
    ordered = sorted(requests, key=lambda r: r.ids)
    groups: list[tuple[int, list[Request]]] = []
    for request in ordered:
        if groups:
            shared, members = groups[-1]
            most = min(len(request.ids), *(len(m.ids) for m in members)) - 1
            common = next((i for i in range(most) if members[0].ids[i] != request.ids[i]), most)
            common = common if len(members) == 1 else min(common, shared)
            if common >= SHARED_TOKENS and 2 * common >= len(request.ids):
                groups[-1] = (common, [*members, request])
                continue
        groups.append((0, [request]))
    return groups


def answer_all(
    model: CausalModel, requests: Sequence[Request], eos: set[int], decoding: Decoding, batch_tokens: int,
    on_prefill: Callable[[int], None] | None = None,
) -> Iterator[list[tuple[Request, list[int]]]]:  # fmt: skip
    """Yield batches of (request, generated tokens without the end token), longest prompts first; a RefineError for an empty prompt.

    A batch holds at most `batch_tokens` tokens (one prompt may be longer); `on_prefill` is told how many prompt tokens were read.
    """
    if empty := [r.key for r in requests if not r.ids]:
        raise RefineError(f"prompt {empty[0]} has no tokens")
    told = on_prefill if on_prefill is not None else lambda tokens: None
    groups = shared_groups(requests)
    alone = [members[0] for shared, members in groups if shared == 0]
    for shared, members in [(0, alone), *((n, m) for n, m in groups if n > 0)]:
        prefix = None
        if shared > 0:
            _, prefix = prefill(model, [members[0].ids[:shared]])
            told(shared)
        for batch in _by_size(sorted(members, key=lambda r: -len(r.ids)), batch_tokens, shared):
            rows = [r.ids[shared:] for r in batch]
            hidden, cache = prefill(model, rows, None if prefix is None else prefix.expand(len(batch)))
            told(sum(map(len, rows)))
            yield list(zip(batch, decode(model, hidden, cache, batch, eos, decoding), strict=True))


def _by_size(requests: Sequence[Request], batch_tokens: int, skip: int) -> Iterator[list[Request]]:
    """Yield consecutive requests (longest first) whose padded size without the `skip` first tokens stays within batch_tokens."""
    batch: list[Request] = []
    for r in requests:
        if batch and (len(batch) + 1) * (len(batch[0].ids) - skip + batch[0].budget) > batch_tokens:
            yield batch
            batch = []
        batch.append(r)
    if batch:
        yield batch
