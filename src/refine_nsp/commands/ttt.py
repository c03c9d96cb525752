"""`refine-nsp ttt`: answer a prompt after adapting to it, next to the plain answer, with what that cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from refine_nsp.commands.grammar import Call, Command, Settings
from refine_nsp.commands.shared import (
    DEFAULT_MODEL,
    TEST_TIME,
    ReadingArguments,
    TestTimeArguments,
    encode_reading,
    load_to_answer,
    read_text,
)
from refine_nsp.config import check_ranges
from refine_nsp.fields import setting
from refine_nsp.models.generation import Decoding, Request, decode, end_tokens, prefill
from refine_nsp.models.protocols import CausalModel
from refine_nsp.report.tables import Cell, Table
from refine_nsp.training.test_time import TestTimeConfig, TestTimeTrainer, nbytes


@dataclass
class PromptArguments:
    """Give the prompt to answer.

    Attributes:
        model_name_or_path: a shipped model, a folder or a hub name.
        prompt: the prompt.
        prompt_file: or a UTF-8 file with it.
        max_new_tokens: tokens to generate, greedily.
    """

    model_name_or_path: str = setting(DEFAULT_MODEL, common=True)
    prompt: str | None = setting(None, common=True)
    prompt_file: Path | None = setting(None, common=True)
    max_new_tokens: int = setting(32, common=True)

    def __post_init__(self) -> None:
        check_ranges(self, [(("max_new_tokens",), lambda x: x >= 1, "must be at least 1")])


COMMAND = Command(
    "Adapt to a prompt, answer it, and restore the weights.",
    (
        Settings(PromptArguments, "prompt"),
        Settings(ReadingArguments, "prompt"),
        replace(TEST_TIME[0], skip=("ttt_batch_size",)),
        *TEST_TIME[1:],
    ),
    positional=("model_name_or_path",),
    exclusive=((("prompt", "prompt_file"), True),),
    dry_run=True,
)


def run(call: Call, prompt: PromptArguments, reading: ReadingArguments, ttt: TestTimeArguments, config: TestTimeConfig) -> None:
    """Answer without and with adaptation, and print both with seconds and memory."""
    text = read_text(prompt.prompt_file) if prompt.prompt_file is not None else str(prompt.prompt)
    config = replace(config, objective=ttt.ttt or "refine")
    if call.dry_run:
        Console().print(str(config))
        return
    model, tokenizer = load_to_answer(prompt.model_name_or_path)
    # The weights learn what the prompt says once; a second copy would teach them to copy.
    once, ids = encode_reading(tokenizer, text, reading, "--prompt or --prompt_file with some text")
    request = Request(0, ids, prompt.max_new_tokens)
    trainer = TestTimeTrainer(model, config)
    plain, plain_seconds = answer(model, tokenizer, request)
    with trainer.adapt(once):
        adapted, adapted_seconds = answer(model, tokenizer, request)
    last = trainer.last
    assert last is not None
    rows: list[list[Cell]] = [
        ["plain", plain, f"{plain_seconds:.2f}", "0.0"],
        [f"adapted ({config.objective})", adapted, f"{last.seconds + adapted_seconds:.2f}", f"{last.extra_bytes / 2**20:.1f}"],
    ]
    read = f" ({len(ids):,} as read twice, to answer)" if reading.read_twice else ""
    losses = " -> ".join(f"{x:.4f}" for x in last.losses)
    notes = [
        f"{len(once):,} prompt tokens{read}; model {nbytes(list(model.parameters())) / 2**20:.1f} MiB; adapting took "
        f"{last.seconds:.2f} s of the second row; loss by step {losses}; the weights are "
        f"{'as adapted' if config.scope == 'never' else 'restored'}",
        "extra memory: copies of what changes (or adapters) and the optimizer's state",
    ]
    Console().print(Table("Plain and adapted", ["", "answer", "seconds", "extra MiB"], rows, notes).rich())


def answer(model: CausalModel, tokenizer: PreTrainedTokenizerBase, request: Request) -> tuple[str, float]:
    """Return the greedy answer and the seconds it took."""
    start = time.perf_counter()
    hidden, cache = prefill(model, [request.ids])
    tokens = decode(model, hidden, cache, [request], end_tokens(model, tokenizer), Decoding())[0]
    return str(tokenizer.decode(tokens, skip_special_tokens=True)), time.perf_counter() - start
