"""Start processes for tests that need several: children of the test's own process, which have all libraries loaded already."""

import os
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed.run as launcher
from accelerate.state import AcceleratorState, GradientState

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 600  # after which children that have not ended are killed


def run_side_by_side(work: Callable[[], object], folder: Path, processes: int = 2) -> str:
    """Run `work` in processes that find each other as those of `torchrun` do; what they wrote to stdout and stderr.

    Args:
        work: returns its exit code, or None. folder: for their logs.

    Raises:
        AssertionError: with the end of the log of a process that failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"process{rank}.log" for rank in range(processes)]
    children = {}
    for rank, log in enumerate(logs):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
        children[fork(work, log, {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"})] = log
    failed, deadline = None, time.monotonic() + SECONDS
    while children:
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                log = children.pop(child)
                failed = failed or (log if os.waitstatus_to_exitcode(status) != 0 else None)
        if failed or time.monotonic() > deadline:  # the others would wait for it
            for child in children:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            break
        time.sleep(0.01)
    assert failed is None and time.monotonic() <= deadline, (failed or logs[0]).read_text()[-3000:]
    return "".join(log.read_text() for log in logs)


def run_script(script: Path, flags: Sequence[str], log: Path) -> tuple[int, str]:
    """Run a script as `python SCRIPT FLAGS` does, in a child; its exit code, and what it wrote to stdout and stderr."""

    def work() -> None:
        sys.argv = [str(script), *flags]
        sys.path[:] = [str(script.parent), *(p for p in sys.path if Path(p).resolve() != ROOT)]  # pytest has put it there
        for name in [name for name in sys.modules if name.partition(".")[0] in ("benchmarks", "tests")]:
            del sys.modules[name]
        runpy.run_path(str(script), run_name="__main__")

    return exit_code(fork(work, log, {})), log.read_text()


def launch_in_forks() -> None:
    """Let torch's launcher fork the processes that it starts from this one, where it would start interpreters that load everything anew."""
    launch = launcher.elastic_launch

    def forking(config: launcher.LaunchConfig, entrypoint: object) -> launcher.elastic_launch:
        config.start_method = "fork"
        return launch(config, as_python)

    launcher.elastic_launch = forking  # type: ignore[assignment,misc]


def as_python(*argv: str) -> None:
    """Do what `python -u SCRIPT` or `python -u -m MODULE` does with the words that follow."""
    torch.set_num_threads(torch.get_num_threads())  # as in `fork`
    words = list(argv[argv[0] == "-u" :])
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def exit_code(child: int, seconds: float = SECONDS) -> int:
    """Wait for a child to end; its exit code.

    Raises:
        TimeoutError: where it is still running after so many seconds.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    raise TimeoutError(f"process {child} has not ended after {seconds} s")


def fork(work: Callable[[], object], log: Path, environment: dict[str, str]) -> int:
    """Begin `work` in a child, as if nothing had been done in this process; its id."""
    log.parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)  # they may be pytest's
        os.environ.update(environment)
        # Torch gives a child a new pool of threads at its first use, which must not be that of two threads at once, as in loading weights.
        torch.set_num_threads(torch.get_num_threads())
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        code = int(work() or 0)  # type: ignore[call-overload]
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if code and not isinstance(stop.code, int):
            sys.stderr.write(f"{stop.code}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
