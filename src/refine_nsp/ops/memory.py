"""Say in one line that memory ran out: which part of a step asked for too much, and which settings make it ask for less.

Parts are named where they run; callers further up, who know more settings than the method's, may add remedies of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from refine_nsp.errors import RefineError

# The words for each part of a step, and what makes it smaller whoever runs it.
PARTS = {
    "loading": ("the weights", "load them in bfloat16 (dtype), or over several devices (recipes/accelerate)"),
    "forward": ("the forward pass", "set segment_tokens, or give it fewer or shorter sequences"),
    "context": ("the pass over local windows", "lower local_window, or give it fewer sequences"),
    "teacher": ("the teacher's pass", "give it fewer or shorter sequences, or a smaller teacher"),
    "logits": ("the head's logits and losses", "give it fewer or shorter sequences"),
    "rollouts": ("the rollouts", "lower num_generations or positions_per_sequence, or give it fewer sequences"),
    "backward": ("the backward pass", "set segment_tokens, lower num_generations, or give it fewer or shorter sequences"),
    "optimizer": ("the optimizer step", "train fewer weights (adapters), or choose an optimizer with a smaller state"),
    "validation": ("the validation", "give it fewer or shorter sequences"),
    "evaluation": ("the evaluation", "give it fewer or shorter sequences"),
}
inside: list[str] = []  # names of the parts that are under way, the innermost last
MESSAGES = ("out of memory", "DefaultCPUAllocator: can't allocate memory")


class OutOfMemory(RefineError, torch.OutOfMemoryError):
    """Memory ran out in one part of a step.

    It is a `torch.OutOfMemoryError` too, whose first sentence callers who try smaller batches look for (accelerate does).
    """

    def __init__(self, part: str, reported: str, remedy: str) -> None:
        super().__init__(f"{_first_sentence(reported)}. In {PARTS[part][0]}{_asked_for(reported)}: {remedy}")
        self.part, self.reported = part, reported


@contextmanager
def part(name: str, remedies: Mapping[str, str] | None = None) -> Iterator[None]:
    """Name the part of a step, one of `PARTS`, that runs inside: memory that runs out there becomes an `OutOfMemory` that names it.

    Parts nest, and the innermost is named. The outermost `remedies`, by part and with one for `name` itself, decide what is advised: a
    caller who gives some is named in the place of an inner part that these leave out, whose usual advice would not help there (a
    validation keeps nothing for a backward pass).
    """
    inside.append(name)
    try:
        yield
    except OutOfMemory as inner:
        if remedies is None:
            raise
        named = inner.part if inner.part in remedies else name
        raise OutOfMemory(named, inner.reported, remedies[named]) from inner.__cause__
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(known in str(error) for known in MESSAGES):
            raise
        raise OutOfMemory(name, str(error), (remedies or {}).get(name, PARTS[name][1])) from error
    finally:
        inside.pop()


def _first_sentence(reported: str) -> str:
    known = next((m for m in MESSAGES if m in reported), MESSAGES[0])
    device = next((d for d in ("CUDA", "HIP", "XPU", "MPS backend") if f"{d} {known}" in reported), None)
    return known if device is None else f"{device} {known}"


def _asked_for(reported: str) -> str:
    """Say how much was asked for, where the allocator's message tells it."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMGT]iB)", reported)
    if found is None:
        return ""
    number, unit = found.groups()
    amount = f"{float(number) / 2**30:.2f} GiB" if unit == "bytes" else f"{number} {unit}"
    return f", which asked for {amount} more"
