"""Measure what reading a context twice does to the shipped bases on RULER, next to test-time training; write it into docs/results.md.

    python benchmarks/read_twice.py --essays emerson_essays.jsonl

Every base answers the same prompts (seed 42) greedily: once, twice, and after a step of test-time training both ways. Blocks of prompts
take turns over all cells, so all cells have equally many prompts whenever it is stopped; a second call answers what is missing
(runs/read_twice), and --so_far only writes the tables. Scores of all prompts are kept in benchmarks/study/records/read_twice.json.gz.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from transformers import PreTrainedTokenizerBase

import refine_nsp
from refine_nsp.evaluation.arguments import EvaluationArguments
from refine_nsp.evaluation.run import claim_folder, read_rows, rows_path
from refine_nsp.evaluation.tasks import Context, GenerationTask, build_tasks
from refine_nsp.files import append_json_lines
from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.prompts import ruler
from refine_nsp.prompts.encoding import content_key
from refine_nsp.training.test_time import TestTimeConfig, TestTimeTrainer
from study import twice
from study.settings import BASES

TASKS = (*ruler.NEEDLES, "vt", "fwe")  # cwe does not fit into 1,024 tokens; the bases answer no question of qa_1
LENGTHS = (1024, 2048)
LEARNING_RATE = 3e-4  # of a step of NTP on the prompt, as chosen in docs/results.md
BATCH_TOKENS = 65536
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "results.md"


Models = dict[str, tuple[FastWeightForCausalLM, PreTrainedTokenizerBase]]


@dataclass(frozen=True)
class Stage:
    """Say in which two ways, once and twice, how many prompts of a cell are answered."""

    ways: tuple[str, str]
    samples: int
    tasks: tuple[str, ...]
    adapted: bool


def cell(task: GenerationTask, length: int) -> list[str]:
    """List the ids of the prompts of a length, in their order."""
    return [e.id for e in task.examples if e.meta["length"] == length]


def answer(tasks: Sequence[GenerationTask], context: Context, out: Path, read_twice: bool, part: slice) -> None:
    """Answer a block of prompts of every cell, but for those that have an answer. All tasks have one score and are answered together."""
    asked = {i: (task, question) for task in tasks for i, question in task.questions().items()}
    block = [i for task in tasks for length in LENGTHS for i in cell(task, length)[part]]
    known = {i for task in tasks for i in read_rows(out, task.name)}
    wanted = [i for i in block if i not in known]
    everything = replace(tasks[0], examples=[e for task in tasks for e in task.examples], read_twice=read_twice)
    for row in everything.rows(wanted, replace(context, cost={})) if wanted else ():
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


def seconds_of(output_dir: Path, base: str) -> tuple[float, float, float] | None:
    """Return the medians of what a prompt took with test-time training: seconds to adapt, to answer, and to answer it read twice."""
    once, read_twice = (
        [row.meta for name in ruler.NEEDLES for row in read_rows(folder_of(output_dir, base, way), name).values()]
        for way in (twice.ADAPTED, twice.ADAPTED_TWICE)
    )
    if not once or not read_twice:
        return None
    a, b, c = ((once, "adapt_seconds"), (once, "answer_seconds"), (read_twice, "answer_seconds"))
    return tuple(median(m[key] for m in rows) for rows, key in (a, b, c))


def folder_of(output_dir: Path, base: str, way: str) -> Path:
    return output_dir / base.replace(" ", "_") / way.replace(", ", "_")


def build(arguments: EvaluationArguments, models: Models) -> dict[str, list[GenerationTask]]:
    """Build the prompts for each base; those with the same tokenizer share them."""
    tasks: dict[str, list[GenerationTask]] = {}
    built: dict[str, list[GenerationTask]] = {}
    for name, (_, tokenizer) in models.items():
        key = content_key(tokenizer)
        if key not in built:
            built[key] = [t for t in build_tasks(arguments, tokenizer) if isinstance(t, GenerationTask)]
        tasks[name] = built[key]
    return tasks


def answer_all(models: Models, tasks: dict[str, list[GenerationTask]], stages: Sequence[Stage], out: Path, block: int) -> None:
    """Answer every stage, a block of prompts of all bases, tasks and lengths at a time."""
    start = time.monotonic()
    for stage in stages:
        for first in range(0, stage.samples, block):
            last = min(first + block, stage.samples)
            for name, (model, tokenizer) in models.items():
                config = TestTimeConfig(objective="ntp", learning_rate=LEARNING_RATE)
                adapter = TestTimeTrainer(model, config) if stage.adapted else None
                context = Context(model.eval(), tokenizer, BATCH_TOKENS, adapter)
                chosen = [t for t in tasks[name] if t.name in stage.tasks]
                for way, read_twice in zip(stage.ways, (False, True), strict=True):
                    answer(chosen, context, folder_of(out, name, way), read_twice, slice(first, last))
            print(f"{(time.monotonic() - start) / 60:.1f} min: {stage.ways[0]}, prompts {first} to {last}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--essays", help="haystack of RULER's needles (default: Python's reference documentation)")
    parser.add_argument("--samples", type=int, default=100, help="prompts of a cell [100]")
    parser.add_argument("--adapted_samples", type=int, default=25, help="prompts of a cell with test-time training; 0: none [25]")
    parser.add_argument("--block", type=int, default=10, help="prompts of a cell that are answered in turn [10]")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/read_twice"))
    parser.add_argument("--record", type=Path, default=twice.RECORD)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--so_far", action="store_true", help="answer nothing: write the tables of what there is")
    args = parser.parse_args()
    given = {"essays": args.essays} if args.essays else {}
    arguments = EvaluationArguments(tasks=list(TASKS), lengths=list(LENGTHS), samples=args.samples, **given)
    claim_folder(args.output_dir, {"tasks": TASKS, "lengths": LENGTHS, "samples": args.samples, **given})
    models = {name: refine_nsp.load(base) for name, base in BASES.items()}
    tasks = build(arguments, models)
    stages = [
        Stage((twice.ONCE, twice.TWICE), args.samples, TASKS, adapted=False),
        Stage((twice.ADAPTED, twice.ADAPTED_TWICE), args.adapted_samples, tuple(ruler.NEEDLES), adapted=True),
    ]
    if not args.so_far:
        answer_all(models, tasks, stages, args.output_dir, args.block)
    scores: twice.Record = {
        name: {
            way: gather([t for t in tasks[name] if t.name in stage.tasks], folder_of(args.output_dir, name, way))
            for stage in stages
            for way in stage.ways
        }
        for name in models
    }
    seconds = {name: found for name in models if (found := seconds_of(args.output_dir, name))}
    essays = Path(args.essays).name if args.essays else "Python's reference documentation"
    twice.keep(scores, twice.notes_of(essays, LEARNING_RATE, seconds), args.record)
    twice.write(args.record, args.document)
    for table in twice.tables_of(args.record):
        print(table.markdown())


if __name__ == "__main__":
    main()
