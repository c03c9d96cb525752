"""Two processes of which one is asked to stop, or dies: both end, nothing half-written is left, and the run goes on from there."""

import os
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch.distributed.run as launcher

from refine_nsp.cli import main
from refine_nsp.stopping import TERMINATED_CODE
from refine_nsp.training.run_folder import RunFolder
from tests.children import exit_code, fork, launch_in_forks
from tests.test_cli import TEXT, tiny

# Says which process it is before it begins.
PROGRAM = """
import os, pathlib, sys
folder = pathlib.Path(sys.argv.pop(1))
(folder / os.environ["RANK"]).write_text(str(os.getpid()))
from refine_nsp.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(folder: Path, argv: list[str]) -> tuple[int, list[int]]:
    """The launcher of two processes of a command without end, and their ids once they have saved a checkpoint."""
    program, log = folder / "program.py", folder / "log.txt"
    program.write_text(PROGRAM)

    def launch() -> None:
        sys.argv = ["torchrun", "--standalone", "--nproc_per_node=2", "--max_restarts=0", str(program), str(folder), *argv]
        launch_in_forks()
        launcher.main()

    launched = fork(launch, log, {})
    deadline = time.monotonic() + 120
    while not list((folder / "run").glob("checkpoint-*/sealed.json")):
        assert not os.waitpid(launched, os.WNOHANG)[0] and time.monotonic() < deadline, log.read_text()[-3000:]
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


def check_the_end(folder: Path, launched: int, processes: list[int]) -> str:
    assert exit_code(launched, 120) != 0
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
    os.kill(processes[1] if whom == "one process" else launched, signal.SIGTERM)
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
