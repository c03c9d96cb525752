"""The default text is what every Python installation has on disk: the standard library's source and documentation strings.

Nothing is downloaded, and no text is stored in this package; it is read when needed. Whole modules are held out, by name, so that the
held-out text is the same wherever the standard library is.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

HELD_OUT = ("argparse", "difflib", "fractions", "imaplib", "ipaddress", "mailbox", "statistics", "tarfile", "textwrap")
SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "ensurepip", "idlelib", "lib2to3", "lib-dynload", "pydoc_data", "site-packages", "test", "tests",
     "turtledemo", "dist-packages"}
)  # fmt: skip
SMALLEST_FILE_BYTES = 2_000


def standard_library(held_out: bool) -> list[str]:
    """Read the sources of modules in a fixed order: those held out for validation, or all others."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        build_settings = path.name.startswith("_sysconfigdata")  # those of one machine
        skipped = build_settings or SKIPPED_FOLDERS.intersection(relative.parts) or path.stat().st_size < SMALLEST_FILE_BYTES
        if not skipped and (relative.parts[0].removesuffix(".py") in HELD_OUT) == held_out:
            texts.append(path.read_text(encoding="utf-8", errors="ignore"))
    return texts
