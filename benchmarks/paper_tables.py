"""Run the study of what each objective does to the shipped bases, by a test decided beforehand, with its controls; write docs/results.md.

    python benchmarks/paper_tables.py --scale medium --squad squad.jsonl --hotpotqa hotpotqa.jsonl --essays essays.jsonl \
        --novels novels.parquet

The test is described in benchmarks/study/plan.md. A second run does only what is missing: figures of finished jobs are taken from one
packed file and added to it (--records benchmarks/study/records/medium.json.gz), and models are trained again where only their figures were
kept. Without the files, questions are on paragraphs of the standard library, and measurements on novels are left out. With a GPU, give
--device cuda and --workers N, so that processors measure meanwhile. On several machines, run the same command with --shard 1/3, 2/3 and
3/3; when one says that jobs of others are missing, gather the folders `jobs` of all machines on each and run it again. --so_far writes the
tables that are complete, once the test is.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

from refine_nsp.evaluation.run import claim_folder
from study import carried
from study.jobs import Study, settings_of
from study.material import Files
from study.records import pack, unpack
from study.schedule import read_shard, run_all, stages
from study.settings import BASES, SCALES
from study.tables import write_results

HELP = {
    "squad": "SQuAD questions (json as published, jsonl or parquet): RULER's qa_1, and paragraphs to ask about",
    "hotpotqa": "HotpotQA questions, likewise: paragraphs to ask about",
    "essays": "haystack of RULER's needles (default: Python's reference documentation)",
    "novels": "long text with a column `text`, to measure far context on",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="small")
    for f in fields(Files):
        parser.add_argument(f"--{f.name}", help=HELP[f.name])
    parser.add_argument("--models", nargs="+", choices=BASES, help="bases to run [all]")
    parser.add_argument("--shard", type=read_shard, default=(1, 1), metavar="I/N", help="run the I-th of N parts of the jobs")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="where mid-training runs: one for all arms of a base and seed [cpu]",
    )
    parser.add_argument("--output_dir", default="runs/paper_tables", help="results of every job, models, report.html")
    parser.add_argument(
        "--records",
        type=Path,
        help="packed figures of jobs, such as benchmarks/study/records/medium.json.gz: those there are not run again, new ones are added",
    )
    parser.add_argument("--document", type=Path, help="where the tables go [docs/results.md; output_dir for --scale smoke]")
    parser.add_argument("--so_far", action="store_true", help="run nothing: write the tables of what is complete")
    args = parser.parse_args()
    scale, out = SCALES[args.scale], Path(args.output_dir) / args.scale
    if args.models:
        scale = replace(scale, families=tuple(args.models))
    study = Study(str(out), scale, Files(**{f.name: getattr(args, f.name) for f in fields(Files)}), args.device)
    if args.records is not None and args.records.exists():
        unpack(args.records, out)
    claim_folder(out, settings_of(study))
    planned = stages(study)
    if args.so_far:
        lacking = sorted(job.name for stage in planned[:2] for job in stage if not study.path(job).exists())
        if lacking:
            sys.exit(f"the test has jobs to run, {len(lacking)}: {' '.join(lacking)}; leave --so_far out to run them")
    else:
        started = time.monotonic()
        try:
            complete = run_all(study, planned, args.workers, args.shard)
        finally:
            if args.records is not None:
                pack(out, args.records)
        print(f"{(time.monotonic() - started) / 60:.1f} minutes in this call")
        if not complete:
            sys.exit(f"this shard is done as far as it goes; gather the other shards' figures in {out / 'jobs'} and run it again")
    default = out / "results.md" if args.scale == "smoke" else Path(__file__).resolve().parents[1] / "docs" / "results.md"
    document = args.document or default
    print(write_results(study, args.scale, document))
    if args.scale == "medium" and carried.RECORD.exists():
        carried.write(carried.RECORD, document)


if __name__ == "__main__":
    main()
