"""Run the `refine-nsp` command: one line for what is wrong, no traceback unless asked, exit code 0 only when it worked.

Help, completion and errors in a command line need no library: a command's module is imported only to run it.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from logging import getLogger as logger
from pathlib import Path
from types import FrameType
from typing import Any

from refine_nsp.commands.command_line import commands, refuse
from refine_nsp.commands.parser import HELP, overview, parse
from refine_nsp.environment import installed, keep_freed_memory, wait_without_spinning, without_garbage_searches
from refine_nsp.errors import RefineError, closest
from refine_nsp.stopping import TERMINATED_CODE, TERMINATIONS, Terminated, terminate

CONTINUE = "run the same command again (training: with --resume_from_checkpoint last) to go on"
FAILED, INTERRUPTED, PIPE_CLOSED = 1, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [w for w in words if w != "--debug"]
    main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, end_at_once) if main_thread else None
    TERMINATIONS.clear()
    show = warnings.showwarning
    warnings.showwarning = saying_ours(show)
    try:
        return dispatch(words)
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted; {CONTINUE}\n")
        return INTERRUPTED
    except Terminated:
        sys.stderr.write(f"terminated; {CONTINUE}\n")
        return TERMINATED_CODE
    except BrokenPipeError:  # what read our output (head, less) has gone; Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else FAILED
    except Exception as error:
        if TERMINATIONS:
            sys.stderr.write(f"terminated; {CONTINUE}\n")
            return TERMINATED_CODE
        # Only errors about input are expected; any other is a defect, whose traceback --debug shows.
        if debug:
            raise
        sys.stderr.write(f"refine-nsp: {describe(error)}\n")
        return FAILED
    finally:
        warnings.showwarning = show
        if main_thread:
            signal.signal(signal.SIGTERM, previous)


def saying_ours(show: Callable[..., None]) -> Callable[..., None]:
    """Return a `warnings.showwarning` that says our warnings in one line of one process, and leaves others to `show`."""

    def said(message: Warning | str, category: type[Warning], filename: str, *args: Any) -> None:
        if not issubclass(category, UserWarning) or not Path(filename).is_relative_to(Path(__file__).parent):
            show(message, category, filename, *args)
        elif os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"refine-nsp: {' '.join(str(message).split())}\n")

    return said


def describe(error: Exception) -> str:
    """Say in one line what is wrong."""
    text = " ".join(str(error).split())
    if isinstance(error, RefineError | OSError):
        return text
    return f"{type(error).__name__}: {text} (run again with --debug for the traceback)"


def dispatch(words: list[str]) -> int:
    """Answer a command line, by the command that its first word names; returns the exit code."""
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in HELP:
        sys.stdout.write(overview())
        return 0
    if name == "--version":
        sys.stdout.write(f"refine-nsp {installed('refine-nsp') or '0+unknown'}\n")
        return 0
    if name not in (known := commands()):
        if name.startswith("-"):
            refuse("refine-nsp", f"unrecognized arguments: {name}")
        raise RefineError(f"no command {name!r}{closest(name, known)}; there are {', '.join(known)}")
    call = parse(known[name], rest)
    wait_without_spinning()
    where = f"refine_nsp.commands.{name}"
    with nullcontext() if where in sys.modules else without_garbage_searches():
        module = importlib.import_module(where)
    if "transformers" in sys.modules:
        quiet_libraries()
    keep_freed_memory()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)
    module.run(call, *module.COMMAND.fill(call))
    return 0


def end_at_once(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM at the start, when libraries are halfway loaded and there is nothing to clean up."""
    os._exit(TERMINATED_CODE)


def quiet_libraries() -> None:
    """Turn loading bars and advice of libraries off: progress is ours to show, and errors are shown anyway."""
    from transformers.utils import logging

    from refine_nsp.progress import as_ours

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.disable_progress_bar()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        logging.set_tqdm_hook(as_ours)
    logging.set_verbosity_error()
    # These tell where a parser stumbled, and of attempts to reach the hub; our one line says what came of it.
    logger("datasets").setLevel("CRITICAL")
    logger("huggingface_hub").setLevel("ERROR")


if __name__ == "__main__":
    sys.exit(main())
