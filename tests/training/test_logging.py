"""What docs/logging.md says of trackers: a run writes its figures to them, the same that metrics.jsonl has."""

import json
import math
from pathlib import Path

import pytest

from refine_nsp.cli import main


def run(folder: Path, *more: str) -> list[dict]:
    """A short mid-training with validation; the rows of its metrics.jsonl."""
    text = folder / "text.txt"
    text.write_text("\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(200)))
    argv = "--preset context --max_steps 2 --logging_steps 1 --max_length 128 --per_device_train_batch_size 2 --positions_per_sequence 2"
    argv += f" --use_cpu --learning_rate 1e-4 --dataset_name {text} --output_dir {folder / 'run'}"
    assert main(["midtrain", *argv.split(), *more]) == 0
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def curves(rows: list[dict]) -> dict[str, list[float]]:
    """By the names that trackers show: train/ and eval/."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "epoch") and isinstance(value, int | float):
                shown = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                found.setdefault(shown, []).append(float(value))
    return found


def test_tensorboard_has_the_curves_of_the_run(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = curves(run(tmp_path, "--report_to", "tensorboard"))
    found: dict[str, list[float]] = {}
    files = sorted((tmp_path / "run" / "runs").rglob("events.out.tfevents.*"))
    for file in files:
        events = EventAccumulator(str(file))
        events.Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, []).extend(e.value for e in events.Scalars(name))
    assert {"train/loss_ntp", "train/loss_policy", "train/reward_hybrid", "eval/loss", "eval/greedy_match"} <= found.keys()
    assert set(expected) <= set(found), set(expected) - set(found)
    assert len(found["train/loss_ntp"]) == 2
    for name, values in expected.items():
        assert [v for v in found[name] if math.isfinite(v)] == pytest.approx(values, rel=1e-5), name


def test_trackio_has_the_curves_of_the_run_and_sends_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="Trackio is not installed")
    import sqlite3

    expected = curves(run(tmp_path, "--report_to", "trackio", "--project", "texts", "--run_name", "context"))
    databases = list((tmp_path / "trackio").rglob("*.db"))
    assert databases, "no local database"
    rows = []
    for database in databases:
        with sqlite3.connect(database) as opened:
            if opened.execute("select 1 from sqlite_master where name = 'metrics'").fetchone():
                rows += [
                    json.loads(m) for (m,) in opened.execute("select metrics from metrics where run_name = 'context' order by id")
                ]
    found = [row["train/loss_ntp"] for row in rows if "train/loss_ntp" in row]
    assert found == pytest.approx(expected["train/loss_ntp"], rel=1e-5)
    assert {"train/loss_policy", "eval/loss"} <= {name for row in rows for name in row}
