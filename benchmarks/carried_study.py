"""Run the study of carried states (benchmarks/study/carried_plan.md), and write it into docs/results.md.

    python benchmarks/carried_study.py --novels train.parquet --held_out validation.parquet --essays emerson_essays.jsonl

First the untouched bases are measured, then every arm is trained and measured seed by seed, then needles are asked for in the same order.
Each job leaves one json file in the folder (runs/carried), so a second call does what is missing, also beside the first: two calls
share the jobs. --so_far only writes the tables. All figures are kept in benchmarks/study/records/carried.json.gz.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from refine_nsp import ReFINEConfig, ReFINETrainer, load
from refine_nsp.environment import environment, keep_freed_memory
from refine_nsp.evaluation.arguments import EvaluationArguments
from refine_nsp.evaluation.documents import score_document
from refine_nsp.evaluation.run import claim_folder
from refine_nsp.evaluation.tasks import GenerationTask, build_tasks
from refine_nsp.files import write_atomically
from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.models.load import load_model, load_tokenizer
from refine_nsp.models.state import FastWeightCache
from refine_nsp.text.reading import read_documents
from refine_nsp.tiny.corpus import standard_library
from refine_nsp.tiny.families import FAMILIES
from refine_nsp.tiny.rows import FILLER_ROWS, Sources
from refine_nsp.training.data import BEGINS_COLUMN, cut_windows
from study import carried
from study.carried import ARMS, CARRIED, FULL, LANES, SPAN, WINDOW
from study.jobs import keep, plain
from study.measuring import Clock, ruler_figures
from study.records import pack, unpack
from study.settings import BASES, SHARES

DOCUMENT_WINDOWS = 2 * SPAN  # of every document that is trained on
DENSE = 0.5  # statements and questions take at most this share of a generated document, as in the first study
CHARACTERS = 4 * DOCUMENT_WINDOWS * WINDOW  # of a novel hold a document's tokens, for whole novels would take minutes to encode
STATES = ("recurrent", "w02", "w1")  # the parts of a layer's state that are written to over a whole document
RATE = 1e-4  # chosen for NTP in the first study


@dataclass(frozen=True)
class Study:
    """Say where figures go, what they are made from, and how much of it. needles: prompts of a task and length for each seed."""

    out: Path
    novels: str
    held_out: str
    essays: str | None
    blocks: int
    seeds: int
    needles: int

    @property
    def steps(self) -> int:
        return self.blocks * DOCUMENT_WINDOWS

    def settings(self) -> dict[str, Any]:
        """List what figures depend on, with data files by name only."""
        names = {key: Path(value).name if value else None for key, value in (("novels", self.novels), ("essays", self.essays))}
        env = {key: environment()[key] for key in ("python", "torch", "transformers", "machine", "cpus")}
        return {
            "window": WINDOW,
            "span": SPAN,
            "lanes": LANES,
            "steps": self.steps,
            "needles": self.needles,
            **names,
            "made": env,
        }


# --- what is read -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerBase:
    """Load the tokenizer, which all bases share."""
    return load_tokenizer(BASES["DeltaNet"])


@lru_cache(maxsize=1)
def sources() -> Sources:
    return Sources.of(tokenizer(), standard_library(held_out=False))


def stretches(path: str, length: int, starts: Callable[[int], int], count: int | None = None) -> list[list[int]]:
    """Cut `length` tokens from each of the first `count` novels (None: all), from a character that `starts` chooses."""
    texts = list(read_documents(path, ("text",))["text"])[:count]
    spans = [text[(at := starts(len(text) - CHARACTERS)) : at + CHARACTERS] for text in texts if len(text) > CHARACTERS]
    return [ids[:length] for ids in tokenizer()(spans, add_special_tokens=False)["input_ids"] if len(ids) >= length]


@lru_cache(maxsize=1)
def documents(study: Study, seed: int) -> list[list[int]]:
    """Make a seed's documents, novels and generated ones by turns; each is cut into DOCUMENT_WINDOWS windows that share a token."""
    rng = random.Random(f"carried-{seed}")
    length, count = DOCUMENT_WINDOWS * (WINDOW - 1) + 1, study.blocks * LANES // 2
    halves = (lambda last: rng.randrange(last // 2), lambda last: rng.randrange(last // 2, last))
    novels = [ids for starts in halves for ids in stretches(study.novels, length, starts)]
    names, stream = [name for name in FAMILIES if name in SHARES], sources().stream
    made = []
    for family in rng.choices(names, [SHARES[name] for name in names], k=count):
        start = rng.randrange(len(stream) - FILLER_ROWS * length)
        filler = stream[start : start + FILLER_ROWS * length].tolist()
        made.append(sources().writer.write(rng, family, filler, length, DENSE * (0.5 + 0.5 * rng.random()))[0])
    return [ids for pair in zip(rng.sample(novels, count), made, strict=True) for ids in pair]


def rows_of(arm: str, read: list[list[int]]) -> Dataset:
    """Cut documents into the rows of an arm. LANES of them are read side by side, so any SPAN steps of all arms hold the same tokens."""
    long = arm == FULL
    cut = [cut_windows(ids, SPAN * (WINDOW - 1) + 1 if long else WINDOW, 2, shared=1) for ids in read]
    if arm == CARRIED:
        begins = [at == 0 for windows in cut for at in range(len(windows))]
        return Dataset.from_dict({"input_ids": [row for windows in cut for row in windows], BEGINS_COLUMN: begins})
    blocks = [cut[i : i + LANES] for i in range(0, len(cut), LANES)]
    return Dataset.from_dict({"input_ids": [row for block in blocks for turn in zip(*block, strict=True) for row in turn]})


@lru_cache(maxsize=1)
def held_out(path: str) -> list[list[int]]:
    """Cut a stretch of SPAN windows from every held-out novel, a third into it."""
    return stretches(path, SPAN * WINDOW, lambda last: last // 3)


@lru_cache(maxsize=1)
def needles(study: Study, seed: int) -> list[GenerationTask]:
    """Build RULER's needle tasks at 2, 4 and 8 windows: other prompts for every seed, the same for all arms and bases."""
    given = {"essays": study.essays} if study.essays else {}
    lengths = [WINDOW * n for n in carried.NEEDLE_WINDOWS]
    return build_tasks(
        EvaluationArguments(tasks=["niah"], lengths=lengths, samples=study.needles, seed=seed, **given), tokenizer()
    )


# --- jobs -------------------------------------------------------------------------------------------------------------


def text_losses(study: Study, model: FastWeightForCausalLM, window: int | None = None) -> list[list[float]]:
    """Measure the loss of each held-out novel in each stretch of WINDOW positions, in one pass or in windows."""
    scores = (score_document(model, ids, window, WINDOW) for ids in held_out(study.held_out))
    return [[bucket["loss"] for bucket in score.buckets.values()] for score in scores]


@torch.no_grad()
def growth(study: Study, model: FastWeightForCausalLM) -> float:
    """Divide the norm of the states after SPAN windows by that after one, as a mean over layers and novels."""
    ratios = []
    for ids in held_out(study.held_out)[::4]:
        cache, norms = FastWeightCache(), []
        for block in torch.tensor([ids]).split(WINDOW, 1):
            model.model(block, past_key_values=cache, use_cache=True)
            norms.append([x.float().norm() for layer in cache.layers for name, x in layer.items() if name in STATES])
        ratios += [float(last / first) for first, last in zip(norms[0], norms[-1], strict=True)]
    return sum(ratios) / len(ratios)


def base(study: Study, family: str) -> carried.Figures:
    """Measure what there is to be gained: an untouched base in one pass and in windows."""
    model = load(BASES[family])[0].eval()
    return {"one_pass": text_losses(study, model), "windows": text_losses(study, model, WINDOW), "growth": growth(study, model)}


def train(study: Study, family: str, arm: str, seed: int) -> carried.Figures:
    """Train an arm from a base, measure it on held-out novels, and keep it."""
    settings, rows = ARMS[arm], rows_of(arm, documents(study, seed))
    with TemporaryDirectory(dir=study.out) as folder:
        args = ReFINEConfig(
            output_dir=folder, objective="ntp", learning_rate=RATE, max_steps=study.steps, bf16=True, use_cpu=True,
            seed=seed, save_strategy="no", report_to="none", train_sampling_strategy="sequential", disable_tqdm=True, **settings,
        )  # fmt: skip
        trainer = ReFINETrainer(model=load(BASES[family])[0], args=args, train_dataset=rows, processing_class=tokenizer())
        with Clock() as clock:
            trainer.train()
    model = trainer.model.eval()
    keep(model, study.out / "models" / plain(f"{family} {arm} {seed}"))
    return {"seconds": clock.seconds / study.steps, "one_pass": text_losses(study, model), "growth": growth(study, model)}


def read_in_windows(study: Study, family: str, arm: str, seed: int) -> list[list[float]]:
    """Measure a trained arm on held-out novels in windows, to compare with the one pass in which it was measured."""
    model = load_model(study.out / "models" / plain(f"{family} {arm} {seed}")).eval()
    return text_losses(study, model, WINDOW)


def ask(study: Study, family: str, arm: str, seed: int) -> carried.Figures:
    """Ask a trained arm, or the untouched base, for RULER's needles; products are in bfloat16, as in training."""
    kept = study.out / "models" / plain(f"{family} {arm} {seed}")
    model = (load(BASES[family])[0] if arm == carried.BASE else load_model(kept)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        return ruler_figures(model, tokenizer(), needles(study, seed))


KINDS: dict[str, Callable[..., object]] = {"base": base, "train": train, "windowed": read_in_windows, "needles": ask}


def jobs(study: Study) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """List the jobs in the order in which they are worth most: the untouched bases, the test seed by seed, then what is described."""
    yield from (("base", (family,)) for family in BASES)
    yield from (("train", (family, arm, seed)) for seed in range(study.seeds) for family in BASES for arm in ARMS)
    yield from (
        ("windowed", (family, arm, seed)) for seed in range(study.seeds) for family in BASES for arm in carried.IN_BOTH_WAYS
    )
    asked = (carried.BASE, *ARMS)
    yield from (("needles", (family, arm, seed)) for seed in range(study.seeds) for family in BASES for arm in asked)


def figures_of(study: Study, kind: str, *arguments: Any) -> Path:
    """Name the file in which a job leaves its figures."""
    return study.out / "jobs" / f"{carried.name_of(kind, *arguments)}.json"


def ready(study: Study, kind: str, arguments: tuple[Any, ...]) -> bool:
    """Tell whether the model is there that a job measures; another call may still be training it."""
    measures_trained = kind in ("windowed", "needles") and carried.BASE not in arguments
    return not measures_trained or figures_of(study, "train", *arguments).exists()


def run(study: Study, kind: str, arguments: tuple[Any, ...]) -> bool:
    """Run a job that has left no figures yet and is not being run by another call; tell whether it was run."""
    path = figures_of(study, kind, *arguments)
    if path.exists() or not ready(study, kind, arguments):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as held:  # the system lets go of it when a call ends, however it ends
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if path.exists():
            return False
        write_atomically(path, json.dumps(KINDS[kind](study, *arguments)) + "\n")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--novels", required=True, help="novels to train on, a row each")
    parser.add_argument("--held_out", required=True, help="novels to measure on")
    parser.add_argument("--essays", help="haystack of RULER's needles (default: Python's reference documentation)")
    parser.add_argument(
        "--blocks", type=int, default=3, help=f"documents that each lane reads, {DOCUMENT_WINDOWS} steps each [3]"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--needles", type=int, default=4, help="prompts of a task and length for each seed [4]")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/carried"))
    parser.add_argument("--record", type=Path, default=carried.RECORD)
    parser.add_argument("--document", type=Path, default=carried.DOCUMENT)
    parser.add_argument("--so_far", action="store_true", help="run nothing: write the tables of what there is")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    keep_freed_memory()
    study = Study(args.output_dir, args.novels, args.held_out, args.essays, args.blocks, args.seeds, args.needles)
    if args.record.exists():
        unpack(args.record, study.out)
    claim_folder(study.out, study.settings())
    start = time.monotonic()
    for kind, arguments in () if args.so_far else jobs(study):
        if run(study, kind, arguments):
            pack(study.out, args.record)
            print(f"{(time.monotonic() - start) / 60:.1f} min: {carried.name_of(kind, *arguments)}", flush=True)
    print(carried.write(args.record, args.document))


if __name__ == "__main__":
    main()
