"""The `refine-nsp` command: one line for what is wrong, no traceback unless asked, exit code 0 only when it worked."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from logging import getLogger as logger
from pathlib import Path
from types import FrameType
from typing import Any

from refine_nsp.commands import COMMANDS, FROM_DATACLASSES, Parser
from refine_nsp.environment import keep_freed_memory, wait_without_spinning
from refine_nsp.stopping import TERMINATED_CODE, TERMINATIONS, Terminated, terminate

GO_ON = "run the same command again (training: with --resume_from_checkpoint last) to go on"
FAILED, INTERRUPTED, PIPE_CLOSED = 1, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
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
        sys.stderr.write(f"interrupted; {GO_ON}\n")
        return INTERRUPTED
    except Terminated:
        sys.stderr.write(f"terminated; {GO_ON}\n")
        return TERMINATED_CODE
    except BrokenPipeError:  # what read our output (head, less) has gone; Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else FAILED
    except Exception as error:
        if TERMINATIONS:
            sys.stderr.write(f"terminated; {GO_ON}\n")
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
    """A `warnings.showwarning` that says our warnings as we say all else, in one line of one process, and leaves others to `show`."""

    def said(message: Warning | str, category: type[Warning], filename: str, *more: Any) -> None:
        if not issubclass(category, UserWarning) or not Path(filename).is_relative_to(Path(__file__).parent):
            show(message, category, filename, *more)
        elif os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"refine-nsp: {' '.join(str(message).split())}\n")

    return said


def describe(error: Exception) -> str:
    """One line."""
    from refine_nsp.errors import RefineError

    text = " ".join(str(error).split())
    if isinstance(error, RefineError | OSError):
        return text
    return f"{type(error).__name__}: {text} (run again with --debug for the traceback)"


def dispatch(words: list[str]) -> int:
    parser = Parser(
        prog="refine-nsp", description="Train fast-weight language models on next-sequence prediction (ReFINE).",
        epilog="`refine-nsp COMMAND --help` explains a command. --debug shows tracebacks.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"refine-nsp {own_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    if not words or words[0] not in COMMANDS:
        if words and not words[0].startswith("-"):
            from refine_nsp.errors import RefineError, closest

            raise RefineError(f"no command {words[0]!r}{closest(words[0], COMMANDS)}; there are {', '.join(COMMANDS)}")
        parser.parse_args(words)
        parser.print_help()
        return 0
    name, rest = words[0], words[1:]
    wait_without_spinning()
    module = importlib.import_module(f"refine_nsp.commands.{name}")
    quiet_libraries()
    keep_freed_memory()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)
    if name in FROM_DATACLASSES:
        module.run(rest)
        return 0
    own = Parser(prog=f"refine-nsp {name}", description=module.__doc__, allow_abbrev=False)
    module.add_arguments(own)
    module.run(own.parse_args(rest))
    return 0


def end_at_once(number: int, frame: FrameType | None) -> None:
    """A handler of SIGTERM for the start, when there is nothing to clean up and libraries are halfway loaded."""
    os._exit(TERMINATED_CODE)


def own_version() -> str:
    """As installed."""
    try:
        return version("refine-nsp")
    except PackageNotFoundError:
        return "0+unknown"


def quiet_libraries() -> None:
    """Loading bars and advice of libraries are noise here: progress is ours to show, errors are shown anyway."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # What a parser stumbled on, attempts to reach the hub: our one line says what came of it.
    logger("datasets").setLevel("CRITICAL")
    logger("huggingface_hub").setLevel("ERROR")


if __name__ == "__main__":
    sys.exit(main())
