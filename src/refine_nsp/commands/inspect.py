"""`refine-nsp inspect MODEL FILE`: a text as ReFINE sees it, as one page; and what the model is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from refine_nsp.commands.generate import read_text
from refine_nsp.config import PRESETS, SELECTIONS
from refine_nsp.errors import RefineError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="shipped name, folder or hub name")
    parser.add_argument("file", type=Path, help="a UTF-8 text file")
    parser.add_argument("--output", type=Path, default=Path("inspect.html"), help="the page to write [inspect.html]")
    parser.add_argument("--max_tokens", type=int, default=2048, help="read at most so many tokens [2048]")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="context", help="settings to start from [context]")
    parser.add_argument("--selection", choices=SELECTIONS)
    parser.add_argument("--positions_per_sequence", type=int)
    parser.add_argument("--rollout_length", type=int)
    parser.add_argument("--num_generations", type=int)
    parser.add_argument("--reward")
    parser.add_argument("--seed", type=int, default=0)


OVERRIDES = ("selection", "positions_per_sequence", "rollout_length", "num_generations", "reward")


def run(args: Any) -> None:
    """Write the page and print the table of facts."""
    import torch
    from rich.console import Console

    from refine_nsp.config import NSPConfig
    from refine_nsp.files import write_whole
    from refine_nsp.models.load import check_vocabulary, load
    from refine_nsp.nsp.step import ReFINEStep
    from refine_nsp.report.picture import picture_page

    given = {name: getattr(args, name) for name in OVERRIDES if getattr(args, name) is not None}
    config = NSPConfig.preset(args.preset, **given)
    text = read_text(args.file)
    model, tokenizer = load(args.model)
    check_vocabulary(model, tokenizer)
    ids = torch.tensor(tokenizer(text)["input_ids"][: args.max_tokens])
    if len(ids) < config.shortest:
        raise RefineError(f"{args.file} has {len(ids)} tokens; one position needs at least {config.shortest}")
    record = ReFINEStep(model, config).rollout(ids[None], generator=torch.Generator().manual_seed(args.seed))
    facts = model_facts(model, ids)
    path = write_whole(
        args.output, picture_page(f"{args.file.name} as {args.model} reads it", facts, tokenizer, ids, record, config)
    )
    console = Console()
    console.print(facts.rich())
    console.print(f"page: {path}")


def model_facts(model: Any, ids: Any) -> Any:
    """Parameters, state size, and which kernels compute it."""
    import torch

    from refine_nsp.report.tables import Table

    with torch.no_grad():
        cache = model.model(ids[None], use_cache=True).past_key_values
    parameters = sum(p.numel() for p in model.parameters())
    rows: list[list[Any]] = [
        ["family", model.config.model_type],
        ["parameters", f"{parameters:,}"],
        ["layers, hidden size, vocabulary", f"{len(model.model.layers)}, {model.config.hidden_size}, {model.config.vocab_size}"],
        ["weights", str(next(model.parameters()).dtype).removeprefix("torch.")],
        ["state of one row", f"{cache.nbytes / 2**20:.2f} MiB after {len(ids)} tokens"],
        ["kernels", "PyTorch operations of this package"],
    ]
    return Table("Model", ["what", "value"], rows)
