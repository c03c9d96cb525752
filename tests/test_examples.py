"""Every script of examples/ runs, at a size for a test, and its figures are what it says they are."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LINES = 60


def run(tmp_path: Path, name: str, *flags: str) -> str:
    """What the script prints, run in an empty folder without a network."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *flags], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(f"def function_{i % 7}(argument):\n    return argument + {i % 7}\n" for i in range(300)))
    return str(path)


def test_examples_are_short_and_all_tried_here():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == set(re.findall(r'run\(tmp_path, "(\w+\.py)"', Path(__file__).read_text()))
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= LINES, path.name


@pytest.mark.slow
def test_own_text_learns_it(tmp_path, text):
    out = run(tmp_path, "own_text.py", text, "--steps", "4", "--max_length", "256")
    before, after = map(float, re.search(r"eval_loss\s+([\d.]+) -> ([\d.]+)", out).groups())
    assert after < before
    assert (tmp_path / "runs" / "own_text" / "model.safetensors").exists()


@pytest.mark.slow
def test_own_reward_is_logged_beside_the_others(tmp_path):
    out = run(tmp_path, "own_reward.py", "--steps", "5")
    logged = dict(re.findall(r"reward_(right_tokens_anywhere|exact_match|is_code) ([\d.]+)", out))
    # A token right in its place is also right anywhere.
    assert float(logged["right_tokens_anywhere"]) >= float(logged["exact_match"]) > 0 and float(logged["is_code"]) == 1


@pytest.mark.slow
def test_long_document_is_learned_and_forgotten(tmp_path, text):
    out = run(tmp_path, "long_document.py", text, "--steps", "2", "--tokens", "1024")
    before, after = map(float, re.search(r"after them: ([\d.]+) -> ([\d.]+)", out).groups())
    assert after < before and "restored: True" in out
    assert (tmp_path / "runs" / "long_document.svg").read_text().count("<path") > 10


@pytest.mark.slow
def test_hybrid_learns(tmp_path):
    out = run(tmp_path, "hybrid.py", "--steps", "6")
    losses = [float(x) for x in re.findall(r"loss_ntp ([\d.]+)", out)]
    assert losses[-1] < losses[0] and out.count("rollouts [") == 4


def code_cells() -> list[dict]:
    notebook = json.loads((EXAMPLES / "refine.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_was_run_from_top_to_bottom_without_an_error():
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    said = "".join("".join(o.get("text", "")) for o in outputs)
    assert "recall_greedy" in said and "restored" in said and "False" not in said
    assert sum("image/svg+xml" in o.get("data", {}) for o in outputs) == 2
    assert not re.search(r"/(?:home|root|tmp|usr|work|Users)/", json.dumps(outputs))
    assert (EXAMPLES / "refine.ipynb").stat().st_size < 200_000


@pytest.mark.slow
def test_the_notebooks_cells_run(tmp_path, monkeypatch):
    pytest.importorskip("IPython", reason="the extra [docs] is not installed")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "notebook"}
    for cell in code_cells():
        code = "".join(cell["source"]).replace("prompts_per_cell=8", "prompts_per_cell=3").replace("steps=20", "steps=2")
        exec(compile(code, "refine.ipynb", "exec"), names)
    assert names["before"]["recall_log_p"] != names["after"]["expected"]["recall_log_p"] != names["after"]["ntp"]["recall_log_p"]
