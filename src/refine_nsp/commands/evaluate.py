"""`refine-nsp evaluate`: answer the prompts of tasks, resumably, and report the figures with their uncertainty."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from refine_nsp.commands.grammar import Call, Command, Settings
from refine_nsp.commands.shared import DEFAULT_MODEL, TEST_TIME, TestTimeArguments, check_unused, test_time_trainer
from refine_nsp.environment import environment
from refine_nsp.evaluation.arguments import EvaluationArguments
from refine_nsp.evaluation.run import TaskResult, evaluate, read_rows, rows_path, summarise
from refine_nsp.evaluation.tasks import Context, Row, Task, build_tasks, digest
from refine_nsp.fields import setting
from refine_nsp.files import write_atomically
from refine_nsp.models.load import check_vocabulary, load_model, load_tokenizer
from refine_nsp.models.protocols import CausalModel
from refine_nsp.processes import process_state, to_device
from refine_nsp.report.evaluation import results_table, write_evaluation
from refine_nsp.report.tables import Cell, Table
from refine_nsp.training.test_time import TestTimeConfig

# Answers do not depend on these, so they may differ when a run is resumed.
FREE = ("tasks", "batch_tokens", "num_proc", "output_dir")


@dataclass
class RunArguments:
    """Name the model, and the folder that results go to.

    Attributes:
        model_name_or_path: a shipped model, a folder or a hub name.
        tokenizer_name: another tokenizer than the model's.
        dtype: of the weights (float32, bfloat16); default: the checkpoint's.
        output_dir: the run's folder; a second call with the same settings resumes it.
    """

    model_name_or_path: str = setting(DEFAULT_MODEL, common=True)
    tokenizer_name: str | None = setting(None)
    dtype: str | None = setting(None)
    output_dir: str = setting("runs/evaluation", common=True)


COMMAND = Command(
    "Evaluate on RULER, LongBench, documents, short contexts and lm-eval's tasks.",
    (Settings(RunArguments, "model"), Settings(EvaluationArguments, "tasks"), *TEST_TIME),
    description="For example: refine-nsp evaluate MODEL --tasks ruler longbench --output_dir FOLDER",
    positional=("model_name_or_path",),
    dry_run=True,
)


def run(
    call: Call, run_args: RunArguments, arguments: EvaluationArguments, ttt: TestTimeArguments, test_time: TestTimeConfig
) -> None:
    """Build the prompts, answer what is missing, report."""
    check_unused(call)
    arguments.check()
    model = to_device(load_model(run_args.model_name_or_path, dtype=run_args.dtype).eval())
    tokenizer = load_tokenizer(run_args.tokenizer_name or run_args.model_name_or_path)
    check_vocabulary(model, tokenizer)
    tasks = build_tasks(arguments, tokenizer)
    if call.dry_run:
        Console().print(plan(tasks, arguments).rich())
        return
    out = Path(run_args.output_dir)
    adapter, together = test_time_trainer(model, ttt, test_time)
    context = Context(model, tokenizer, arguments.batch_tokens, adapter, together)
    settings: dict[str, object] = {k: v for k, v in call.resolved().items() if k not in FREE}
    settings["weights"] = float(sum(p.detach().double().sum() for p in model.parameters()))
    results = evaluate(tasks, context, out, settings)
    if not process_state().is_main_process:
        return
    results += [r for name in harness_names(arguments) for r in harness_results(name, model, tokenizer, arguments, out)]
    shown = yaml.safe_dump(call.resolved(), sort_keys=True)
    write_atomically(out / "config.yaml", shown)
    console = Console()
    console.print(results_table(results).rich())
    page = write_evaluation(out, results, shown, json.dumps(environment(arguments.seed), indent=1))
    console.print(f"tables: {out / 'results.md'}   report: {page}")


def harness_names(arguments: EvaluationArguments) -> list[str]:
    """List the tasks of lm-eval among those asked for."""
    return [n.partition(":")[2] for n in arguments.names() if n.startswith("lm_eval:")]


def harness_results(
    name: str, model: CausalModel, tokenizer: PreTrainedTokenizerBase, arguments: EvaluationArguments, out: Path
) -> list[TaskResult]:
    """Answer an lm-eval task (or each in a group) and keep its rows like our own; lm-eval's aggregates are kept in a file of their own."""
    aggregates = out / "lm_eval" / f"{name}.json"
    if not aggregates.exists():
        from refine_nsp.evaluation.harness import run_harness

        results = run_harness(model, tokenizer, name, arguments.limit, arguments.batch_tokens, arguments.seed)
        for task, samples in results["samples"].items():
            lines = [json.dumps(asdict(harness_row(s)), ensure_ascii=False) for s in samples]
            write_atomically(rows_path(out, f"lm_eval:{task}", None), "\n".join(lines) + "\n")
        kept = {"tasks": sorted(results["samples"]), "results": results["results"]}
        write_atomically(aggregates, json.dumps(kept, indent=1, default=str) + "\n")
    tasks = [f"lm_eval:{task}" for task in json.loads(aggregates.read_text(encoding="utf-8"))["tasks"]]
    return [summarise(task, list(read_rows(out, task).values())) for task in tasks]


def harness_row(sample: Mapping[str, Any]) -> Row:
    """Convert a sample of lm-eval to a row; figures that are no numbers (perplexity's sums) stay in its aggregates."""
    scores = {m: float(sample[m]) for m in sample.get("metrics", []) if isinstance(sample.get(m), int | float)}
    asked = [sample.get(name, "") for name in ("doc_hash", "prompt_hash", "target_hash")]
    question = digest(*asked) if any(asked) else ""
    return Row(
        str(sample["doc_id"]), str(sample.get("filtered_resps", "")), [str(sample.get("target", ""))], scores, question=question
    )


def plan(tasks: Sequence[Task], arguments: EvaluationArguments) -> Table:
    """Return the table that a dry run shows."""
    rows: list[list[Cell]] = [[t.name, len(t.questions())] for t in tasks]
    rows += [[f"lm_eval:{n}", "as lm-eval has"] for n in harness_names(arguments)]
    notes = [note for t in tasks for note in t.notes]
    return Table("Dry run: nothing was answered or written", ["task", "examples"], rows, notes)
