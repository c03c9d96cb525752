"""Write what the study has found so far (results.md, curve.svg) from the folder of its runs, and keep the figures in record.json.

    python recipes/smollm2/tables.py --out runs/smollm2

Without a folder of runs the tables are those of the record.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy import stats

from refine_nsp.evaluation.run import read_results
from refine_nsp.evaluation.statistics import t_interval
from refine_nsp.files import read_json, write_atomically
from refine_nsp.report.plots import line_plot
from refine_nsp.report.tables import Cell, Table

HERE = Path(__file__).resolve().parent
FULL, WINDOW, BASE, CONTROL = "full attention", "window alone", "base", "control"
TWICE = ("window alone, read twice", "base, read twice")
TESTED = (("expected", "ntp"), ("expected", "likelihood"))  # paired by seed, Holm over the two
STEP_TOKENS = 4 * 1024
CURVES = ("loss 512-1023", "kl 512-1023", "second", "answers right")
Record = dict[str, Any]


def collect(out: Path) -> Record:
    """Read the figures of a folder of runs: losses by model or checkpoint, needles and short contexts by model and task."""
    record: Record = {"losses": {}, "needles": {}, "short": {}, "questions": {}}
    for path in sorted((out / "figures" / "held_out").glob("*.json")):
        record["losses"][path.stem] = read_json(path, "losses")
    for kind in ("needles", "short"):
        for folder in sorted(p for p in (out / kind).glob("*") if (p / "results.json").exists()):
            record[kind][folder.name] = {r.name: next(iter(r.estimates.values())).mean for r in read_results(folder)}
    for results in sorted((out / "questions").glob("*/*/results.json")):
        file, model = results.parts[-3:-1]
        (answered,) = read_results(results.parent)
        record["questions"].setdefault(model, {})[file] = next(iter(answered.estimates.values())).mean
    return record


def by_arm(names: Sequence[str]) -> dict[str, list[str]]:
    """Group the names of models into arms, with the models of their seeds in order; what is no arm stands for itself."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        if not re.match(r"(taught|control)-\d+$", name):
            found[re.sub(r"-\d$", "", name)].append(name)
    return dict(found)


def recovered(record: Record, model: str) -> float:
    """Compute the share of what full attention gains over the window, from token 512 of novels on, that a model has recovered."""
    window, full, own = (record["losses"][name]["loss 512-1023"] for name in (WINDOW, FULL, model))
    return (window - own) / (window - full)


def needles(record: Record, model: str) -> float:
    """Compute the primary outcome: the mean of all needle tasks, in percent."""
    return 100 * mean(record["needles"][model].values())


def spread(values: Sequence[float], digits: int) -> str:
    shown = f"{mean(values):.{digits}f}"
    return f"{shown} ± {stdev(values):.{digits}f}" if len(values) > 1 else shown


def models_table(record: Record) -> Table:
    """Tabulate every model: needles, the share recovered, a second reading, answers, and short contexts."""

    def short(model: str) -> float:
        return 100 * mean(record["short"][model].values())

    def loss(key: str) -> Callable[[str], float]:
        return lambda model: record["losses"][model][key]

    columns: list[tuple[str, str, Callable[[str], float], int]] = [
        ("needles, %", "needles", lambda m: needles(record, m), 1),
        ("recovered", "losses", lambda m: recovered(record, m), 3),
        ("first reading", "losses", loss("first"), 3),
        ("second reading", "losses", loss("second"), 3),
        ("answers, nats", "losses", loss("answers"), 3),
        ("answers right, %", "losses", lambda m: 100 * loss("answers right")(m), 1),
        ("short contexts, %", "short", short, 1),
    ]
    arms = by_arm([*record["losses"], *record["needles"]])
    first = [name for name in (FULL, WINDOW, TWICE[0], BASE, TWICE[1], CONTROL) if name in arms]
    rows: list[list[Cell]] = []
    for arm in [*first, *(name for name in arms if name not in first)]:
        models = sorted(set(arms[arm]))
        cells = [[of(m) for m in models if m in record[kind]] for _, kind, of, _ in columns]
        rows.append([arm, *(spread(x, digits) if x else "" for x, (*_, digits) in zip(cells, columns, strict=True))])
    note = "recovered: (window alone - model) / (window alone - full attention) of the loss of novels from token 512 on; ± over seeds"
    return Table("What was measured", ["", *(title for title, *_ in columns)], rows, [note])


def questions_table(record: Record) -> Table | None:
    """Tabulate the answers to RULER's questions by file; None before there are some."""
    asked = record.get("questions", {})
    files = sorted({file for found in asked.values() for file in found})
    rows: list[list[Cell]] = [
        [model, *(f"{100 * found[file]:.1f}" if file in found else "" for file in files)] for model, found in asked.items()
    ]
    return Table("RULER's questions, % answered", ["", *files], rows, []) if rows else None


def contrasts(record: Record) -> Iterator[tuple[str, list[float]]]:
    """Give the differences of the primary outcome that were decided beforehand, by seed."""
    arms = by_arm(list(record["needles"]))
    for arm, other in TESTED:
        seeds = min(len(arms.get(arm, ())), len(arms.get(other, ())))
        if seeds > 1:
            pairs = zip(arms[arm][:seeds], arms[other][:seeds], strict=True)
            yield f"{arm} - {other}", [needles(record, a) - needles(record, b) for a, b in pairs]


def test_table(record: Record) -> Table | None:
    """Tabulate the test; None before two seeds of an arm are there."""
    found = dict(contrasts(record))
    p = {name: float(stats.ttest_1samp(values, 0.0).pvalue) for name, values in found.items()}
    ordered, adjusted, largest = sorted(p, key=lambda name: p[name]), {}, 0.0
    for rank, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = largest
    rows: list[list[Cell]] = []
    for name, values in found.items():
        d, half = t_interval(values)
        rows.append([name, f"{d:+.1f} ± {half:.1f}", f"{p[name]:.3f}", f"{adjusted[name]:.3f}", len(values)])
    columns = ["points of needles", "difference", "p", "p, Holm", "seeds"]
    return Table("The test decided beforehand", columns, rows, ["± half a 95 % t-interval, paired by seed"]) if rows else None


def curve_tables(record: Record) -> Iterator[Table]:
    """Tabulate the curves of the base and of its control by tokens."""
    for made in ("taught", "control"):
        steps = sorted(int(name.split("-")[1]) for name in record["losses"] if re.match(rf"{made}-\d+$", name))
        rows: list[list[Cell]] = [
            [f"{step * STEP_TOKENS:,}", *(f"{x:.3f}" for x in record["losses"][f"{made}-{step}"].values())] for step in steps
        ]
        if rows:
            columns = ["tokens", *record["losses"][f"{made}-{steps[0]}"]]
            yield Table(
                {"taught": "The base as it is taught", "control": "Its control, which writes nothing"}[made], columns, rows
            )


def curve_svg(record: Record, key: str) -> str:
    """Draw a figure of the base and its control by tokens, between the window alone and full attention."""
    curves = {}
    for made in ("taught", "control"):
        found = {int(n.split("-")[1]): x[key] for n, x in record["losses"].items() if re.match(rf"{made}-\d+$", n)}
        if WINDOW in record["losses"]:
            found[0] = record["losses"][WINDOW][key]
        steps = sorted(found)
        curves[made] = ([step * STEP_TOKENS / 1000 for step in steps], [found[step] for step in steps])
    if FULL in record["losses"] and curves["taught"][0]:
        ends = [curves["taught"][0][0], curves["taught"][0][-1]]
        curves[FULL] = (ends, [record["losses"][FULL][key]] * 2)
    return line_plot(curves, key, "thousand tokens").svg()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the study's runs, to bring the record up to date")
    parser.add_argument("--record", type=Path, default=HERE / "record.json")
    args = parser.parse_args()
    if args.out is not None:
        write_atomically(args.record, json.dumps(collect(args.out), indent=1) + "\n")
    record = read_json(args.record, "the study's figures")
    pictures = []
    for key in CURVES:
        name = f"curve_{key.replace(' ', '_').replace('-', '_')}.svg"
        write_atomically(args.record.parent / name, curve_svg(record, key))
        pictures.append(f"![{key}]({name})")
    tables = [
        t for t in (test_table(record), models_table(record), questions_table(record), *curve_tables(record)) if t is not None
    ]
    written = "\n".join(["# What was found\n", *(t.markdown() for t in tables), "", *pictures, ""])
    write_atomically(args.record.parent / "results.md", written)
    print(written)


if __name__ == "__main__":
    main()
