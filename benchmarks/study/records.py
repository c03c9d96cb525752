"""Keep the figures of all jobs in one compressed file, small enough for the repository; docs/results.md is written from it."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from refine_nsp.evaluation.run import claim_folder
from refine_nsp.files import expecting, write_atomically, write_bytes_atomically

SETTINGS = "settings.json"


def unpack(packed: Path, folder: Path) -> None:
    """Write the figures in `packed` that `folder` lacks, each where its job would have left it.

    Raises:
        RefineError: the file is damaged or holds something else, or `folder` holds figures made with other settings.
    """
    with expecting("figures of a study, as paper_tables.py packs them", packed):
        try:
            content = gzip.decompress(packed.read_bytes())
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(str(error)) from error
        held: dict[str, dict[str, Any]] = json.loads(content)
        settings, jobs = held["settings"], held["jobs"]
    claim_folder(folder, settings)
    for name, figures in jobs.items():
        path = folder / "jobs" / f"{name}.json"
        if not path.exists():
            write_atomically(path, json.dumps(figures, indent=1) + "\n")


def pack(folder: Path, packed: Path) -> None:
    """Write all figures of `folder` as one file; the same figures give the same bytes."""
    held = {
        "settings": json.loads((folder / SETTINGS).read_text(encoding="utf-8")),
        "jobs": {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "jobs").glob("*.json"))},
    }
    # The compressed form holds no time, so that packing again without a new job changes nothing.
    write_bytes_atomically(packed, gzip.compress(json.dumps(held, separators=(",", ":")).encode(), mtime=0))
