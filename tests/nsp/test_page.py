"""The page of the paper stays one: somebody who reads nsp/step.py needs few names."""

import ast
from pathlib import Path

import refine_nsp.nsp.step

NAMES = 12


def names_of(source: str) -> list[str]:
    """List what a file imports, wherever in it, and what it defines at its top; `annotations` is no name to know."""
    tree, names = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names += [alias.asname or alias.name for alias in node.names if alias.name != "annotations"]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    return names


def test_a_reader_of_the_step_needs_few_names():
    names = names_of(Path(refine_nsp.nsp.step.__file__).read_text(encoding="utf-8"))
    assert len(names) == len(set(names)) <= NAMES, names
    assert {"refine", "run", "select", "sample", "judge", "compare", "learn", "Work"} <= set(names)


def test_the_count_sees_imports_definitions_and_constants():
    source = "from __future__ import annotations\nimport a.b as c\nfrom d import e, f as g\nX, Y = 1, 2\nZ: int = 3\n"
    source += "def h():\n    from i import j\n    k = 1\nclass L: pass\n"
    assert names_of(source) == ["c", "e", "g", "j", "X", "Y", "Z", "h", "L"]


def test_the_page_takes_the_steps_of_section_3_in_their_order():
    tree = ast.parse(Path(refine_nsp.nsp.step.__file__).read_text(encoding="utf-8"))
    (refine,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "refine"]
    lines = refine.body[1:]  # the docstring comes first
    verbs = [{n.func.id for n in ast.walk(line) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)} for line in lines]
    assert verbs == [{"run"}, {"select"}, {"sample"}, {"judge"}, {"compare"}, {"learn"}]
