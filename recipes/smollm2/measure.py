"""Measure what a model knows of text that lies beyond the window, on held-out rows that texts.py wrote.

    python recipes/smollm2/measure.py runs/smollm2/base --teacher runs/smollm2/teacher --texts runs/smollm2/held_out --output base.json

All figures are of one pass over each row, in bfloat16 products, as means over tokens in nats: the loss, and the divergence from the
teacher, by position on novels; the loss of a passage at its first and second reading; that of answers, and the share of answers of which
every token is the likeliest one, which greedy decoding would find. The model is any that transformers loads; the teacher itself is one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import refine_nsp
from refine_nsp.environment import keep_freed_memory
from refine_nsp.files import made_whole, read_json_lines, write_atomically
from refine_nsp.ops.linear_distillation import Lesson, linear_distillation
from refine_nsp.progress import counted

STRETCHES = {
    "0-255": (0, 255),
    "256-511": (255, 511),
    "512-1023": (511, 1023),
}  # of targets: token t is predicted at position t - 1
KINDS = ("novels", "echoes", "facts")
Spans = Sequence[Sequence[int]]


@torch.no_grad()
def hidden_states(model: PreTrainedModel, rows: Sequence[Tensor]) -> list[Tensor]:
    """Run a model over rows [T] one by one; return its last hidden states [T, D] in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        return [model.base_model(row[None], use_cache=False).last_hidden_state[0].bfloat16() for row in counted(rows, "measure")]


def taught(folder: str, texts: Path, rows: dict[str, list[Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    """Return the teacher's hidden states by kind and row, kept beside the texts, and its head [V, D]."""
    teacher, kept = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(), texts / "teacher.safetensors"
    if not kept.exists():
        named = {f"{kind}-{i}": h for kind in KINDS for i, h in enumerate(hidden_states(teacher, rows[kind]))}
        with made_whole(kept.with_suffix(".tmp"), kept) as temporary:
            save_file(named, temporary)
    return load_file(kept), teacher.lm_head.weight.detach()


@torch.no_grad()
def measure(name: str, teacher: str, texts: Path) -> dict[str, float]:
    """Compute all figures of a model."""
    held = {kind: read_json_lines(texts / f"{kind}.jsonl") for kind in KINDS}
    rows = {kind: [torch.tensor(row["input_ids"]) for row in held[kind]] for kind in KINDS}
    known, head = taught(teacher, texts, rows)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    nll: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    kl: list[Tensor] = []
    right: list[float] = []
    for kind in KINDS:
        for i, hidden in enumerate(hidden_states(model, rows[kind])):
            ids, weight = rows[kind][i], model.lm_head.weight.bfloat16()
            n = len(ids) - 1
            found = linear_distillation(
                hidden[:n], weight, Lesson(known[f"{kind}-{i}"][:n], head, ids[1:], torch.ones(n), torch.ones(n))
            )
            assert found.nll is not None
            nll[kind].append(found.nll)
            if kind == "novels":
                kl.append(found.kl)
            for start, end in held[kind][i].get("answers", ()):
                likeliest = (hidden[start - 1 : end - 1] @ weight.T).argmax(-1)
                right.append(float((likeliest == ids[start:end]).all()))
    echoes, places = nll["echoes"], held["echoes"]
    return {
        **{f"loss {name}": float(torch.stack(nll["novels"])[:, a:b].mean()) for name, (a, b) in STRETCHES.items()},
        **{f"kl {name}": float(torch.stack(kl)[:, a:b].mean()) for name, (a, b) in STRETCHES.items()},
        # A passage's first tokens come as a surprise on both readings.
        **{key: mean_of(echoes, [row[key] for row in places], skip=4) for key in ("first", "second")},
        "answers": mean_of(nll["facts"], [row["answers"] for row in held["facts"]]),
        "answers right": sum(right) / len(right),
    }


def mean_of(nll: Sequence[Tensor], places: Sequence[Spans], skip: int = 0) -> float:
    """Average the loss over places [start, end) of tokens, without the first `skip` of each."""
    parts = [x[start + skip - 1 : end - 1] for x, spans in zip(nll, places, strict=True) for start, end in spans]
    return float(torch.cat(parts).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    keep_freed_memory()
    figures = measure(args.model, args.teacher, args.texts)
    write_atomically(args.output, json.dumps(figures, indent=1) + "\n")
    print(args.model, *(f"{name}: {value:.3f}" for name, value in figures.items()), sep="\n  ")


if __name__ == "__main__":
    assert refine_nsp  # registers its models with transformers' Auto classes
    main()
