"""`refine-nsp generate`: continue a prompt, token by token as they come."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import cast

from refine_nsp.errors import RefineError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="refine-nsp/tiny-delta-net", help="shipped name, folder or hub name")
    parser.add_argument("--prompt", help="the text to continue (default: standard input)")
    parser.add_argument("--prompt_file", type=Path, help="a UTF-8 file to continue")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token instead of sampling")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_k", type=int, default=50)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    """Stream the continuation to standard output."""
    import torch
    from transformers import TextStreamer

    from refine_nsp.models.load import check_vocabulary, load
    from refine_nsp.models.protocols import CausalModel
    from refine_nsp.processes import to_device
    from refine_nsp.prompts.encoding import encode_prompt

    prompt = read_prompt(args)
    if args.max_new_tokens < 1:
        raise RefineError(f"--max_new_tokens must be at least 1, got {args.max_new_tokens}")
    if not args.temperature > 0:
        raise RefineError(f"--temperature must be positive, got {args.temperature}; for the likeliest token use --greedy")
    if not 0 <= args.seed < 2**63:
        raise RefineError(f"--seed must be a whole number from 0 to 2**63 - 1, got {args.seed}")
    if args.top_k < 0:
        raise RefineError(f"--top_k must be at least 1, or 0 for all tokens, got {args.top_k}")
    if not 0 < args.top_p <= 1:
        raise RefineError(f"--top_p must be above 0 and at most 1, got {args.top_p}")
    model, tokenizer = load(args.model)
    check_vocabulary(model, tokenizer)
    to_device(model)
    torch.manual_seed(args.seed)
    ids = encode_prompt(tokenizer, prompt)
    if not ids:
        raise RefineError("the prompt is empty: give --prompt, --prompt_file or text on standard input")
    sampling = {} if args.greedy else {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    cast(CausalModel, model).generate(
        torch.tensor([ids], device=model.device), attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
        max_new_tokens=args.max_new_tokens, do_sample=not args.greedy, streamer=TextStreamer(tokenizer),
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0, **sampling,
    )  # fmt: skip


def read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None and args.prompt_file is not None:
        raise RefineError("give --prompt or --prompt_file, not both")
    if args.prompt is not None:
        return args.prompt
    return read_text(args.prompt_file) if args.prompt_file is not None else sys.stdin.read()


def read_text(path: Path) -> str:
    """A UTF-8 file; RefineError when it is missing, empty or something else."""
    if not path.is_file():
        raise RefineError(f"no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RefineError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}") from error
    if not text.strip():
        raise RefineError(f"{path} is empty")
    return text
