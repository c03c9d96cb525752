"""Every Python block of the README and the docs runs; the site of the docs builds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import refine_nsp

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = [
    pytest.param(block, id=f"{path.name}-{i}")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "block", "exec"), {"__name__": "block"})


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
    pages = {page.name: page.read_text(encoding="utf-8") for page in (tmp_path / "site").glob("*.html")}
    assert {"index.html", "method.html", "contributing.html", "api.html"} <= set(pages)
    for name, page in pages.items():
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(?:https?:)?//[^\">]+", page), name
    for name in refine_nsp.__all__:
        assert re.search(rf'id="refine_nsp\.(?:models\.load\.)?{name}"', pages["api.html"]), name
