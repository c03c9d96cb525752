"""`refine-nsp inspect MODEL [FILE]`: show what a model is, and a text as ReFINE sees it, as one page."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from refine_nsp.commands.grammar import Call, Command, Settings
from refine_nsp.commands.shared import DEFAULT_MODEL, read_text
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

TOKENS = 256  # the state is measured after so many, of no text in particular, where there is no file

WITH_TEXT = Reader("a text to look at, by file", lambda a: a.file is not None)


@dataclass
class InspectArguments:
    """Name the model and the text to look at.

    Attributes:
        model_name_or_path: a shipped model, a folder or a hub name.
        file: a UTF-8 text file; without one only the model is described.
        output: the page to write.
        max_tokens: read at most so many tokens.
        seed: of positions and rollouts.
    """

    model_name_or_path: str = setting(DEFAULT_MODEL, common=True)
    file: Path | None = setting(None, common=True)
    output: Path = setting(Path("inspect.html"), read_by=WITH_TEXT, common=True)
    max_tokens: int = setting(2048, read_by=WITH_TEXT, common=True)
    seed: int = setting(0, read_by=WITH_TEXT, common=True)

    def __post_init__(self) -> None:
        check_read(self)


COMMAND = Command(
    "Show what a model is, and a text as a picture: entropy, chunks, positions, rollouts, rewards.",
    (Settings(InspectArguments, "model and text"), Settings(NSPConfig, "next-sequence prediction", preset="context")),
    positional=("model_name_or_path", "file"),
    dry_run=True,
)


def run(call: Call, arguments: InspectArguments, config: NSPConfig) -> None:
    """Print the table of facts; with a file, write the page."""
    console = Console()
    if arguments.file is None:
        check_only_model(call)
    elif not config.samples_rollouts:
        raise RefineError(f"inspect shows rollouts, and estimator={config.estimator!r} makes none; use estimator=sampled")
    if call.dry_run:
        console.print(str(config))
        return
    if arguments.file is None:
        model = load_model(arguments.model_name_or_path)
        console.print(model_facts(model, torch.arange(TOKENS) % model.config.vocab_size).rich())
        return
    text = read_text(arguments.file)
    model, tokenizer = load(arguments.model_name_or_path)
    check_vocabulary(model, tokenizer)
    ids = torch.tensor(encode_prompt(tokenizer, text)[: arguments.max_tokens])
    if len(ids) < config.shortest:
        raise RefineError(f"{arguments.file} has {len(ids)} tokens; one position needs at least {config.shortest}")
    record = ReFINEStep(model, config).sample(ids[None], generator=torch.Generator().manual_seed(arguments.seed))
    facts = model_facts(model, ids)
    title = f"{arguments.file.name} as {arguments.model_name_or_path} reads it"
    path = write_atomically(arguments.output, picture_page(title, facts, tokenizer, ids, record, config))
    console.print(facts.rich())
    console.print(f"page: {path}")


def check_only_model(call: Call) -> None:
    """Refuse settings of the method where there is no text that they could select positions in."""
    names = {f.name for f in fields(NSPConfig)} | {"preset"}
    if changed := [f"{name}={value!r}" for name, value in call.changed().items() if name in names]:
        raise RefineError(f"nothing reads {', '.join(changed)} (needs {WITH_TEXT.words}); give a text as well, or leave them out")


def model_facts(model: CausalModel, ids: Tensor) -> Table:
    """Describe a model: its parameters, the size of its state after `ids` [T], and which kernels compute it."""
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
