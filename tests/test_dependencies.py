"""What `make quickstart` installs is enough: no command of the README or of docs/recipes.md imports an extra, lm-eval excepted."""

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Optional by nature: lm-eval's own tasks, kernels for GPUs, a format of compression, and one of quantised models.
OPTIONAL = {"lm_eval": "evaluation/harness", "fla": "ops/", "triton": "ops/", "zstandard": "text/", "gguf": "models/gguf_source"}
# What is not named there comes by what needs it itself.
DISTRIBUTIONS = {"yaml": "pyyaml", "huggingface_hub": "transformers", "jinja2": "torch", "pyarrow": "datasets"}


def core() -> list[str]:
    block = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text("utf-8"), re.M | re.S)
    assert block is not None
    return re.findall(r'"([\w-]+)', block[1])


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    # `compression` is Python's own from 3.14 on; `_typeshed` is there for type checkers alone.
    return names - set(sys.stdlib_module_names) - {"refine_nsp", "compression", "_typeshed"}


def test_everything_that_is_imported_belongs_to_the_core():
    package = ROOT / "src" / "refine_nsp"
    for path in package.rglob("*.py"):
        for name in imported(path):
            where = path.relative_to(package).as_posix()
            if not (name in OPTIONAL and where.startswith(OPTIONAL[name])):
                assert DISTRIBUTIONS.get(name, name) in core(), f"{where} imports {name}, which a plain install does not have"


@pytest.mark.parametrize("page", ["README.md", "docs/recipes.md"])
def test_no_command_of_the_readme_or_the_recipes_asks_for_lm_eval(page):
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.S | re.M)
    words = [word for block in blocks for line in block.splitlines() for word in shlex.split(line, comments=True)]
    assert "evaluate" in words and not [word for word in words if word.startswith("lm_eval")]


def test_the_core_is_pinned():
    pinned = {name.lower() for name in re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text("utf-8"), re.M)}
    assert not {name for name in core() if name.lower() not in pinned}
