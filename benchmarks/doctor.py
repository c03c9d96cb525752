"""What `refine-nsp check` finds on tiny random models of every hybrid that transformers has: `python -m benchmarks.doctor [NAME ...]`.

Prints two Markdown tables, a model a row: called as transformers calls it, and with states as this library calls it. Columns in which
nothing fails are named below. Weights are random (seed 0) and float32, on PyTorch's operations; what fails is the code's doing, not theirs.
"""

from __future__ import annotations

import sys
import warnings

import torch
import transformers
from tests.models.families import build
from tests.models.transformers_models import CONFIGS, OTHERS
from transformers import AutoModelForCausalLM

from refine_nsp.errors import RefineError
from refine_nsp.models import with_states
from refine_nsp.models.checks import Diagnosis, diagnose
from refine_nsp.models.checks.lines import LINES

OURS = ("delta_net", "gated_deltanet", "lact_swiglu")
# Columns of the table: lines of the doctor under one heading. A cell says the worst of its lines.
COLUMNS = {
    "continues": ("continuation",),
    "positions": ("positions",),
    "one by one": ("single_tokens",),
    "states": ("states",),
    "right pads": ("right_padding",),
    "left pads": ("left_padding", "pads_content"),
    "decoded behind pads": ("padded_continuation",),
    "rows": ("rows", "batch_size"),
    "packed: position_ids": ("packed_position_ids",),
    "packed: cu_seq_lens": ("packed_cu_seqlens",),
    "packed: collator": ("packed_collator",),
    "gradient": ("gradient",),
    "generate": ("generation",),
    "checkpointing": ("checkpointing",),
    "and a cache": ("checkpointing_cache",),
    "saved": ("save_and_load",),
    "bf16 states": ("state_precision",),
}
assert {name for names in COLUMNS.values() for name in names} == {line.name for line in LINES} - {"kernels", "recurrence"}


def model_of(name: str) -> torch.nn.Module:
    """Make a tiny model in float32, every parameter moved off its initial value."""
    if name in OURS:
        return build(name, dtype=torch.float32)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config((CONFIGS | OTHERS)[name]()).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def cells(found: Diagnosis) -> list[str]:
    """Write a row: yes; where something fails its error in bold, or that it raises or returns none; refuses; - where it is not asked."""
    by_name = {f.name: f for f in found.findings}
    row = []
    for names in COLUMNS.values():
        asked = [by_name[name] for name in names if by_name[name].status != "skipped"]
        failed = [f for f in asked if f.status == "fails"]
        if failed:
            errors = [f.error_in_float64 if f.error_in_float64 is not None else f.error for f in failed]
            known = [e for e in errors if e is not None]
            row.append(f"**{max(known):.0e}**" if known else "**raises**" if "fails with" in failed[0].why else "**none**")
        elif asked:
            row.append("yes")
        else:
            row.append("refuses" if by_name[names[0]].why.startswith("refused") else "-")
    return row


def ask(name: str, states: bool) -> tuple[list[str], list[str]]:
    """Ask one model; return its row, and in words why something fails or is not asked."""
    model = model_of(name)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            if states and name not in OURS:
                with_states(model)
        except RefineError as error:
            return [f"{name}: not supported", *[""] * len(COLUMNS)], [f"{name}: {error}"]
    found = diagnose(model)
    why = [f"{name}: {f.name}: {f.why}" for f in found.findings if f.why and f.name not in ("kernels", "recurrence")]
    return [f"{name}{' (by tokens)' if any('read again' in str(w.message) for w in said) else ''}", *cells(found)], why


def show(rows: list[list[str]]) -> None:
    """Print the columns in which something fails, and name the others."""
    told = [i for i in range(1, len(COLUMNS) + 1) if any(row[i] not in ("yes", "-", "") for row in rows)]
    heads = ["model", *(list(COLUMNS)[i - 1] for i in told)]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for row in rows:
        print("| " + " | ".join([row[0], *(row[i] for i in told)]) + " |")
    print(f"\nHolds for all: {', '.join(name for i, name in enumerate(COLUMNS, 1) if i not in told)}.\n")


def main(names: list[str]) -> None:
    """Print both tables, then every failure in words."""
    words: list[str] = []
    for states in (False, True):
        rows = []
        for name in names or [*CONFIGS, *OTHERS, *OURS]:
            if name in OURS and not states:
                continue
            row, why = ask(name, states)
            rows.append(row)
            words += [f"{'with states: ' if states else ''}{line}" for line in why]
            sys.stderr.write(f"{name}\n")
        print(f"transformers {transformers.__version__}, torch {torch.__version__}, {'with states' if states else 'as it is'}\n")
        show(rows)
    print("\n".join(words))


if __name__ == "__main__":
    main(sys.argv[1:])
