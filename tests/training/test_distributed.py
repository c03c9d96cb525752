"""Two processes over gloo: the same gradients and the same model as one process with the double batch. They are launched once for all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from refine_nsp.training.trainer import ROLLOUTS_FILE
from tests.training.jobs import JOBS

ROOT = Path(__file__).resolve().parents[2]
# Short local windows, so that short rows have weights too.
EXACT = {"preset": "exact", "reward_funcs": "prefix_match", "rollout_length": 2, "local_window": 8}
# A chunk of this LaCT is 16 tokens: no row is long enough for the fast weights to learn, so their learning rates move nothing.
SHORT_LACT = {
    "family": "lact_swiglu", "lengths": [12 + i % 4 for i in range(16)], "objective": "ntp", "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False}, "ddp_find_unused_parameters": False,
}  # fmt: skip
# What of these runs is random is either drawn alike or has no weight: each process draws its own rollouts.
ALIKE = {
    "ntp": ("midtrain", {"objective": "ntp"}),
    "refine": ("midtrain", {"lambda_rl": 0.0}),
    "exact": ("midtrain", EXACT),
    "exact, accumulated": ("midtrain", {**EXACT, "gradient_accumulation_steps": 2}),
    "nested ntp": ("posttrain", {"objective": "ntp"}),
    "nested exact": ("posttrain", EXACT),
    "nested exact, accumulated": ("posttrain", {**EXACT, "gradient_accumulation_steps": 4, "inner_steps": 2}),
    "lact, short rows": ("midtrain", SHORT_LACT),
}
THREE_STEPS = {"max_steps": 3, "steps_per_generation": 3, "per_device_train_batch_size": 2}


def batch_size(name: str) -> int:
    """Of each of the two processes; two steps then use all 16 rows at most."""
    return 4 // ALIKE[name][1].get("gradient_accumulation_steps", 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """What two processes made of all jobs: a folder each."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [
        ("midtrain", "straight", THREE_STEPS),
        ("midtrain", "stopped", {**THREE_STEPS, "save_strategy": "steps", "save_steps": 1}),
        ("forget", "stopped", {"checkpoints": [2, 3]}),
        ("midtrain", "stopped", {**THREE_STEPS, "resume": True}),
    ]
    jobs += [
        (kind, name, {"per_device_train_batch_size": batch_size(name), **settings}) for name, (kind, settings) in ALIKE.items()
    ]
    (folder / "jobs.json").write_text(json.dumps([(kind, str(folder / name), settings) for kind, name, settings in jobs]))
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tests.training.jobs"]
    done = subprocess.run(
        [*command, str(folder / "jobs.json")], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    error = folder / "error.txt"
    assert not error.exists(), error.read_text()[-3000:]
    return load_file(folder / "model.safetensors")


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_equal_one_with_the_double_batch(tmp_path, two, name):
    kind, settings = ALIKE[name]
    JOBS[kind](tmp_path, per_device_train_batch_size=2 * batch_size(name), **settings)
    assert_close(weights_of(two / name), weights_of(tmp_path), 1e-9)


@pytest.mark.parametrize(("name", "other"), [("exact", "ntp"), ("nested exact", "nested ntp")])
def test_the_runs_that_are_alike_had_something_to_weigh(two, name, other):
    a, b = weights_of(two / name), weights_of(two / other)
    assert max(float((a[n] - b[n]).abs().max()) for n in a) > 1e-3


def test_two_processes_resume_with_the_rollouts_each_had_left(two):
    left = [load_file(two / "stopped" / "checkpoint-1" / ROLLOUTS_FILE.format(rank)) for rank in (0, 1)]
    assert not torch.equal(left[0]["0.input_ids"], left[1]["0.input_ids"])
    assert_close(weights_of(two / "stopped"), weights_of(two / "straight"), 1e-12)
