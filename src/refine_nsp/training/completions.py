"""Rollouts are shown while training, as a table: position, end of the prefix, truth, rollout, reward and advantage."""

from __future__ import annotations

from itertools import product

from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refine_nsp.nsp.records import StepResult
from refine_nsp.training.run_folder import RunFolder

PREFIX_TOKENS = 16


def completion_rows(
    tokenizer: PreTrainedTokenizerBase | None, input_ids: Tensor, result: StepResult, limit: int
) -> list[dict[str, object]]:
    """Make a row of each rollout, of the first `limit` of a batch; without a tokenizer with ids instead of text."""

    def text(ids: Tensor) -> str:
        return str(tokenizer.decode(ids.tolist())) if tokenizer is not None else " ".join(map(str, ids.tolist()))

    rows: list[dict[str, object]] = []
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


def show_completions(
    tokenizer: PreTrainedTokenizerBase | None, input_ids: Tensor, result: StepResult, folder: RunFolder, step: int, limit: int,
    quiet: bool = False,
) -> None:  # fmt: skip
    """Append the rows to the run's folder, and print them as a table unless `quiet`."""
    rows = completion_rows(tokenizer, input_ids, result, limit)
    folder.log_completions([{"step": step, **row} for row in rows])
    if quiet:
        return
    table = Table(title=f"rollouts at step {step}", show_lines=False)
    for name in ("position", "prefix", "truth", "rollout", "reward", "advantage"):
        table.add_column(name, justify="right" if name in ("position", "reward", "advantage") else "left")
    for row in rows:
        table.add_row(
            str(row["position"]), repr(row["prefix"])[1:-1], repr(row["truth"])[1:-1], repr(row["rollout"])[1:-1],
            f"{row['reward']:.3f}", f"{row['advantage']:+.3f}",
        )  # fmt: skip
    Console(stderr=True).print(table)
