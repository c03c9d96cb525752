"""`refine-nsp quickstart`: the main job on what is here: mid-train the shipped base by NTP and by four presets, compare, report."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", default="runs/quickstart", help="where arms, table and report go [runs/quickstart]")
    parser.add_argument("--data", help="your own text (file, folder, glob) instead of the standard library's")
    parser.add_argument("--text_column", default="text", help="its column, for jsonl and parquet [text]")
    parser.add_argument("--model", default="refine-nsp/tiny-delta-net", help="the base to start from")
    parser.add_argument("--full", action="store_true", help="more seeds and steps (about an hour on 2 cores)")
    parser.add_argument("--seeds", type=int, help="number of seeds")
    parser.add_argument("--steps", type=int, help="optimizer steps per arm")


def run(args: argparse.Namespace) -> None:
    from refine_nsp.tiny.quickstart import quickstart, settings

    quickstart(settings(args.full, args.seeds, args.steps), args.output_dir, args.model, args.data, args.text_column)
