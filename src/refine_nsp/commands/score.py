"""`refine-nsp score DATA MODEL`: write documents with what their context is worth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from datasets import Dataset
from rich.console import Console
from torch import nn

from refine_nsp.commands.grammar import Call, Command, Settings
from refine_nsp.commands.shared import DEFAULT_MODEL, load_to_answer
from refine_nsp.config import NSPConfig
from refine_nsp.fields import check_read, setting
from refine_nsp.processes import process_state
from refine_nsp.text.reading import read_documents
from refine_nsp.training.data import TEXT_COLUMN, TOKENS_COLUMN
from refine_nsp.training.scores import AUTOCAST, check_length, check_output, score_documents, write_rows
from refine_nsp.training.sources import COUNT_COLUMN, SCORE_COLUMN


@dataclass
class ScoreArguments:
    """Name the documents, the model that scores them, and the score.

    Attributes:
        data: a file, a folder, a glob, a folder saved by `datasets`, or a hub name, as `midtrain` reads it.
        model: a shipped model, a folder or a hub name.
        output: the file to write (.jsonl or .parquet): all columns, `context_score` (nats a token) and `num_tokens`.
        text_column: column that holds the text, or each row's token ids.
        score: how much the whole prefix, against the last tokens alone, changes a prediction (context_kl), or helps that of the true token
            (context_gain).
        max_length: tokens of a window; what is further back is not seen.
        local_window: the last tokens that the whole prefix is compared with.
        local_span: these are read in windows of so many times local_window tokens.
        bf16: make matrix products in bfloat16.
        dataset_config: configuration of a hub dataset, or of a folder whose README lists several.
        dataset_split: the split of a hub dataset or a folder.
    """

    data: str = setting(common=True)
    model: str = setting(DEFAULT_MODEL, common=True)
    output: Path = setting(Path("scored.jsonl"), common=True)
    text_column: str = setting(TEXT_COLUMN, common=True)
    score: Literal["context_kl", "context_gain"] = setting("context_kl", common=True)
    max_length: int = setting(1024, common=True)
    local_window: int = setting(64, common=True)
    local_span: int = setting(4)
    bf16: bool = setting(False, common=True)
    dataset_config: str | None = setting(None)
    dataset_split: str = setting("train")

    def __post_init__(self) -> None:
        check_read(self)
        check_length(self.max_length, self.method)

    @property
    def method(self) -> NSPConfig:
        """Return the settings of the method that say which score."""
        weights: Literal["context", "context_gain"] = "context" if self.score == "context_kl" else "context_gain"
        return NSPConfig(
            estimator="closed_form", order=math.inf, rollout_length=1, token_weights=weights, local_window=self.local_window,
            local_span=self.local_span,
        )  # fmt: skip


COMMAND = Command(
    "Write documents with the score of their context, by which midtrain can choose them.",
    (Settings(ScoreArguments),),
    "An interrupted scoring continues; under `accelerate launch` the processes share it.",
    positional=("data", "model"),
)


def run(call: Call, arguments: ScoreArguments) -> None:
    """Score the documents, write them, and say what the scores are."""
    a = arguments
    check_output(a.output, [a.data])
    columns = (a.text_column, TOKENS_COLUMN) if a.text_column == TEXT_COLUMN else (a.text_column,)
    with process_state().main_process_first():
        documents = read_documents(a.data, columns, a.dataset_config, a.dataset_split)
    assert isinstance(documents, Dataset)
    model, tokenizer = load_to_answer(a.model)
    autocast = AUTOCAST["bf16"] if a.bf16 else None
    scored = score_documents(documents, cast(nn.Module, model), tokenizer, a.method, a.max_length, a.text_column, autocast)
    if not process_state().is_main_process:
        return
    path = write_rows(scored, a.output)
    found = sorted(score for score in scored[SCORE_COLUMN] if score is not None)
    half = found[len(found) // 2] if found else 0.0
    Console(stderr=True).print(
        f"documents: {path}   {len(scored):,}, of {sum(scored[COUNT_COLUMN]):,} tokens; context_score from {found[0] if found else 0:.4g} "
        f"to {found[-1] if found else 0:.4g} nats a token, half of them above {half:.4g}"
    )
