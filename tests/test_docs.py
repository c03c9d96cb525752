"""Every block of Python or shell of the README and the docs runs, or is skipped and says why; the site of the docs builds."""

import gzip
import importlib
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

import refine_nsp
from refine_nsp.cli import main
from refine_nsp.commands.estimate import EstimateArguments

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.S | re.M)
RUN = ("python", "bash")
# What a line of shell begins with, and why no test runs it.
SKIPPED = {
    "pip": "installs packages",
    "git": "needs the repository's address",
    "bash": "installs and needs a GPU",
    "tensorboard": "a server, of another package",
    "trackio": "a server, of another package",
}
MODEL = "refine-nsp/tiny-delta-net"  # where a page says MODEL
# Sizes for a test, behind the flags that docs/recipes.md gives.
SMALL = {
    "midtrain": "--max_steps 2 --max_length 256 --eval_strategy no --use_cpu",
    "posttrain": "--max_steps 2 --max_length 512 --ruler_length 512 --ruler_samples 8 --use_cpu",
    "ttt": "--max_new_tokens 4",
    "evaluate": "--tasks niah_single_1 qa_1 --lengths 512 --samples 2",
}
# And those of docs/scaling.md.
SMALL_SCALING = {
    "estimate": "--max_length 512",
    "midtrain": "--max_steps 2 --max_length 256 --gradient_accumulation_steps 1 --save_strategy no --use_cpu",
    "evaluate": "--lengths 512 --samples 1",
}


def blocks(language: str) -> list:
    """Blocks of all pages in a language, named by page and number."""
    found = [
        (path, text) for path in PAGES for kind, text in FENCED.findall(path.read_text(encoding="utf-8")) if kind == language
    ]
    return [pytest.param(text, id=f"{path.name}-{i}") for i, (path, text) in enumerate(found)]


def commands_of(block: str) -> list[list[str]]:
    """The words of each command; a backslash at the end of a line continues it."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines for words in [shlex.split(line, comments=True)] if words]


BLOCKS = blocks("python")
LINES = [
    pytest.param(words, id=f"{block.id}-{i}") for block in blocks("bash") for i, words in enumerate(commands_of(block.values[0]))
]


def test_there_is_no_block_in_a_language_that_nothing_runs():
    kinds = {kind for path in PAGES for kind, _ in FENCED.findall(path.read_text(encoding="utf-8"))}
    assert kinds <= {*RUN, ""}  # "": figures and formulas


@pytest.mark.parametrize("words", LINES)
def test_line_of_shell_is_one_that_works(words, monkeypatch):
    """Commands of ours are parsed with all their flags and files of settings; targets of make exist."""
    monkeypatch.chdir(ROOT)
    if words[:2] == ["accelerate", "launch"]:
        config = words[words.index("--config_file") + 1]
        assert Path(config).is_file()
        words = ["refine-nsp", *words[words.index("refine_nsp.cli") + 1 :]]
    if words[0] in SKIPPED:
        pytest.skip(f"{' '.join(words)}: {SKIPPED[words[0]]}")
    if words[0] == "python":
        assert Path(words[1]).is_file()
        return
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", Path("Makefile").read_text(), re.M)
        return
    assert Path(words[0]).name == "refine-nsp", f"a new kind of line, {words}: run it, or give a reason in SKIPPED"
    parsed(words[1], words[2:])


def parsed(command: str, words: list[str]) -> None:
    """As the command would parse them; RefineError or SystemExit for what is wrong."""
    declared = importlib.import_module(f"refine_nsp.commands.{command}").COMMAND
    here = ["--use_cpu"] if "use_cpu" in declared.row()["flags"] else []  # bf16 is refused without a GPU otherwise
    declared.call([*words, *here])


@pytest.mark.slow
def test_the_phases_run_one_after_another(tmp_path, monkeypatch):
    """The block of commands as it is written, only smaller."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", "recipes")
    text = "\n".join(f"def function_{i}(argument):\n    return argument + {i}\n" for i in range(400))
    Dataset.from_dict({"text": [text] * 4}).to_parquet("my_texts.parquet")
    paragraphs = [
        f"The bridge of city {i} was built in the year {1500 + i} by a guild of masons, as the book says." for i in range(40)
    ]
    rows = [
        {"question": f"When was the bridge of city {i} built?", "answers": [str(1500 + i)], "context": p}
        for i, p in enumerate(paragraphs)
    ]
    Path("squad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("prompt.txt").write_text(text[:2000])
    block = next(b.values[0] for b in blocks("bash") if " midtrain " in b.values[0] and " compare " in b.values[0])
    for words in commands_of(block):
        assert main([*words[1:], *SMALL.get(words[1], "").split()]) == 0, words
    assert Path("runs/report.html").exists() and Path("runs/post/model.safetensors").exists()


@pytest.mark.slow
def test_the_commands_of_scaling_run_one_after_another(tmp_path, monkeypatch):
    """As they are written, only smaller, in one process, on a file of this machine; but `export`, for which there are no shards."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", "recipes")
    with gzip.open("papers.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"paper {i}: " + "one two three four " * 200, "meta": {}}) + "\n" for i in range(70))
    ran = []
    for words in commands_of("\n".join(b.values[0] for b in blocks("bash") if b.id.startswith("scaling.md"))):
        words = [MODEL if word == "MODEL" else word for word in words]
        if words[0] == "accelerate":
            words = ["refine-nsp", *words[words.index("refine_nsp.cli") + 1 :]]
        if words[0] == "python":
            given = ["--files", "papers.jsonl.gz", "--length", "256", "--tokens", "30000"]
            runpy.run_path(words[1])["main"]([*words[2:], *given])
        elif words[0] == "refine-nsp" and words[1] != "export":
            assert main([*words[1:], *SMALL_SCALING.get(words[1], "").split()]) == 0, words
            ran.append(words[1])
    assert ran == ["env", "inspect", "estimate", "midtrain", "midtrain", "evaluate", "evaluate", "compare"]
    rows = Dataset.from_parquet("data/long/tokens.parquet")["input_ids"]
    assert all(len(ids) % 256 == 0 for ids in rows) and 30_000 <= sum(map(len, rows)) < 30_000 + 64 * 2_000


@pytest.mark.parametrize("name", ["delta_net_1.3b", "lact_760m"])
def test_the_papers_recipes_train_on_its_tokens(name):
    """With eight processes, 200 M, as `estimate` counts its hours by default."""
    recipe = yaml.safe_load((ROOT / "recipes" / f"midtrain_{name}.yaml").read_text())
    sequences = 8 * recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    tokens = recipe["max_steps"] * sequences * recipe["max_length"]
    assert sequences == 32 and abs(tokens / EstimateArguments().total_tokens - 1) < 0.002


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    warnings.filterwarnings("error", message=".*cannot be handed over exactly")
    exec(compile(block, "block", "exec"), {"__name__": "block"})


def test_the_readme_is_short():
    """A stranger reads it to its end; costs, tables and details have pages of their own."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120 and len(text.split()) <= 1100


def test_files_named_in_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"(?:recipes|docs)/[\w./-]+\.(?:yaml|md)", text):
        assert (ROOT / path).exists(), path


def test_the_site_builds_fetches_nothing_and_has_everything_public(tmp_path, monkeypatch):
    """Strictly: a link that leads nowhere is an error. `make docs` is this command."""
    pytest.importorskip("mkdocs", reason="the extra [docs] is not installed")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    site = tmp_path / "site"
    pages = {str(page.relative_to(site)): page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    assert {"index.html", "method.html", "contributing.html", "api.html", "examples/index.html", "examples/refine.html"} <= set(
        pages
    )
    for name, page in pages.items():
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(?:https?:)?//[^\">]+", page), name
    for path in [*site.rglob("*.css"), *site.rglob("*.js")]:
        code = path.read_text(encoding="utf-8")
        assert not re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//[^)\"']+", code), path.name
        assert "unpkg.com" not in code and "api.github.com" not in code, path.name
    for name in refine_nsp.__all__:
        assert re.search(rf'id="refine_nsp\.(?:models\.load\.)?{name}"', pages["api.html"]), name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_hold_in_the_repository(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", FENCED.sub("", page.read_text(encoding="utf-8"))):
        assert "://" in target or (page.parent / target).exists(), target
