"""The house has floors: a room imports only lower ones, and no two files import each other in a circle."""

import ast
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src"
# From the ground up. Files beside the rooms stand on the floor of their name.
FLOORS = [
    "errors", "fields", "values", "files", "stopping", "progress", "environment", "config", "ops", "processes", "text", "models", "nsp",
    "prompts", "evaluation", "report", "training", "estimate", "tiny", "commands", "cli",
]  # fmt: skip


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in it, and whatever for."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("refine_nsp"):
            for name in node.names:
                inside = SOURCE / Path(*node.module.split("."), name.name)
                is_module = inside.is_dir() or inside.with_suffix(".py").exists()
                modules.add(f"{node.module}.{name.name}" if is_module else node.module)
        if isinstance(node, ast.Import):
            modules |= {n.name for n in node.names if n.name.startswith("refine_nsp")}
    return modules


def modules() -> dict[str, set[str]]:
    named = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = imports_of(path)
    return named


def floor(module: str) -> int:
    parts = module.split(".")
    return FLOORS.index(parts[1]) if len(parts) > 1 else len(FLOORS)


def test_no_arrow_points_upward():
    arrows = [(m, i) for m, imports in modules().items() if m != "refine_nsp" for i in imports if floor(i) > floor(m)]
    assert not arrows


def test_no_circle():
    graph = modules()
    # A package stands for its __init__; importing a module of it runs that too, but a circle through it would show as one here.
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module in done:
            return
        for other in sorted(graph.get(module, ())):
            visit(other, (*path, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_the_test_sees_what_it_looks_for(tmp_path):
    (tmp_path / "a.py").write_text("def f():\n    from refine_nsp.cli import main\n")
    assert imports_of(tmp_path / "a.py") == {"refine_nsp.cli"}
    assert floor("refine_nsp.cli") > floor("refine_nsp.ops.norm")


def test_borrowed_models_are_known_where_models_are_loaded_alone():
    borrowed = "refine_nsp.models.borrowed"
    importers = {m for m, imports in modules().items() if not m.startswith(borrowed) for i in imports if i.startswith(borrowed)}
    assert importers <= {"refine_nsp.models", "refine_nsp.models.load"}
