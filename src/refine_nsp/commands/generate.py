"""`refine-nsp generate`: continue a prompt, token by token as they come."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TextStreamer

from refine_nsp.commands.grammar import Call, Command, Settings
from refine_nsp.commands.shared import DEFAULT_MODEL, ReadingArguments, encode_reading, load_to_answer, read_text
from refine_nsp.config import check_ranges
from refine_nsp.fields import Reader, check_read, setting

SAMPLING = Reader("sampling, without greedy", lambda a: not a.greedy)
RANGES = (
    (("max_new_tokens",), lambda x: x >= 1, "must be at least 1"),
    (("temperature",), lambda x: x > 0, "must be positive (for the likeliest token use --greedy)"),
    (("seed",), lambda x: 0 <= x < 2**63, "must be a whole number from 0 to 2**63 - 1"),
    (("top_k",), lambda x: x >= 0, "must be at least 1, or 0 for all tokens"),
    (("top_p",), lambda x: 0 < x <= 1, "must be above 0 and at most 1"),
)


@dataclass
class GenerateArguments:
    """Give the prompt, and say how it is continued.

    Attributes:
        model_name_or_path: a shipped model, a folder or a hub name.
        prompt: the text to continue; default: standard input.
        prompt_file: a UTF-8 file to continue.
        max_new_tokens: tokens to generate at most.
        greedy: take the likeliest token instead of sampling.
        temperature: temperature of sampling.
        top_k: sample among so many of the likeliest tokens; 0: among all.
        top_p: sample among the likeliest tokens that have this probability together.
        seed: seed of sampling.
    """

    model_name_or_path: str = setting(DEFAULT_MODEL)
    prompt: str | None = setting(None)
    prompt_file: Path | None = setting(None)
    max_new_tokens: int = setting(128)
    greedy: bool = setting(False)
    temperature: float = setting(1.0, read_by=SAMPLING)
    top_k: int = setting(50, read_by=SAMPLING)
    top_p: float = setting(1.0, read_by=SAMPLING)
    seed: int = setting(0, read_by=SAMPLING)

    def __post_init__(self) -> None:
        check_read(self)
        check_ranges(self, RANGES)


COMMAND = Command(
    "Continue a prompt, token by token as they come.",
    (Settings(GenerateArguments), Settings(ReadingArguments)),
    positional=("model_name_or_path",),
    exclusive=((("prompt", "prompt_file"), False),),
)


def run(call: Call, arguments: GenerateArguments, reading: ReadingArguments) -> None:
    """Stream the continuation to standard output."""
    prompt = arguments.prompt
    if prompt is None:
        prompt = read_text(arguments.prompt_file) if arguments.prompt_file is not None else sys.stdin.read()
    model, tokenizer = load_to_answer(arguments.model_name_or_path)
    torch.manual_seed(arguments.seed)
    _, ids = encode_reading(tokenizer, prompt, reading, "--prompt, --prompt_file or text on standard input")
    sampling = {"temperature": arguments.temperature, "top_k": arguments.top_k, "top_p": arguments.top_p}
    model.generate(
        torch.tensor([ids], device=model.device), attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
        max_new_tokens=arguments.max_new_tokens, do_sample=not arguments.greedy, streamer=TextStreamer(tokenizer),
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0, **({} if arguments.greedy else sampling),
    )  # fmt: skip
