"""The examples of an optimizer step are dealt out to processes and micro-batches; what a step learns does not depend on how."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from refine_nsp.errors import RefineError
from refine_nsp.files import write_atomically
from refine_nsp.nsp.seeds import generator_of

DEALING_FILE = "dealing.json"


@dataclass(frozen=True)
class Dealing:
    """Record how the examples of an optimizer step are dealt out: `batch` for each of `micro_batches` on each of `processes`."""

    processes: int
    micro_batches: int
    batch: int

    @property
    def examples(self) -> int:
        """Count the examples of an optimizer step."""
        return self.processes * self.micro_batches * self.batch

    def __str__(self) -> str:
        return (
            f"{self.processes} processes x {self.micro_batches} gradient_accumulation_steps x {self.batch} a batch = {self.examples} "
            "examples a step"
        )

    def generators(
        self, seed: int, step: int, process: int, drawn: int, places: Sequence[tuple[int, int]]
    ) -> list[torch.Generator]:
        """Make a generator for every row of a micro-batch, which all of the row's randomness comes from.

        It is seeded by the run's seed, the step, the index of the row's example among all that are drawn as this step begins, and the
        row's document in that example. Batches are dealt to processes in turn, so that index follows from the place in the batch, and is
        the same whatever processes and micro-batches share the examples out.

        Args:
            drawn: micro-batches that this process has drawn before, as optimizer step `step` began. places: (example, document) of
                each row.
        """
        first = (drawn * self.processes + process) * self.batch
        return [generator_of(seed, step, first + example, document) for example, document in places]

    def save(self, folder: Path) -> None:
        """Write the dealing into a checkpoint's folder."""
        write_atomically(folder / DEALING_FILE, json.dumps(asdict(self)) + "\n")

    @classmethod
    def of(cls, folder: Path) -> Dealing | None:
        """Read the dealing of a checkpoint's folder; None where another program made it."""
        path = folder / DEALING_FILE
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def check(self, folder: Path) -> None:
        """Refuse a checkpoint whose steps have another number of examples: only with the same is it known which come next.

        Raises:
            RefineError: both dealings in words, and what to change.
        """
        made = Dealing.of(folder)
        if made is not None and made.examples != self.examples:
            raise RefineError(
                f"{folder} was made with {made}, and this run has {self}: it would continue at another example. Keep the product, for "
                f"example by gradient_accumulation_steps; or begin a new run from the weights (model_name_or_path={folder})"
            )
