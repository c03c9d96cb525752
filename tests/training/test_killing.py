"""Runs that are killed, at any moment, and gone on with: they end as the run that was left alone, to the last bit."""

import json
import os
import random
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from refine_nsp.training.checkpoints import last_complete_checkpoint
from tests.training import test_nested, test_trainer

STEPS = 6
KINDS = {
    "one step a rollout batch": {},
    "three steps, several epochs": {"steps_per_generation": 3, "schedule": "snapshot", "per_device_train_batch_size": 4},
    "in order, validated": {"train_sampling_strategy": "sequential", "eval_strategy": "steps", "eval_steps": 1},
    "streamed": {"streamed": True, "steps_per_generation": 3, "schedule": "snapshot"},
    "nested": {"nested": True},
}


def train(folder: Path, nested: bool = False, streamed: bool = False, **settings) -> None:
    """The run, from its newest checkpoint where it has one; then its weights in `model.safetensors`."""
    rows = test_trainer.data(12)
    common = dict(max_steps=STEPS, save_strategy="steps", save_steps=1, save_total_limit=3, **settings)
    if nested:
        t = test_nested.trainer(folder, **{"output_dir": str(folder), "train_sampling_strategy": "random", **common})
    else:
        if "eval_strategy" in settings:
            common["eval_dataset"] = test_trainer.data(5)
        t = test_trainer.trainer(folder, train_dataset=rows.to_iterable_dataset() if streamed else rows, **common)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resume = last_complete_checkpoint(folder) is not None
        t.train(resume_from_checkpoint=resume)
    t.save_model(str(folder))


def in_a_process(folder: Path, settings: dict, kill_after: float | None = None, with_signal: int = signal.SIGKILL) -> int:
    """Run `train` in a process of its own, killed after some seconds; how it ended, as `os.waitpid` says."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            train(folder, **settings)
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, with_signal)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status)


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights, and the loss of every step."""
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return load_file(folder / "model.safetensors"), [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def kill_and_go_on(tmp_path: Path, kind: str, moments: int, seed: int, with_signal: int = signal.SIGKILL) -> None:
    settings = KINDS[kind]
    start = time.monotonic()
    assert in_a_process(tmp_path / "straight", settings) == 0, (tmp_path / "straight" / "log.txt").read_text()
    took = time.monotonic() - start
    rng, folder, killed = random.Random(f"{kind}-{seed}"), tmp_path / "killed", 0
    for _ in range(moments):
        ended = in_a_process(folder, settings, rng.uniform(0.05, 0.6) * took, with_signal)
        assert ended in (0, -with_signal, 128 + with_signal), (folder / "log.txt").read_text()
        killed += ended != 0
        if ended == 0:
            break
    assert killed
    assert in_a_process(folder, settings) == 0, (folder / "log.txt").read_text()
    (a, losses_a), (b, losses_b) = outcome(tmp_path / "straight"), outcome(folder)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert len(losses_a) == STEPS and losses_a == losses_b


@pytest.mark.parametrize("kind", ["three steps, several epochs", "nested"])
def test_a_killed_run_ends_as_the_one_left_alone(tmp_path, kind):
    kill_and_go_on(tmp_path, kind, 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_many_moments(tmp_path, kind, seed):
    kill_and_go_on(tmp_path, kind, 3, seed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_terminated_at_many_moments(tmp_path, kind):
    kill_and_go_on(tmp_path, kind, 3, 7, signal.SIGTERM)
