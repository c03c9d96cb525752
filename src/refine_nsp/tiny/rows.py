"""Rows to pretrain on are windows of text and generated documents, made from a seed and the number of the step alone.

So a resumed run sees the rows that an uninterrupted one would, on any number of processes, and nothing is stored.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from refine_nsp.tiny.documents import Writer
from refine_nsp.tiny.families import FAMILIES
from refine_nsp.tiny.pretrain_settings import PretrainConfig, PretrainPhase

FILLER_ROWS = 4  # a document's filler is so many rows of text


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Encode all texts as one stream of ids, with the end of text after each."""
    ids: list[int] = []
    for encoded in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        ids += [*encoded, tokenizer.eos_token_id]
    return torch.tensor(ids)


@dataclass(frozen=True)
class Sources:
    """Hold what rows are made of: all texts as one `stream` of tokens, and the `writer` of generated documents."""

    stream: Tensor
    writer: Writer

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Sources:
        """Encode the texts, and prepare a writer whose prose comes from them."""
        return cls(encode_texts(tokenizer, texts), Writer.of(tokenizer, texts))


def step_rows(seed: int, step: int, count: int, phase: PretrainPhase, sources: Sources) -> tuple[Tensor, Tensor]:
    """Make the rows of one step: ids [count, T] and what each token weighs as a target [count, T], T the phase's length."""
    rng = random.Random(f"{seed}-{step}")
    rows, weights = [], []
    for _ in range(count):
        start = rng.randrange(len(sources.stream) - phase.length)
        row, weight = sources.stream[start : start + phase.length], torch.ones(phase.length)
        family = family_at(phase, rng.random())
        if family is not None:
            dense = phase.dense * (0.5 + 0.5 * rng.random())
            filler = sources.stream[start : start + FILLER_ROWS * phase.length].tolist()
            ids, recalled = sources.writer.write(rng, family, filler, phase.length, dense)
            row, weight = torch.tensor(ids), torch.where(torch.tensor(recalled), phase.answer_weight, 1.0)
        rows.append(row)
        weights.append(weight)
    return torch.stack(rows), torch.stack(weights)


def family_at(phase: PretrainPhase, u: float) -> str | None:
    """Choose a row's family by a uniform draw 0 <= u < 1, or None for plain text: the families' shares lie side by side from 0 on."""
    for family in FAMILIES:
        share = phase.shares.get(family, 0.0)
        if u < share:
            return family
        u -= share
    return None


class PhaseRows(Dataset[dict[str, Tensor | list[int] | list[Tensor]]]):
    """Make the examples of a whole pretraining, each with as many rows of its phase as fit into `max_length` tokens.

    An example is packed as `training/data.py` packs documents: its rows' tokens one after another, and their `lengths`. The column
    `target_weights` has a tensor [T] for each row.
    """

    def __init__(self, args: PretrainConfig, sources: Sources) -> None:
        self.args, self.sources = args, sources
        self.examples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size  # of an optimizer step
        self._latest: tuple[int, Tensor, Tensor] | None = None  # examples of a step are asked for one after another

    def __len__(self) -> int:
        return self.args.total_steps * self.examples

    def __getitem__(self, index: int) -> dict[str, Tensor | list[int] | list[Tensor]]:
        step, example = divmod(index, self.examples)
        phase = self.args.phase_at(step)
        count = self.args.max_length // phase.length
        if self._latest is None or self._latest[0] != step:
            self._latest = (step, *step_rows(self.args.seed, step, self.examples * count, phase, self.sources))
        own = slice(example * count, (example + 1) * count)
        _, ids, weights = self._latest
        return {"input_ids": ids[own].flatten(), "lengths": [phase.length] * count, "target_weights": list(weights[own])}
