"""Trainings that tests run in this process and, by `tests/children.py`, in several: there must be no difference."""

import json
import shutil
import traceback
from contextlib import nullcontext
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset

from refine_nsp.commands import midtrain as command
from refine_nsp.training import data as data_rooms
from refine_nsp.training import scores
from refine_nsp.training.mixture import mix_streams
from tests.models.families import FAMILY_NAMES, build
from tests.models.transformers_models import float64_throughout, plain
from tests.training import test_nested, test_trainer

SETTINGS = {"max_steps": 2}


def rows(lengths: list[int]) -> Dataset:
    g = torch.Generator().manual_seed(0)
    return Dataset.from_list([{"input_ids": torch.randint(0, 64, (n,), generator=g).tolist()} for n in lengths])


def packed_rows() -> Dataset:
    g = torch.Generator().manual_seed(0)
    lengths = [[30, 25], [60], [21, 33], [14, 20, 18]] * 4
    return Dataset.from_list(
        [{"input_ids": torch.randint(0, 64, (sum(n),), generator=g).tolist(), "lengths": n} for n in lengths]
    )


def mixed_stream() -> IterableDataset:
    """A stream of two texts and of prompts with answers, by shares of tokens."""
    answers = rows([25, 31, 28] * 4).map(lambda row: {"answer_start": len(row["input_ids"]) - 5})
    sources = {"long": rows([60, 53] * 9), "short": rows([22, 27, 30] * 6), "answers": answers}
    streams = {name: own.to_iterable_dataset() for name, own in sources.items()}
    return mix_streams(streams, [0.6, 0.2, 0.2], "first_exhausted")[0]


def midtrain(
    folder: Path,
    lengths: list[int] | None = None,
    packed: bool = False,
    streamed: bool = False,
    mixed: bool = False,
    resume: bool = False,
    evaluate: bool = False,
    **settings,
) -> test_trainer.ReFINETrainer:
    data = packed_rows() if packed else rows(lengths) if lengths is not None else test_trainer.data(16)
    data = mixed_stream() if mixed else data.to_iterable_dataset() if streamed else data
    if evaluate:
        settings["eval_dataset"] = test_trainer.data(7)
    t = test_trainer.trainer(folder, train_dataset=data, **{**SETTINGS, **settings})
    # transformers' own models compute norms and gates in float32, where one rounding can change a sampled token.
    with nullcontext() if settings.get("family", "delta_net") in FAMILY_NAMES else float64_throughout():
        t.train(resume_from_checkpoint=resume)
        if evaluate:
            t.evaluate()
    t.save_model(str(folder))
    return t


def posttrain(folder: Path, **settings) -> None:
    t = test_nested.trainer(
        folder, build("delta_net"), test_nested.data(16), **{**SETTINGS, **settings, "output_dir": str(folder)}
    )
    t.train()
    t.save_model(str(folder))


def forget(folder: Path, checkpoints: list[int]) -> None:
    """As if a run had been stopped before these."""
    if PartialState().is_main_process:
        for step in checkpoints:
            shutil.rmtree(folder / f"checkpoint-{step}")
    PartialState().wait_for_everyone()


def copy(folder: Path, source: str) -> None:
    """A folder as another is now."""
    if PartialState().is_main_process:
        shutil.copytree(source, folder)
    PartialState().wait_for_everyone()


def tokenize(folder: Path, argv: list[str]) -> None:
    """The documents that this process tokenizes in a dry run, in a file of its own."""
    tokens_of, counts = data_rooms.tokens_of, []

    def counting(values, *others):
        counts.append(len(values))
        return tokens_of(values, *others)

    data_rooms.tokens_of = counting
    try:
        call, settings = command.COMMAND.call(argv)
        command.run(call, *settings)
    finally:
        data_rooms.tokens_of = tokens_of
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{PartialState().process_index}.json").write_text(json.dumps(sum(counts)))


def scored(folder: Path, **settings) -> None:
    """Mid-training with context scores made beforehand, into a cache in `folder`, in parts of two rows; what each process scored."""
    with pytest.MonkeyPatch.context() as patch:
        rows, original = [], scores.scores_of
        patch.setattr(scores, "scores_of", lambda row, *args: rows.append(row) or original(row, *args))
        patch.setattr(scores, "PART_ROWS", 2)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        t = midtrain(folder, context_scores="cached", **settings)
    (folder / f"scored.{t.args.process_index}").write_text(str(len(rows)))
    if t.is_world_process_zero():
        (folder / "scores.json").write_text(json.dumps(t.train_dataset["context_scores"][:]))


def distilled(folder: Path, **settings) -> None:
    """Mid-training by a teacher that is attention alone, which the first process writes into `folder`; its scores are kept there too."""
    if PartialState().is_main_process:
        plain("llama", seed=1).save_pretrained(folder / "teacher")
    PartialState().wait_for_everyone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        if settings.setdefault("objective", "distill") == "distill":
            settings["teacher_window"] = 8
        midtrain(folder, teacher=str(folder / "teacher"), **settings)


JOBS = {
    "midtrain": midtrain,
    "scored": scored,
    "distilled": distilled,
    "posttrain": posttrain,
    "forget": forget,
    "copy": copy,
    "tokenize": tokenize,
}


def run_jobs(path: Path) -> None:
    """Run jobs of kind, folder and settings; what fails says so in its folder, and the next one goes on."""
    torch.set_num_threads(1)
    for kind, folder, settings in json.loads(path.read_text()):
        try:
            JOBS[kind](Path(folder), **settings)
        except Exception:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / "error.txt").write_text(traceback.format_exc())
