"""A model card says what a model was trained from, how, and what was measured, by what its run left in the folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from refine_nsp.files import write_atomically
from refine_nsp.report import plots
from refine_nsp.report.runs import CURVES, Run, by_source
from refine_nsp.report.tables import Cell, Table

MARK = "<!-- written by refine-nsp; take this line out and it will not be written again -->"
CURVE_FILE = "curves.svg"
OBJECTIVES = {
    "refine": "next-sequence prediction beside next-token prediction",
    "ntp": "next-token prediction alone",
    "none": "the answers alone",
    "distill": "distillation",
    "transfer": "transfer of attention, layer by layer,",
}
PEFT = "# Model Card for Model ID"  # PEFT gives an adapter's folder this card, in which nobody has written a word yet
PAPER = """@article{hwang2026refine,
  title   = {Reinforced Fast Weights with Next-Sequence Prediction},
  author  = {Hwang and Wu and Chun and Russakovsky},
  journal = {arXiv:2602.16704},
  year    = {2026}
}"""


def is_ours(path: Path) -> bool:
    """Tell whether a README.md is one of ours, or one that nobody has written a word in."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return MARK in text or PEFT in text


def write_card(
    folder: Path, run: Run, base: str, data: Sequence[str], settings: Mapping[str, object], tags: list[str], plotted: bool = True
) -> Path | None:
    """Write README.md of a saved model, and curves.svg where there are curves. Where the README.md is somebody else's, nothing is touched.

    Args:
        base: the model it was trained from; "" where that has no name.
        data: the data it was trained on; folders and files of this machine are named by the last part of their path.
        settings: those to tell, by the names of flags.
        tags: words by which the hub finds the model.
        plotted: False leaves the curves out.
    """
    path = folder / "README.md"
    if path.exists() and not is_ours(path):
        return None
    if (svg := curves(run) if plotted else None) is not None:
        write_atomically(folder / CURVE_FILE, svg)
    return write_atomically(path, card(run, base, data, settings, tags, has_curves=svg is not None))


def card(run: Run, base: str, data: Sequence[str], settings: Mapping[str, object], tags: list[str], has_curves: bool) -> str:
    """Make the card, as Markdown with the hub's header; see `write_card`."""
    head: dict[str, object] = {
        "library_name": "peft" if settings.get("use_peft") else "transformers", "pipeline_tag": "text-generation",
        "tags": sorted({"refine-nsp", "fast-weights", "long-context", *tags}),
    }  # fmt: skip
    if "/" in base and not Path(base).exists():
        head["base_model"] = base
    teacher = named(str(settings["teacher"])) if settings.get("teacher") else ""
    told: list[list[Cell]] = [[name, teacher if name == "teacher" else text_of(value)] for name, value in settings.items()]
    known = {name: run.environment.get(name) for name in ("refine-nsp", "torch", "transformers")}
    versions = ", ".join(f"{name} {text_of(version)}" for name, version in known.items() if version)
    method = OBJECTIVES.get(str(settings.get("objective")), OBJECTIVES["refine"])
    method += (
        f" from {teacher}"
        if settings.get("objective") in ("distill", "transfer")
        else f", tokens weighed by {teacher}"
        if teacher
        else ""
    )
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n{MARK}\n",
        f"# {text_of(run.name)}\n",
        f"Trained from {named(base) if base else 'a model without a name'} on {', '.join(map(named, data)) or 'data of its own'} by "
        f"refine-nsp: {method}{f' ({versions})' if versions else ''}.{' All settings are in `config.yaml`.' if run.config else ''}\n",
        Table("Settings", ["setting", "value"], told).markdown(),
        "\n## Measured\n",
        figures(run).markdown(),
        f"\n![curves]({CURVE_FILE})\n" if has_curves else "",
        "Training figures are means over the logged steps around them; validation figures are of text that was not trained on.\n",
        "## Limits\n",
        "These figures say how this training went, not how good the model is at a task: measure with `refine-nsp evaluate`, beside the "
        "same run with `--objective ntp`. Licences and limits of the base and of the data still hold.\n",
        f"## Cite\n\n```bibtex\n{PAPER}\n```",
    ]
    return "\n".join(line for line in lines if line) + "\n"


def figures(run: Run) -> Table:
    """Make the table of the first and the last logged value of each figure that the run has."""
    rows: list[list[Cell]] = []
    for key, title, unit in [*CURVES, *by_source([run])]:
        if ys := run.curve(key)[1]:
            rows.append([f"{title}{f', {unit}' if unit else ''}", float(ys[0]), float(ys[-1])])
    return Table("First and last logged value", ["figure", "first", "last"], rows)


def curves(run: Run) -> str | None:
    """Draw the losses over the steps; None where none has two values."""
    named_sets = {key: title for key, title, _ in by_source([run]) if key.startswith("eval_") and key.endswith("_loss")}
    losses = {"loss_ntp": "training", "eval_loss": "validation", "loss_answer": "answers", **named_sets}
    wanted = {title: run.curve(key) for key, title in losses.items()}
    drawn = {title: curve for title, curve in wanted.items() if len(curve[0]) > 1}
    return plots.line_plot(drawn, "cross-entropy, nats").svg() if drawn else None


def text_of(value: object) -> str:
    """Write a value on one line, without what Markdown or HTML takes for markup: tags, links (bare ones too), images, emphasis, code."""
    text = " ".join(str(value).replace("`", "'").split())
    text = re.sub(r"([\\\[\]()!*])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))
    return re.sub(r"(?i)(www)\.", r"\1\\.", text.replace("://", "\\://"))


def named(source: str) -> str:
    """Return a name on the hub as it is, and of a path the last part, as Markdown's code."""
    local = Path(source).is_absolute() or Path(source).exists()
    name = Path(source).absolute().name if local else source  # absolute: `.` has no name
    return f"`{' '.join(name.replace('`', chr(39)).split())}`"
