"""The same seed gives the same bits: every command that draws anything, run twice."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from refine_nsp.cli import main
from refine_nsp.tiny import quickstart as q
from tests.test_cli import TEXT, tiny
from tests.tiny.test_pretrain import library, small_tokenizer, texts, undrawn  # noqa: F401, fixtures
from tests.tiny.test_pretrain import tiny as tiny_base

BASE = "refine-nsp/tiny-delta-net"
ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = replace(
    q.Settings(),
    seeds=1,
    steps=1,
    sequences_per_step=1,
    max_length=128,
    document_windows=(2,),
    lengths=(128,),
    unseen_lengths=(128,),
    depths=(0.5,),
    prompts_per_cell=1,
    text_windows=1,
)
ADAPTED = ["--ttt_learning_rate", "1e-3", "--ttt_positions_per_sequence", "2", "--ttt_num_generations", "2"]


def weights(folder: Path) -> dict[str, bytes]:
    return {name: w.numpy().tobytes() for name, w in load_file(folder / "model.safetensors").items()}


def midtrain(folder: Path, capsys) -> object:
    """Rollouts are sampled, positions drawn, rows shuffled."""
    (folder / "text.txt").write_text(TEXT)
    assert main(tiny(folder, folder / "text.txt", "--num_generations", "2", "--seed", "5")) == 0
    return weights(folder / "run")


def posttrain(folder: Path, capsys) -> object:
    """A reference answer is drawn, and the inner update samples rollouts."""
    rows = [{"prompt": f"The key of door {i} is {i}{i}. " * 8, "answers": [str(i), f"{i}{i}"]} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["posttrain", "--dataset_name", str(folder / "rows.jsonl"), "--output_dir", str(folder / "run"), "--max_steps", "2",
            "--max_length", "256", "--per_device_train_batch_size", "2", "--positions_per_sequence", "2", "--reference", "random",
            "--report_to", "none", "--use_cpu", "--seed", "5"]  # fmt: skip
    assert main(argv) == 0
    return weights(folder / "run")


def pretrain(folder: Path, capsys) -> object:
    from refine_nsp.tiny.pretrain import pretrain as run

    return weights(run(tiny_base(folder / "run", {"needles": 0.4, "facts": 0.3}, length=128)))


def evaluate(folder: Path, capsys) -> object:
    """Answers sampled (those of the file, by the published protocol), from weights adapted with sampled rollouts."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"import os\nx = {i}\n" * 12, "answer": "y"}) + "\n" for i in range(2)))
    argv = ["evaluate", BASE, "--tasks", "niah_multikey_1", "prompts", "--lengths", "512", "--samples", "1", "--prompts", str(prompts),
            "--protocol", "published", "--ttt", "refine", *ADAPTED, "--output_dir", str(folder / "run")]  # fmt: skip
    assert main(argv) == 0
    seconds = re.compile(r'"[a-z_]*seconds": [\d.e-]+')
    return {p.name: seconds.sub("", p.read_text()) for p in sorted((folder / "run").rglob("*.jsonl"))}


def ttt(folder: Path, capsys) -> object:
    argv = ["ttt", BASE, "--prompt", "import os\nimport sys\n" * 12, "--max_new_tokens", "12", *ADAPTED]
    assert main(argv) == 0
    return re.sub(r"│ +\d+\.\d\d +│|took [\d.]+ s", "", capsys.readouterr().out)  # seconds


def generate(folder: Path, capsys) -> object:
    assert main(["generate", BASE, "--prompt", "def f(", "--max_new_tokens", "24", "--temperature", "1.3", "--seed", "7"]) == 0
    return capsys.readouterr().out


def inspect(folder: Path, capsys) -> object:
    (folder / "text.txt").write_text(TEXT[:1500])
    argv = ["inspect", BASE, str(folder / "text.txt"), "--output", str(folder / "page.html"), "--num_generations", "2"]
    assert main(argv) == 0
    return (folder / "page.html").read_text().replace(str(folder), "")


@pytest.mark.parametrize("command", [midtrain, posttrain, pretrain, evaluate, ttt, generate, inspect], ids=lambda f: f.__name__)
def test_twice(command, tmp_path, capsys, library, undrawn):  # noqa: F811
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        capsys.readouterr()
        found.append(command(tmp_path / name, capsys))
    assert found[0] and found[0] == found[1]


def quickstart(folder: Path, capsys) -> object:
    """All arms on the same rows, in its smallest form."""
    chosen = q.standard_library(held_out=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(q, "standard_library", lambda held_out: chosen[:1] if held_out else chosen[1:3])
        q.quickstart(QUICKSTART, str(folder / "quick"), BASE, None, "text")
    found = json.loads((folder / "quick" / "results.json").read_text())["figures"]
    return re.sub(r'"[a-z_]*seconds": [\d.e-]+', "", json.dumps(found))


def everything(folder: Path) -> None:
    """What three commands make, into a file by command."""
    for command in (midtrain, evaluate, quickstart):
        (folder / command.__name__).mkdir()
        made = repr(command(folder / command.__name__, None)).replace(str(folder), "")
        (folder / f"{command.__name__}.made").write_text(made)


@pytest.mark.slow
def test_the_order_of_sets_and_hashes_decides_nothing(tmp_path):
    """In processes of their own, which hash strings differently and share no cache."""
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        code = "import sys, pathlib; from tests.test_determinism import everything; everything(pathlib.Path(sys.argv[1]))"
        environment = os.environ | {"PYTHONHASHSEED": seed, "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        argv = [sys.executable, "-c", code, str(folder)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=600, env=environment, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-1000:]
    for command in (midtrain, evaluate, quickstart):
        one, other = ((tmp_path / seed / f"{command.__name__}.made").read_text() for seed in "12")
        assert one and one == other, command.__name__


def test_another_seed_is_another_draw(capsys):
    said = []
    for seed in ("7", "8"):
        assert (
            main(["generate", BASE, "--prompt", "def f(", "--max_new_tokens", "24", "--temperature", "1.3", "--seed", seed]) == 0
        )
        said.append(capsys.readouterr().out)
    assert said[0] != said[1]
