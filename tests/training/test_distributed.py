"""Two processes over gloo: the same gradients and the same model as one process with the double batch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from refine_nsp.training.trainer import ROLLOUTS_FILE

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json
import sys
import torch
torch.set_num_threads(1)
from refine_nsp.training import ReFINEConfig, ReFINETrainer
from tests.models.families import build
from tests.training.test_trainer import data
out, settings, resume = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "resume"
args = ReFINEConfig(output_dir=out, learning_rate=1e-2, report_to="none", use_cpu=True, logging_steps=1, disable_tqdm=True,
                    max_length=64, min_prefix=5, positions_per_sequence=2, rollout_length=3, **settings)
trainer = ReFINETrainer(model=build("delta_net"), args=args, train_dataset=data(16))
trainer.train(resume_from_checkpoint=resume)
trainer.save_model(out)
"""


def run(tmp_path, name: str, processes: int, resume: bool = False, **settings) -> dict[str, torch.Tensor]:
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    out = tmp_path / name
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = command if processes > 1 else [sys.executable]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    argv = [*command, str(script), str(out), json.dumps(settings), "resume" if resume else "start"]
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "model.safetensors")


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("objective", ["ntp", "refine"])
def test_two_processes_equal_one_with_the_double_batch(tmp_path, objective):
    # Each rank draws its own rollouts, so what can be equal is everything but the policy term, whose weight is 0 here.
    settings = {
        "objective": objective, "max_steps": 2, "lambda_rl": 0.0, "save_strategy": "no", "train_sampling_strategy": "sequential",
    }  # fmt: skip
    one = run(tmp_path, "one", 1, per_device_train_batch_size=4, **settings)
    two = run(tmp_path, "two", 2, per_device_train_batch_size=2, **settings)
    assert_close(one, two, 1e-9)


def test_two_processes_resume_with_the_rollouts_each_had_left(tmp_path):
    settings = {"max_steps": 3, "steps_per_generation": 3, "per_device_train_batch_size": 2}
    straight = run(tmp_path, "straight", 2, save_strategy="no", **settings)
    run(tmp_path, "stopped", 2, save_steps=1, **settings)
    for step in (2, 3):
        shutil.rmtree(tmp_path / "stopped" / f"checkpoint-{step}")
    left = [load_file(tmp_path / "stopped" / "checkpoint-1" / ROLLOUTS_FILE.format(rank)) for rank in (0, 1)]
    assert not torch.equal(left[0]["0.input_ids"], left[1]["0.input_ids"])
    assert_close(run(tmp_path, "stopped", 2, resume=True, save_strategy="no", **settings), straight, 1e-12)
