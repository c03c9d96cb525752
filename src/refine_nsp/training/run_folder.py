"""A run's folder holds one run: its checkpoints and records, rollouts among these, and set aside in it what an earlier run left there."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refine_nsp.errors import RefineError
from refine_nsp.files import append_json_lines, read_json_lines, write_atomically
from refine_nsp.nsp.records import StepResult
from refine_nsp.training.checkpoints import PLAIN_FILES, Checkpoint

METRICS_FILE, COMPLETIONS_FILE = "metrics.jsonl", "completions.jsonl"
EARLIER = "earlier-{}"
PREFIX_TOKENS = 16  # of the text before a rollout, so many are shown
# A run writes these in addition to its checkpoints; a model's plain files belong to it only where its weights are there too.
WRITTEN = (
    METRICS_FILE, COMPLETIONS_FILE, "config.yaml", "environment.json", "trainer_state.json", "training_args.bin", "README.md",
    "curves.svg", "report.html", "model*.safetensors*", "adapter_*",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """Keep a run in its folder, `output_dir`."""

    path: Path

    def checkpoint(self, step: int) -> Checkpoint:
        """Name the checkpoint after so many steps, whether it is there or not."""
        return Checkpoint(self.path / f"checkpoint-{step}")

    def checkpoints(self) -> list[Checkpoint]:
        """List the checkpoints, whole or not, newest first."""
        steps = [int(p.name.rsplit("-", 1)[1]) for p in self.path.glob("checkpoint-*") if p.name.rsplit("-", 1)[1].isdecimal()]
        return [self.checkpoint(step) for step in sorted(steps, reverse=True)]

    def last_complete(self) -> Checkpoint | None:
        """Find the newest checkpoint that can be read to its end, and warn of every one that is passed over."""
        for checkpoint in self.checkpoints():
            if (problem := checkpoint.problem()) is None:
                return checkpoint
            warnings.warn(f"{checkpoint.path.name} is not complete ({problem}); the one before it is taken", stacklevel=2)
        return None

    def to_resume(self, given: str | bool | Path | None) -> Checkpoint | None:
        """Return the checkpoint that `resume_from_checkpoint` means: a folder, or the last complete one; None for a new run. RefineError
        where there is none, or it is not complete."""
        if not given:
            return None
        if given is True or given in ("last", "True", "true"):
            if (last := self.last_complete()) is None:
                raise RefineError(f"nothing to resume: {self.path} has no complete checkpoint")
            return last
        checkpoint = Checkpoint(Path(given))
        if (problem := checkpoint.problem()) is not None:
            raise RefineError(f"cannot resume from {given}: {problem}; resume_from_checkpoint=last takes the newest complete one")
        return checkpoint

    def begin(self, resumed: Checkpoint | None, own: Sequence[object]) -> None:
        """Have the folder hold this run alone: unless one of its checkpoints is resumed from, set an earlier run aside, saying so.
        `own` are the records that this run has written itself, before it began."""
        if resumed is not None and resumed.path.resolve().parent == self.path.resolve():
            return
        if (aside := self.set_aside(len(own))) is not None:
            last = next(iter(RunFolder(aside).checkpoints()), None)
            how = f"; to continue it, resume_from_checkpoint={last}" if last is not None else ""
            warnings.warn(f"{self.path} had an earlier run in it, which is in {aside} now{how}", stacklevel=4)

    def set_aside(self, own: int) -> Path | None:
        """Move what an earlier run left into a folder inside this one, and return that; None where there was nothing. The last `own`
        records are this run's, and stay."""
        records = read_json_lines(self.path / METRICS_FILE)
        checkpoints = self.checkpoints()
        if len(records) <= own and not checkpoints:
            return None
        from refine_nsp.report.card import is_ours  # imports matplotlib, which nothing needed before

        weights = [*self.path.glob("model*.safetensors"), *self.path.glob("adapter_*")]
        patterns = (*WRITTEN, *(PLAIN_FILES if weights else ()))
        files = {p for pattern in patterns for p in self.path.glob(pattern) if p.name != "README.md" or is_ours(p)}
        aside = next(p for n in count(1) if not (p := self.path / EARLIER.format(n)).exists())
        aside.mkdir()
        for path in sorted({*(c.path for c in checkpoints), *files}):
            os.replace(path, aside / path.name)
        if own:
            write_atomically(aside / METRICS_FILE, "".join(json.dumps(r) + "\n" for r in records[: len(records) - own]))
            append_json_lines(self.path / METRICS_FILE, records[len(records) - own :])
        return aside


def completion_rows(
    tokenizer: PreTrainedTokenizerBase | None, input_ids: Tensor, result: StepResult, limit: int
) -> list[dict[str, Any]]:
    """Make a row of each rollout, of the first `limit` of a batch; without a tokenizer with ids instead of text."""

    def text(ids: Tensor) -> str:
        return str(tokenizer.decode(ids.tolist())) if tokenizer is not None else " ".join(map(str, ids.tolist()))

    rows: list[dict[str, Any]] = []
    assert result.rollouts is not None and result.positions is not None
    assert result.rewards is not None and result.advantages is not None
    K = result.rollouts.shape[3]
    for b, p, n in product(*map(range, result.rollouts.shape[:3])):
        if (t := int(result.positions[b, p])) < 0 or len(rows) >= limit:
            continue
        rows.append(
            {
                "position": t,
                "prefix": text(input_ids[b, max(0, t + 1 - PREFIX_TOKENS) : t + 1]),
                "truth": text(input_ids[b, t + 1 : t + 1 + K]),
                "rollout": text(result.rollouts[b, p, n]),
                "reward": round(float(result.rewards[b, p, n]), 4),
                "advantage": round(float(result.advantages[b, p, n]), 4),
            }
        )
    return rows


def print_completions(rows: list[dict[str, Any]], step: int) -> None:
    """Print rows of rollouts as a table."""
    table = Table(title=f"rollouts at step {step}", show_lines=False)
    for name in ("position", "prefix", "truth", "rollout", "reward", "advantage"):
        table.add_column(name, justify="left" if name in ("prefix", "truth", "rollout") else "right")
    for row in rows:
        texts = (repr(row[name])[1:-1] for name in ("prefix", "truth", "rollout"))
        table.add_row(str(row["position"]), *texts, f"{row['reward']:.3f}", f"{row['advantage']:+.3f}")
    Console(stderr=True).print(table)
