"""Running out of memory, said in one line: which part of a step asked for too much, and which settings make it ask for less."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from refine_nsp.errors import RefineError

# What a part of a step is called in the line, and what makes it smaller.
PARTS = {
    "loading": ("the weights", "load them in bfloat16 (dtype), or over several devices (recipes/accelerate)"),
    "forward": (
        "the forward pass",
        "set gradient_checkpointing or segment_tokens, or lower per_device_train_batch_size or max_length",
    ),
    "context": (
        "the pass over local windows",
        "lower per_device_train_batch_size or local_window, or keep the scores with the data: context_scores=cached",
    ),
    "logits": ("the head's logits and losses", "lower per_device_train_batch_size or max_length"),
    "rollouts": ("the rollouts", "lower num_generations, positions_per_sequence or per_device_train_batch_size"),
    "backward": (
        "the backward pass",
        "set gradient_checkpointing or segment_tokens, or lower per_device_train_batch_size, num_generations or max_length",
    ),
    "optimizer": (
        "the optimizer step",
        "set use_peft or an optim with a smaller state (adafactor), or share the state out (recipes/accelerate, FSDP)",
    ),
    "validation": ("the validation", "lower per_device_eval_batch_size or max_length"),
    "evaluation": ("the evaluation", "lower batch_tokens or lengths"),
}
LEARNING_NOTHING = ("validation", "evaluation")  # what lowers a training step's memory would be no help there
inside: list[str] = []  # parts that are under way, the innermost last
MESSAGES = ("out of memory", "DefaultCPUAllocator: can't allocate memory")


class OutOfMemory(RefineError, torch.OutOfMemoryError):
    """One line, and still what callers who try smaller batches look for (accelerate reads the first sentence)."""


@contextmanager
def part(name: str) -> Iterator[None]:
    """Of a step, one of `PARTS`: memory that runs out inside is an `OutOfMemory` that names it. Parts nest; the innermost is named."""
    inside.append(name)
    try:
        yield
    except OutOfMemory as inner:
        if name not in LEARNING_NOTHING:
            raise
        raise OutOfMemory(_line(name, str(inner.__cause__))) from inner.__cause__
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(known in str(error) for known in MESSAGES):
            raise
        raise OutOfMemory(_line(name, str(error))) from error
    finally:
        inside.pop()


def _line(name: str, text: str) -> str:
    what, remedy = PARTS[name]
    return f"{_first_sentence(text)}. In {what}{_asked_for(text)}: {remedy}"


def _first_sentence(text: str) -> str:
    known = next((m for m in MESSAGES if m in text), MESSAGES[0])
    device = next((d for d in ("CUDA", "HIP", "XPU", "MPS backend") if f"{d} {known}" in text), None)
    return known if device is None else f"{device} {known}"


def _asked_for(text: str) -> str:
    """How much, where the message says so."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMGT]iB)", text)
    if found is None:
        return ""
    number, unit = found.groups()
    return (
        f", which asked for {float(number) / 2**30:.2f} GiB more"
        if unit == "bytes"
        else f", which asked for {number} {unit} more"
    )
