"""Measure what reading a context twice does to the shipped bases on RULER, next to test-time training; write it into docs/results.md.

    python benchmarks/read_twice.py --essays emerson_essays.jsonl

Every base answers the same prompts (seed 42) greedily: once, twice, and after a step of test-time training both ways. Blocks of prompts
take turns over all cells, so all cells have equally many prompts whenever it is stopped; a second call answers what is missing
(runs/read_twice), and --so_far only writes the tables. Scores of all prompts are kept in benchmarks/study/records/read_twice.json.gz.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import refine_nsp
from refine_nsp.environment import environment
from refine_nsp.evaluation.arguments import EvaluationArguments
from refine_nsp.evaluation.run import claim_folder, read_rows, rows_path
from refine_nsp.evaluation.tasks import Adapter, Context, GenerationTask, build_tasks
from refine_nsp.files import append_json_lines, write_atomically, write_bytes_atomically
from refine_nsp.prompts import ruler
from refine_nsp.training.test_time import TestTimeConfig, TestTimeTrainer
from study import twice
from study.settings import BASES

TASKS = (*ruler.NEEDLES, "vt", "fwe")  # cwe does not fit into 1,024 tokens; the bases answer no question of qa_1
LENGTHS = (1024, 2048)
LEARNING_RATE = 3e-4  # of a step of NTP on the prompt, as chosen in docs/results.md
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "results.md"


def cell(task: GenerationTask, length: int) -> list[str]:
    """List the ids of the prompts of a length, in their order."""
    return [e.id for e in task.examples if e.meta["length"] == length]


def answer(
    tasks: Sequence[GenerationTask], context: Context, adapter: Adapter | None, out: Path, read_twice: bool, part: slice
) -> None:
    """Answer a block of prompts of every cell, but for those that have an answer. All tasks have one score and are answered together."""
    asked = {i: (task, question) for task in tasks for i, question in task.questions().items()}
    block = [i for task in tasks for length in LENGTHS for i in cell(task, length)[part]]
    known = {i for task in tasks for i in read_rows(out, task.name)}
    wanted = [i for i in block if i not in known]
    everything = replace(tasks[0], examples=[e for task in tasks for e in task.examples], read_twice=read_twice)
    for row in everything.rows(wanted, replace(context, adapter=adapter, cost={})) if wanted else ():
        task, question = asked[row.id]
        append_json_lines(rows_path(out, task.name, None), [asdict(replace(row, question=question))])


def gather(tasks: Sequence[GenerationTask], out: Path) -> twice.Scores:
    """Collect the scores of every cell, cut to the number of prompts that all cells have."""
    found: twice.Scores = {}
    for task in tasks:
        rows = read_rows(out, task.name)
        for length in LENGTHS:
            ids = cell(task, length)
            answered = [next(iter(rows[i].scores.values())) if i in rows else None for i in ids]
            whole = answered.index(None) if None in answered else len(answered)
            found[f"{task.name} {length}"] = [round(x, 6) for x in answered[:whole] if x is not None]
    fewest = min(map(len, found.values()))
    return {cell: scores[:fewest] for cell, scores in found.items()} if fewest else {}


def seconds(folder: Path) -> list[float]:
    """Return the medians of what a prompt took with test-time training: seconds to adapt, to answer, and to answer it read twice."""
    once, read_twice = (
        [row.meta for n in ruler.NEEDLES for row in read_rows(folder / way.replace(", ", "_"), n).values()]
        for way in (twice.ADAPTED, twice.ADAPTED_TWICE)
    )
    if not once or not read_twice:
        return []
    asked = ((once, "adapt_seconds"), (once, "answer_seconds"), (read_twice, "answer_seconds"))
    return [round(median(m[key] for m in rows), 3) for rows, key in asked]


def write(scores: twice.Record, costs: dict[str, list[float]], essays: str | None, record: Path, document: Path) -> None:
    """Keep the scores, cut to the number of prompts that all bases have, and write the section into the document."""
    for ways in ((twice.ONCE, twice.TWICE), (twice.ADAPTED, twice.ADAPTED_TWICE)):
        there = [scores[base].get(way, {}) for base in scores for way in ways]
        fewest = min((len(x) for s in there for x in s.values()), default=0) if all(there) else 0
        for base in scores:
            for way in ways:
                scores[base][way] = {cell: x[:fewest] for cell, x in scores[base].get(way, {}).items()}
                if not fewest:
                    del scores[base][way]
    n = {way: min(len(x) for s in scores.values() for x in s.get(way, {"": []}).values()) for way in (twice.ONCE, twice.ADAPTED)}
    machine = {k: v for k, v in environment(42).items() if k in ("python", "torch", "transformers", "machine", "cpus")}
    notes = {
        "prompts": f"{n[twice.ONCE]} prompts a cell (seed 42, essays {Path(essays).name if essays else 'the default'}), the same in both "
        f"columns; `python benchmarks/read_twice.py`, a process of one thread, {json.dumps(machine)}. The context is given twice, the "
        "question once; tokens are those of one reading and its answer. Each base is one checkpoint: ± is the standard error over prompts",
        "difference": "paired by prompt, with a 95 % t-interval; * beyond it. About one in twenty is beyond it by chance",
        "costs": "; ".join(f"{base} {a} s to adapt, {b} s to answer, {c} s read twice" for base, (a, b, c) in costs.items()),
        "adapted": f"the 8 needle tasks, the first {n[twice.ADAPTED]} prompts of each cell; adapted: one NTP step (AdamW, "
        f"{LEARNING_RATE}) on the prompt read once, restored after it; paired by prompt, with a 95 % t-interval; * beyond it",
    }
    packed = json.dumps({"scores": scores, "notes": notes}, separators=(",", ":"))
    write_bytes_atomically(record, gzip.compress(packed.encode(), mtime=0))
    before, _, rest = document.read_text(encoding="utf-8").partition(f"\n\n## {twice.TITLE}\n")
    before, found, after = (
        before.partition("\n\n## Earlier bases")
        if not rest
        else (before, "\n\n## Earlier bases", rest.partition("\n\n## Earlier bases")[2])
    )
    write_atomically(document, f"{before}\n{twice.section(record)}{found}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--essays", help="haystack of RULER's needles (default: Python's reference documentation)")
    parser.add_argument("--samples", type=int, default=100, help="prompts of a cell [100]")
    parser.add_argument("--adapted_samples", type=int, default=25, help="prompts of a cell with test-time training; 0: none [25]")
    parser.add_argument("--block", type=int, default=20, help="prompts of a cell that are answered in turn [20]")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/read_twice"))
    parser.add_argument("--record", type=Path, default=twice.RECORD)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--so_far", action="store_true", help="answer nothing: write the tables of what there is")
    args = parser.parse_args()
    models = {name: refine_nsp.load(base) for name, base in BASES.items()}
    given = {"essays": args.essays} if args.essays else {}
    arguments = EvaluationArguments(tasks=list(TASKS), lengths=list(LENGTHS), samples=args.samples, **given)
    claim_folder(args.output_dir, {"tasks": TASKS, "lengths": LENGTHS, "samples": args.samples, **given})
    tasks: dict[str, list[GenerationTask]] = {}
    built: dict[str, list[GenerationTask]] = {}  # by the tokenizer, which the bases may share
    for name, (_, tokenizer) in models.items():
        key = str(tokenizer(" ".join(ruler.NOISE) + ruler.QA_PROMPT)["input_ids"])
        if key not in built:
            built[key] = [t for t in build_tasks(arguments, tokenizer) if isinstance(t, GenerationTask)]
        tasks[name] = built[key]
    start = time.monotonic()
    plain, adapted = ((twice.ONCE, False), (twice.TWICE, True)), ((twice.ADAPTED, False), (twice.ADAPTED_TWICE, True))
    stages = [(plain, args.samples, TASKS), (adapted, args.adapted_samples, tuple(ruler.NEEDLES))]
    for ways, samples, names in stages if not args.so_far else []:
        for first in range(0, samples, args.block):
            for name, (model, tokenizer) in models.items():
                adapter = (
                    TestTimeTrainer(model, TestTimeConfig(objective="ntp", learning_rate=LEARNING_RATE))
                    if ways is adapted
                    else None
                )
                context = Context(model.eval(), tokenizer, 65536)
                chosen = [t for t in tasks[name] if t.name in names]
                for way, read_twice in ways:
                    out = args.output_dir / name.replace(" ", "_") / way.replace(", ", "_")
                    answer(chosen, context, adapter, out, read_twice, slice(first, first + args.block))
            print(
                f"{(time.monotonic() - start) / 60:.1f} min: prompts {first} to {min(first + args.block, samples)} of {ways[0][0]}",
                flush=True,
            )
    scores: twice.Record = {}
    for name in models:
        for ways, _, names in stages:
            for way, _ in ways:
                out = args.output_dir / name.replace(" ", "_") / way.replace(", ", "_")
                scores.setdefault(name, {})[way] = gather([t for t in tasks[name] if t.name in names], out)
    costs = {name: found for name in models if (found := seconds(args.output_dir / name.replace(" ", "_")))}
    write(scores, costs, args.essays, args.record, args.document)
    for table in twice.tables_of(args.record):
        print(table.markdown())


if __name__ == "__main__":
    main()
