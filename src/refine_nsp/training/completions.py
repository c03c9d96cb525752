"""Rollouts are shown while training, as a table: position, end of the prefix, truth, rollout, reward and advantage."""

from __future__ import annotations

from itertools import product
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refine_nsp.nsp.records import StepResult

PREFIX_TOKENS = 16


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
