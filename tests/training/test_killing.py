"""Runs that are killed or terminated, at any moment, and gone on with: they end as the run that was left alone, to the last bit."""

import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from refine_nsp import cli
from refine_nsp.commands import midtrain
from refine_nsp.training.run_folder import RunFolder
from tests.training import test_nested, test_trainer

STEPS = 5  # the last of them in the middle of an epoch
KINDS = {
    "one step a rollout batch": {},
    "three steps, several epochs": {"steps_per_generation": 3, "schedule": "snapshot", "per_device_train_batch_size": 4},
    "in order, validated": {"train_sampling_strategy": "sequential", "eval_strategy": "steps", "eval_steps": 1},
    "streamed": {"streamed": True, "steps_per_generation": 3, "schedule": "snapshot"},
    "nested": {"nested": True},
    "carried, in lanes": {"carry_states": True, "max_length": 25, "carry_between_documents": 0.5},
}
# Phases of a run, by the trainer's method; and those of which every kind has some.
PHASES = {
    "training_step": "step",
    "prepare": "rollout",
    "update": "inner update",
    "evaluate": "evaluation",
    "_save_checkpoint": "saving",
}
NAMES = ("between", *PHASES.values())
MORE = {"in order, validated": ["evaluation"], "nested": ["inner update"]}
TERMINATED = f"terminated; {cli.CONTINUE}\n"
TRIES = 15  # to hit a moment: a run may end first


class Seen:
    """What a run in another process is doing, as that process notes it in memory that both have."""

    def __init__(self) -> None:
        self.numbers = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("d")

    begun = property(lambda self: bool(self.numbers[0]))
    phase = property(lambda self: NAMES[int(self.numbers[1])])

    def entries(self, phase: str) -> int:
        return int(self.numbers[10 + NAMES.index(phase)])

    def seconds(self, phase: str) -> float:
        return self.numbers[20 + NAMES.index(phase)] / max(1, self.entries(phase))

    def watch(self, trainer) -> None:
        seen = self.numbers

        class Begin(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                seen[0] = 1.0

        trainer.add_callback(Begin())
        for method, phase in PHASES.items():
            if hasattr(trainer, method):
                setattr(trainer, method, self.noted(getattr(trainer, method), NAMES.index(phase)))

    def noted(self, method, number: int):
        seen = self.numbers

        def call(*args, **kwargs):
            outer, start = seen[1], time.monotonic()
            seen[1] = number
            seen[10 + number] += 1
            try:
                return method(*args, **kwargs)
            finally:
                seen[1] = outer
                seen[20 + number] += time.monotonic() - start

        return call


def train(folder: Path, seen: Seen, nested: bool = False, streamed: bool = False, **settings) -> None:
    """The run, from its newest checkpoint where it has one; then its weights in `model.safetensors`."""
    rows = test_trainer.data(12)
    common = dict(max_steps=STEPS, save_strategy="steps", save_steps=1, save_total_limit=3, **settings)
    if nested:
        t = test_nested.trainer(folder, **{"output_dir": str(folder), "train_sampling_strategy": "random", **common})
    else:
        if "eval_strategy" in settings:
            common["eval_dataset"] = test_trainer.data(5)
        t = test_trainer.trainer(folder, train_dataset=rows.to_iterable_dataset() if streamed else rows, **common)
    seen.watch(t)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resume = RunFolder(folder).last_complete() is not None
        t.train(resume_from_checkpoint=resume)
    t.save_model(str(folder))


def begin(folder: Path, seen: Seen, settings: dict) -> int:
    """A process of its own that runs `train` as the command line runs a command; its id. What it says is in log.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)  # they may be pytest's
            # Whoever sends a signal once the command has ended comes too late, and not to a process that has no handler any more.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            midtrain.run = lambda *given: train(folder, seen, **settings)
            code = cli.main(["midtrain"])
        finally:
            os._exit(code)
    return child


def run(folder: Path, settings: dict) -> tuple[Seen, float]:
    """The run, left alone; what was seen, and seconds since training began."""
    seen = Seen()
    child = begin(folder, seen, settings)
    while not seen.begun and os.waitpid(child, os.WNOHANG)[0] == 0:
        time.sleep(0.001)
    start = time.monotonic()
    if seen.begun:
        status = os.waitpid(child, 0)[1]
        assert os.waitstatus_to_exitcode(status) == 0, (folder / "log.txt").read_text()
    assert seen.begun, (folder / "log.txt").read_text()
    return seen, time.monotonic() - start


def ended_by(folder: Path, settings: dict, with_signal: int, aim: str | None, wait: float) -> tuple[int, str]:
    """The run, sent a signal some seconds after training or the phase aimed at began; its exit code, and the phase it was in."""
    seen = Seen()
    child, status = begin(folder, seen, settings), None
    while not (seen.begun and aim in (None, seen.phase)):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), "between"
        time.sleep(0.0002)
    time.sleep(wait)
    phase = seen.phase
    os.kill(child, with_signal)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, seen.phase if with_signal == signal.SIGKILL else phase  # as it is after death


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights, and the loss of every step."""
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return load_file(folder / "model.safetensors"), [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def check_alike(straight: Path, folder: Path) -> None:
    (a, losses_a), (b, losses_b) = outcome(straight), outcome(folder)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert len(losses_a) == STEPS and losses_a == losses_b
    assert not (folder / f"checkpoint-{STEPS + 1}").exists()


def end_and_go_on(tmp_path: Path, kind: str, with_signal: int, aims: list[str | None], seed: int = 0) -> Counter:
    """Every aim (a phase; None: any moment of the training) is hit; then the run goes on to its end, and is run once more. Phases that
    were hit."""
    settings, straight, folder = KINDS[kind], tmp_path / "straight", tmp_path / "ended"
    usual, took = run(straight, settings)
    rng, hits = random.Random(f"{kind}-{with_signal}-{seed}"), Counter()
    for aim in aims:
        assert aim is None or usual.entries(aim), f"{kind} has no {aim}"
        for _ in range(TRIES):
            wait = rng.uniform(0, 0.5 * took if aim is None else 0.7 * usual.seconds(aim))
            code, phase = ended_by(folder, settings, with_signal, aim, wait)
            assert code in (0, -signal.SIGKILL if with_signal == signal.SIGKILL else 143), (folder / "log.txt").read_text()
            if code == 143:
                assert (folder / "log.txt").read_text() == TERMINATED
            if code == 0:
                check_alike(straight, folder)
                shutil.rmtree(folder)
            hits[phase] += code != 0
            if code != 0 and aim in (None, phase):
                break
        else:
            raise AssertionError(f"{aim} was not hit in {TRIES} tries")
    for _ in range(2):  # to its end, and when it has ended
        run(folder, settings)
        check_alike(straight, folder)
    return hits


@pytest.mark.parametrize(("kind", "with_signal", "aims"), [
    ("three steps, several epochs", signal.SIGKILL, [None, "saving"]),
    ("nested", signal.SIGKILL, ["inner update"]),
    ("in order, validated", signal.SIGTERM, [None, "evaluation"]),
])  # fmt: skip
def test_a_run_that_was_ended_goes_on_as_if_it_was_not(tmp_path, kind, with_signal, aims):
    assert end_and_go_on(tmp_path, kind, with_signal, aims).total() >= len(aims)


@pytest.mark.slow
@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("kind", KINDS)
def test_ended_at_many_moments_and_in_every_phase(tmp_path, kind, with_signal, record_property):
    """Over the six kinds at least 20 moments of either signal, and every phase."""
    aims = [None] * 4 + ["step", "rollout", "saving", *MORE.get(kind, [])]
    hits = end_and_go_on(tmp_path, kind, with_signal, aims, seed=1)
    record_property("phases that were hit", dict(hits))
    assert hits.total() >= len(aims)
