"""The paper's tables and figures at small scale, on the shipped bases, with the controls they need; writes docs/results.md.

    python benchmarks/paper_tables.py --scale small --squad squad.jsonl --hotpotqa hotpotqa.jsonl

Resumable: run it again and only what is missing is done. Without the two files, paragraphs come from the standard library.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path

from refine_nsp.evaluation.run import claim_folder
from small_scale.jobs import Study, settings_of
from small_scale.schedule import run_all, stages
from small_scale.settings import BASES, SCALES
from small_scale.tables import write_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--squad", help="SQuAD questions (json as published, jsonl or parquet) whose paragraphs are used")
    parser.add_argument("--hotpotqa", help="HotpotQA questions, likewise")
    parser.add_argument("--models", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--ablations", nargs="*", choices=BASES, default=["DeltaNet"], help="models the ablations are run on")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--output_dir", default="runs/paper_tables", help="results of every job, models, report.html")
    parser.add_argument("--document", type=Path, help="where the tables go [docs/results.md; output_dir for --scale smoke]")
    args = parser.parse_args()
    out = Path(args.output_dir) / args.scale
    study = Study(str(out), SCALES[args.scale], args.squad, args.hotpotqa)
    claim_folder(out, settings_of(study))
    started = time.monotonic()
    run_all(study, stages(study, args.models, args.ablations), args.workers)
    default = out / "results.md" if args.scale == "smoke" else Path(__file__).resolve().parents[1] / "docs" / "results.md"
    page = write_results(study, args.models, args.ablations, args.document or default)
    print(f"{(time.monotonic() - started) / 60:.1f} minutes in this call; {asdict(study.scale)}\n{page}")


if __name__ == "__main__":
    main()
