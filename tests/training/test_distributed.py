"""Two processes over gloo: the same gradients and the same model as one process with the double batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
from refine_nsp.training import ReFINEConfig, ReFINETrainer
from tests.models.families import build
from tests.training.test_trainer import data
out, batch, objective = sys.argv[1], int(sys.argv[2]), sys.argv[3]
args = ReFINEConfig(output_dir=out, max_steps=2, per_device_train_batch_size=batch, learning_rate=1e-2, report_to="none",
                    use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True, max_length=64, min_prefix=5,
                    positions_per_sequence=2, rollout_length=3, objective=objective,
                    train_sampling_strategy="sequential", lambda_rl=0.0)
trainer = ReFINETrainer(model=build("delta_net"), args=args, train_dataset=data(8))
trainer.train()
trainer.save_model(out)
"""


def run(tmp_path, name: str, processes: int, batch: int, objective: str) -> dict[str, torch.Tensor]:
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    out = tmp_path / name
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = command if processes > 1 else [sys.executable]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    argv = [*command, str(script), str(out), str(batch), objective]
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("objective", ["ntp", "refine"])
def test_two_processes_equal_one_with_the_double_batch(tmp_path, objective):
    # Each rank draws its own rollouts, so what can be equal is everything but the policy term, whose weight is 0 here.
    one = run(tmp_path, "one", 1, 4, objective)
    two = run(tmp_path, "two", 2, 2, objective)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
