"""Centre the queries and keys of a converted memory on text, before anything is trained (docs/your_own_checkpoint.md).

Attention's queries and keys have large means, which its softmax does not see: the same number is added to all logits of a query. A memory
without softmax does see them. All its keys are then alike, so each of them brings back the mean of everything that was written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from refine_nsp.errors import RefineError
from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.models.lact import LaCTMixer
from refine_nsp.models.load import load_model, load_tokenizer
from refine_nsp.progress import step_progress
from refine_nsp.text.reading import read_documents

ROWS, ROW_TOKENS = 16, 1024  # that means are taken over; more tokens move them by a percent


def rows_of(source: str, tokenizer: PreTrainedTokenizerBase, longest: int | None) -> list[Tensor]:
    """Read the first ROWS rows [1, up to ROW_TOKENS] of the documents of a file, folder or hub name, a row from each.

    Raises RefineError where no document has two tokens.
    """
    length = ROW_TOKENS if longest is None else min(ROW_TOKENS, longest)
    rows = []
    for row in read_documents(source, ("text",)):
        # A token is seldom longer than sixteen characters, and whole books would take minutes.
        ids = tokenizer(row["text"][: 16 * length], add_special_tokens=False)["input_ids"][:length] if row["text"] else []
        if len(ids) > 1:
            rows.append(torch.tensor([ids]))
        if len(rows) == ROWS:
            break
    if not rows:
        raise RefineError(f"{source} has no text of two tokens or more in its column 'text'; name a file that has")
    return rows


@torch.no_grad()
def centred_offsets(model: FastWeightForCausalLM, rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Compute each layer's `qk_offset` [D, 2] that takes the means of its scaled queries and keys over all tokens of the rows to zero."""
    mixers = {name: module for name, module in model.named_modules() if isinstance(module, LaCTMixer)}
    sums = {name: torch.zeros(model.config.hidden_size, 2, dtype=torch.float64) for name in mixers}

    def summing(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], qkv: Tensor) -> None:
            sums[name] += torch.stack(qkv.double().flatten(0, 1).sum(0).chunk(3)[:2], 1)

        return hook

    with ExitStack() as stack:
        progress = stack.enter_context(step_progress(len(rows), title="centre"))
        for name, mixer in mixers.items():
            stack.callback(mixer.qkv.register_forward_hook(summing(name)).remove)
        for row in rows:
            model.model(row, use_cache=False)
            progress.advance(row.shape[1])
    tokens = sum(row.shape[1] for row in rows)
    return {
        f"{name}.qk_offset": (-sums[name] / tokens * mixer.qk_scale).to(mixer.qk_offset.dtype) for name, mixer in mixers.items()
    }


def offsets_of(folder: Path, source: str) -> dict[str, Tensor]:
    """Load a converted folder, and compute its offsets on the documents of `source`. Raises RefineError without a tokenizer or text."""
    tokenizer, model = load_tokenizer(folder), cast(FastWeightForCausalLM, load_model(folder))
    return centred_offsets(model, rows_of(source, tokenizer, model.config.max_position_embeddings))
