"""A hook of mkdocs (mkdocs.yml) that makes a site of pages that are written to be read in the repository too.

Pages outside docs/ join it, scripts and the notebook of examples/ become pages, the reference of everything public is made from docstrings,
links are led to where their targets are on the site, and what the theme would load from the network is taken out.
"""

from __future__ import annotations

import base64
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# Path in the repository -> path on the site, of what is not in docs/.
JOINED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/study/plan.md": "plan.md",
    "benchmarks/study/carried_plan.md": "carried_plan.md",
    "recipes/smollm2/README.md": "smollm2.md",
    "recipes/smollm2/plan.md": "smollm2_plan.md",
    "examples/README.md": "examples/index.md",
    "examples/refine.ipynb": "examples/refine.md",
    **{f"examples/{p.name}": f"examples/{p.stem}.md" for p in (ROOT / "examples").glob("*.py")},
}
API = {
    "The step": ["NSPConfig", "ReFINEStep", "load", "with_states", "RefineError"],
    "Training": ["ReFINEConfig", "ReFINETrainer", "PostTrainingConfig", "PostTrainer", "TestTimeConfig", "TestTimeTrainer"],
    "Models": [
        "DeltaNetConfig", "DeltaNetForCausalLM", "GatedDeltaNetConfig", "GatedDeltaNetForCausalLM", "LaCTConfig", "LaCTForCausalLM",
        "FastWeightCache",
    ],
    "Data, and phases of your own": ["training.DataArguments", "training.prepare_data", "training.Phase", "training.MicroBatch"],
}  # fmt: skip
PLACES = {"load": "models.load.load"}  # a module has its name too
REPOSITORY = {site: path for path, site in JOINED.items()}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
NETWORK = re.compile(r"https://(?:unpkg\.com|api\.github\.com)/")
RENDERED = ("image/png", "image/svg+xml", "text/plain")


def on_files(files: Files, config: Any) -> Files:
    """Add the joined pages."""
    for path, site in JOINED.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        if path.endswith(".py"):
            text = script_page(path, text)
        if path.endswith(".ipynb"):
            text = notebook_page(json.loads(text))
        files.append(File.generated(config, site, content=text))
    files.append(File.generated(config, "api.md", content=reference()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead relative links, which hold in the repository, to the same thing on the site."""
    here = page.file.src_uri
    folder = posixpath.dirname(REPOSITORY.get(here, f"docs/{here}"))

    def led(match: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        if not (ROOT / path).exists():
            raise PluginError(f"{here}: {match[1]} is no file of the repository ({path})")
        site = JOINED.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if site is None:
            raise PluginError(
                f"{here}: {path} is not on the site; add it to JOINED in docs/site/pages.py, or name it without a link"
            )
        return posixpath.relpath(site, posixpath.dirname(here) or ".") + (match[2] or "")

    # Not inside code: `](` may stand there too.
    parts = re.split(r"(^```.*?^```|`[^`\n]*`)", markdown, flags=re.S | re.M)
    return "".join(part if i % 2 else LINK.sub(led, part) for i, part in enumerate(parts))


def on_post_build(config: Any) -> None:
    """Take out what the theme's scripts would load from other hosts (fallbacks for old browsers, diagrams: neither is used here)."""
    site = Path(config["site_dir"])
    for path in site.rglob("*.map"):
        path.unlink()
    for path in site.rglob("*.js"):
        path.write_text(NETWORK.sub("absent/", path.read_text(encoding="utf-8")), encoding="utf-8")


def reference() -> str:
    """Everything `refine_nsp` exports, and what a phase of one's own needs, by what it is for."""
    parts = ["# Reference\n\nEverything `refine_nsp` exports; what else a docstring names is in its module.\n"]
    for title, names in API.items():
        parts += [f"## {title}\n", *(f"::: refine_nsp.{PLACES.get(name, name)}\n" for name in names)]
    return "\n".join(parts)


def script_page(path: str, text: str) -> str:
    """A script with its docstring as the text above."""
    title, _, rest = text.removeprefix('"""').partition('"""')
    first, _, more = title.strip().partition("\n")
    return f"# {Path(path).name}\n\n{first}\n{more}\n\n```python\n{rest.strip()}\n```\n"


def notebook_page(notebook: dict) -> str:
    """Cells and their outputs, one after another."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [rendered(output) for output in cell.get("outputs", [])]
    return "\n\n".join(part for part in parts if part)


def rendered(output: dict) -> str:
    """One output: a picture, or its text."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    kind = next(k for k in RENDERED if k in data)
    body = "".join(data[kind])
    if kind == "text/plain":
        return f"```text\n{body.rstrip()}\n```"
    encoded = body.strip() if kind == "image/png" else base64.b64encode(body.encode()).decode()
    return f'<img alt="output" src="data:{kind};base64,{encoded}">'
