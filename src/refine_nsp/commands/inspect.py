"""`refine-nsp inspect MODEL [FILE]`: what the model is; and a text as ReFINE sees it, as one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from refine_nsp.commands.generate import read_text
from refine_nsp.commands.model_options import DEFAULT_MODEL
from refine_nsp.commands.options import Options, Settings
from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.fields import Reader, check_read, setting
from refine_nsp.files import write_atomically
from refine_nsp.models.load import check_vocabulary, load, load_model
from refine_nsp.models.protocols import CausalModel
from refine_nsp.models.state import FastWeightCache
from refine_nsp.nsp.module import ReFINEStep
from refine_nsp.prompts.encoding import encode_prompt
from refine_nsp.report.picture import picture_page
from refine_nsp.report.tables import Cell, Table

TOKENS = 256  # of no text in particular, that the state is measured after when there is no file

COMMON = (
    "model_name_or_path file output max_tokens preset selection positions_per_sequence rollout_length num_generations reward_funcs seed"
).split()

WITH_TEXT = Reader("a text to look at, by file", lambda a: a.file is not None)


@dataclass
class InspectArguments:
    """What to look at.

    Attributes:
        model_name_or_path: shipped name, folder or hub name (also as the first word).
        file: a UTF-8 text file (also as the second word). None: only what the model is.
        output: the page to write.
        max_tokens: read at most so many tokens.
        seed: of positions and rollouts.
    """

    model_name_or_path: str = setting(DEFAULT_MODEL, common=True)
    file: str | None = setting(None, common=True)
    output: str = setting("inspect.html", read_by=WITH_TEXT, common=True)
    max_tokens: int = setting(2048, read_by=WITH_TEXT, common=True)
    seed: int = setting(0, read_by=WITH_TEXT, common=True)

    def __post_init__(self) -> None:
        check_read(self)


def options_of() -> Options:
    """The command's flags."""
    summary = "What a model keeps and what computes it: refine-nsp inspect MODEL; and a text as a picture: refine-nsp inspect MODEL FILE"
    return Options("inspect", summary, (InspectArguments, Settings(NSPConfig, preset="context")), COMMON)


def run(argv: Sequence[str]) -> None:
    """Print the table of facts; with a file, write the page."""
    options = options_of()
    arguments, config, dry_run = options.parse(positional(argv))
    if arguments.file is not None and not config.samples_rollouts:
        raise RefineError(f"inspect shows rollouts, and estimator={config.estimator!r} makes none; use estimator=sampled")
    if dry_run:
        Console().print(str(config))
        return
    if arguments.file is None:
        model = load_model(arguments.model_name_or_path)
        Console().print(model_facts(model, torch.arange(TOKENS) % model.config.vocab_size).rich())
        return
    text = read_text(Path(arguments.file))
    model, tokenizer = load(arguments.model_name_or_path)
    check_vocabulary(model, tokenizer)
    ids = torch.tensor(encode_prompt(tokenizer, text)[: arguments.max_tokens])
    if len(ids) < config.shortest:
        raise RefineError(f"{arguments.file} has {len(ids)} tokens; one position needs at least {config.shortest}")
    record = ReFINEStep(model, config).sample(ids[None], generator=torch.Generator().manual_seed(arguments.seed))
    facts = model_facts(model, ids)
    title = f"{Path(arguments.file).name} as {arguments.model_name_or_path} reads it"
    path = write_atomically(Path(arguments.output), picture_page(title, facts, tokenizer, ids, record, config))
    console = Console()
    console.print(facts.rich())
    console.print(f"page: {path}")


def positional(argv: Sequence[str]) -> list[str]:
    """`MODEL [FILE] flags` as flags only."""
    words = list(argv)
    names = ["--model_name_or_path", "--file"]
    count = next((i for i, w in enumerate(words[:2]) if w.startswith("-")), min(2, len(words)))
    return [w for pair in zip(names, words[:count], strict=False) for w in pair] + words[count:]


def model_facts(model: CausalModel, ids: Tensor) -> Table:
    """Parameters, size of the state after ids [T] long, and which kernels compute it."""
    with torch.no_grad():
        cache = FastWeightCache()
        model.model(ids[None], past_key_values=cache, use_cache=True)
    parameters = sum(p.numel() for p in model.parameters())
    rows: list[list[Cell]] = [
        ["family", model.config.model_type],
        ["parameters", f"{parameters:,}"],
        ["layers, hidden size, vocabulary", f"{len(model.model.layers)}, {model.config.hidden_size}, {model.config.vocab_size}"],
        ["weights", str(next(model.parameters()).dtype).removeprefix("torch.")],
        ["state of one row", f"{cache.nbytes / 2**20:.2f} MiB after {len(ids)} tokens"],
        ["kernels", model.model.kernels],
    ]
    return Table("Model", ["what", "value"], rows)
