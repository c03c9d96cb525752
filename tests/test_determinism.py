"""The same seed gives the same bits: every command that draws anything, run twice."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from refine_nsp.cli import main
from tests.test_cli import TEXT, tiny
from tests.tiny.test_pretrain import library, small_tokenizer, texts  # noqa: F401, fixtures
from tests.tiny.test_pretrain import tiny as tiny_base

BASE = "refine-nsp/tiny-delta-net"
ADAPTED = ["--ttt_learning_rate", "1e-3", "--ttt_positions_per_sequence", "2", "--ttt_num_generations", "2"]


def weights(folder: Path) -> dict[str, bytes]:
    return {name: w.numpy().tobytes() for name, w in load_file(folder / "model.safetensors").items()}


def midtrain(folder: Path, capsys) -> object:
    """Rollouts are sampled, positions drawn, rows shuffled."""
    (folder / "text.txt").write_text(TEXT)
    assert main(tiny(folder, folder / "text.txt", "--num_generations", "2", "--seed", "5")) == 0
    return weights(folder / "run")


def posttrain(folder: Path, capsys) -> object:
    """A reference answer is drawn, and the inner update rolls out."""
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
    """Answers sampled, from weights adapted with sampled rollouts."""
    argv = ["evaluate", BASE, "--tasks", "niah_single_1", "niah_multikey_1", "--lengths", "512", "--samples", "2", "--protocol",
            "published", "--ttt", "refine", *ADAPTED, "--output_dir", str(folder / "run")]  # fmt: skip
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
def test_twice(command, tmp_path, capsys, library):  # noqa: F811
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        capsys.readouterr()
        found.append(command(tmp_path / name, capsys))
    assert found[0] and found[0] == found[1]


def test_another_seed_is_another_draw(capsys):
    said = []
    for seed in ("7", "8"):
        assert (
            main(["generate", BASE, "--prompt", "def f(", "--max_new_tokens", "24", "--temperature", "1.3", "--seed", seed]) == 0
        )
        said.append(capsys.readouterr().out)
    assert said[0] != said[1]
