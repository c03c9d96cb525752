"""Two processes of which one is asked to stop, or dies: both end, nothing half-written is left, and the run goes on from there."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from refine_nsp.cli import main
from refine_nsp.stopping import TERMINATED_CODE
from refine_nsp.training.run_folder import RunFolder
from tests.test_cli import TEXT, tiny

ROOT = Path(__file__).resolve().parents[2]
# Says which process it is before it begins.
PROGRAM = """
import os, pathlib, sys
folder = pathlib.Path(sys.argv.pop(1))
(folder / os.environ["RANK"]).write_text(str(os.getpid()))
from refine_nsp.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(folder: Path, argv: list[str]) -> tuple[subprocess.Popen, list[int]]:
    """Two processes of a command without end, and their ids once they have saved a checkpoint."""
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=0"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("w") as log:
        launched = subprocess.Popen([*command, str(folder / "program.py"), str(folder), *argv], env=env, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while not list((folder / "run").glob("checkpoint-*/sealed.json")):
        assert launched.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()[-3000:]
        time.sleep(0.1)
    return launched, [int((folder / rank).read_text()) for rank in "01"]


def argv_of(folder: Path) -> list[str]:
    text = folder / "text.txt"
    text.write_text(TEXT)
    return tiny(folder, text, "--max_steps", "10000", "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2",
                "--max_length", "64")  # fmt: skip


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def check_the_end(folder: Path, launched: subprocess.Popen, processes: list[int]) -> str:
    assert launched.wait(timeout=120) != 0
    assert all(gone(process) for process in processes)
    said = (folder / "log.txt").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one that a dead process left without its seal is passed over
        last = RunFolder(folder / "run").last_complete()
    assert last is not None and last.problem() is None, said[-3000:]
    assert not (folder / "run" / "model.safetensors").exists()
    step = last.step
    again = argv_of(folder)
    again[again.index("10000")] = str(step + 1)
    assert main([*again, "--resume_from_checkpoint", "last", "--gradient_accumulation_steps", "2"]) == 0  # by one process
    return said


@pytest.mark.parametrize("whom", ["one process", pytest.param("the launcher", marks=pytest.mark.slow)])
def test_asked_to_stop(tmp_path, whom):
    """A scheduler's signal reaches one process, or the launcher, which passes it on: all save after the same step."""
    launched, processes = start(tmp_path, argv_of(tmp_path))
    os.kill(processes[1] if whom == "one process" else launched.pid, signal.SIGTERM)
    said = check_the_end(tmp_path, launched, processes)
    assert "terminated; run the same command again" in said
    if whom == "one process":
        assert f"exitcode: {TERMINATED_CODE}" in " ".join(said.split()).replace("exitcode : ", "exitcode: ")


@pytest.mark.slow
def test_a_process_that_dies(tmp_path):
    """The other one does not wait for it for ever."""
    launched, processes = start(tmp_path, argv_of(tmp_path))
    os.kill(processes[1], signal.SIGKILL)
    check_the_end(tmp_path, launched, processes)
