"""`refine-nsp ttt`: answer a prompt after adapting to it, beside the plain answer, with what that cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from refine_nsp.commands.generate import read_text
from refine_nsp.commands.model_options import DEFAULT_MODEL, TEST_TIME, positional_model
from refine_nsp.commands.options import Options
from refine_nsp.errors import RefineError
from refine_nsp.fields import setting
from refine_nsp.models.generation import Decoding, Request, decode, end_tokens, prefill
from refine_nsp.models.load import check_vocabulary, load
from refine_nsp.models.protocols import CausalModel
from refine_nsp.processes import to_device
from refine_nsp.prompts.encoding import encode_prompt
from refine_nsp.report.tables import Cell, Table
from refine_nsp.training.test_time import TestTimeTrainer, nbytes

COMMON = (
    "model_name_or_path prompt prompt_file max_new_tokens ttt ttt_preset ttt_steps ttt_learning_rate ttt_parameters ttt_estimator "
    "ttt_order ttt_selection ttt_reward_funcs ttt_positions_per_sequence ttt_rollout_length ttt_lambda_rl ttt_seed"
).split()


@dataclass
class PromptArguments:
    """What to answer.

    Attributes:
        model_name_or_path: a shipped model, a folder or a hub name (also as the first word).
        prompt: the prompt.
        prompt_file: or a UTF-8 file with it.
        max_new_tokens: tokens to generate, greedily.
    """

    model_name_or_path: str = setting(DEFAULT_MODEL, common=True)
    prompt: str | None = setting(None, common=True)
    prompt_file: str | None = setting(None, common=True)
    max_new_tokens: int = setting(32, common=True)


def options_of() -> Options:
    """The command's flags."""
    summary = "Adapt to a prompt, answer it, restore the weights: refine-nsp ttt MODEL --prompt_file FILE"
    return Options("ttt", summary, (PromptArguments, *TEST_TIME), COMMON)


def run(argv: Sequence[str]) -> None:
    """Answer without and with adaptation, and print both with seconds and memory."""
    options = options_of()
    prompt, ttt, config, dry_run = options.parse(positional_model(argv))
    text = text_of(prompt)
    config = replace(config, objective=ttt.ttt or "refine")
    if dry_run:
        Console().print(str(config))
        return
    model, tokenizer = load(prompt.model_name_or_path)
    check_vocabulary(model, tokenizer)
    to_device(model.eval())
    request = Request(0, encode_prompt(tokenizer, text), prompt.max_new_tokens)
    if not request.ids:
        raise RefineError("the prompt is empty: give --prompt or --prompt_file with some text")
    trainer = TestTimeTrainer(model, config)
    plain, plain_seconds = answer(model, tokenizer, request)
    with trainer.adapt(request.ids):
        adapted, adapted_seconds = answer(model, tokenizer, request)
    last = trainer.last
    assert last is not None
    rows: list[list[Cell]] = [
        ["plain", plain, f"{plain_seconds:.2f}", "0.0"],
        [f"adapted ({config.objective})", adapted, f"{last.seconds + adapted_seconds:.2f}", f"{last.extra_bytes / 2**20:.1f}"],
    ]
    losses = " -> ".join(f"{x:.4f}" for x in last.losses)
    notes = [
        f"{len(request.ids):,} prompt tokens; model {nbytes(list(model.parameters())) / 2**20:.1f} MiB; adapting took "
        f"{last.seconds:.2f} s of the second row; loss by step {losses}; the weights are "
        f"{'as adapted' if config.scope == 'never' else 'restored'}",
        "extra memory: copies of what changes (or adapters) and the optimizer's state",
    ]
    Console().print(Table("Plain and adapted", ["", "answer", "seconds", "extra MiB"], rows, notes).rich())


def text_of(arguments: PromptArguments) -> str:
    if (arguments.prompt is None) == (arguments.prompt_file is None):
        raise RefineError("give --prompt or --prompt_file (one of them)")
    if arguments.max_new_tokens < 1:
        raise RefineError(f"--max_new_tokens must be at least 1, got {arguments.max_new_tokens}")
    return arguments.prompt if arguments.prompt is not None else read_text(Path(str(arguments.prompt_file)))


def answer(model: CausalModel, tokenizer: PreTrainedTokenizerBase, request: Request) -> tuple[str, float]:
    """The greedy answer and the seconds it took."""
    start = time.perf_counter()
    hidden, cache = prefill(model, [request.ids])
    tokens = decode(model, hidden, cache, [request], end_tokens(model, tokenizer), Decoding())[0]
    return str(tokenizer.decode(tokens, skip_special_tokens=True)), time.perf_counter() - start
