"""The commands of `refine-nsp`, one module each: `add_arguments(parser)` or `options_of()`, and `run(...)`."""

import argparse
import sys
from typing import NoReturn

COMMANDS = {
    "quickstart": "mid-train the shipped base with and without ReFINE, compare, and write a report (minutes, offline)",
    "pretrain": "make a tiny base model from the text on this machine",
    "midtrain": "train a pretrained model on long text with ReFINE (or --objective ntp)",
    "posttrain": "train to answer prompts: SFT, or nested with an update on each batch's prompts first",
    "ttt": "adapt to one prompt, answer it, restore the weights",
    "evaluate": "RULER, LongBench, documents, short contexts, lm-eval's tasks",
    "compare": "two evaluations, example by example, with significance",
    "generate": "continue a prompt, streaming",
    "inspect": "what a model is, and a text as a picture: entropy, chunks, positions, rollouts, rewards",
    "env": "what is installed, which devices there are, what computes each operation and why",
    "estimate": "memory and time of a training step on a device, before anything is loaded",
    "completion": "a script for bash, zsh or fish that completes commands, flags and choices",
    "export": "a plain model folder from LoRA adapters (merged), or from a checkpoint in shards",
    "report": "one HTML page comparing runs",
}
FROM_DATACLASSES = (
    "pretrain",
    "midtrain",
    "posttrain",
    "ttt",
    "evaluate",
    "inspect",
    "estimate",
)  # flags and YAML; the others have a few flags of their own
USAGE = 2  # exit code where a flag's value is not of its type


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all our errors; its usage is for --help."""

    def error(self, message: str) -> NoReturn:
        refuse(self.prog, message)


def refuse(program: str, message: str) -> NoReturn:
    """End for flags that cannot be read."""
    text = " ".join(message.split())
    sys.stderr.write(f"refine-nsp: {text if len(text) <= 600 else text[:600] + '…'}; `{program} --help` explains the flags\n")
    raise SystemExit(USAGE)
