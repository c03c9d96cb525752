"""One grammar for all commands: the table that command lines are read by, and what it takes to read one."""

import ast
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from refine_nsp.commands import NAMES
from refine_nsp.commands.command_line import TABLE, commands
from refine_nsp.commands.grammar import Command, Settings
from refine_nsp.commands.table import as_text, table
from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.fields import setting
from tests.test_rooms import SOURCE, imports_of

HEAVY = {"torch", "transformers", "datasets", "accelerate", "peft", "numpy", "scipy", "matplotlib", "huggingface_hub"}
# Command lines that are answered before any library is loaded, and words of the answer.
AT_ONCE = [
    ("", "COMMAND"),
    ("--help", "COMMAND"),
    ("--version", "refine-nsp"),
    *((f"{name} --help", "usage:") for name in NAMES),
    ("midtrain --help_all", "--dataloader_in_order"),
    ("midtrain --help --config recipes/midtrain_expected.yaml", "[closed_form]"),
    *((f"completion {shell}", "midtrain") for shell in ("bash", "zsh", "fish")),
    ("midtran", "did you mean 'midtrain'"),
    ("midtrain --learnin_rate 1", "did you mean 'learning_rate'"),
    ("generate --gredy", "did you mean 'greedy'"),
    ("midtrain --max_steps", "expected one argument"),
    ("midtrain --max_steps abc", "invalid int value: 'abc'"),
    ("midtrain --bf16 perhaps", "invalid bool value: 'perhaps'"),
    ("midtrain --estimator closed_from", "did you mean 'closed_form'"),
    ("midtrain --preset likelyhood", "did you mean 'likelihood'"),
    ("midtrain --eval_strategy step", "did you mean 'steps'"),
    ("midtrain stray", "unexpected argument 'stray'"),
    ("compare one", "the following arguments are required: b"),
    ("midtrain --config none.yaml", "no configuration file none.yaml"),
    ("midtrain --config unknown.yaml", "unknown key 'lerning_rate' (did you mean 'learning_rate'?)"),
    ("midtrain --config wrong.yaml", "max_length is [1], a list; expected a whole number"),
    ("midtrain --config text.yaml", "learning_rate is 'fast'; expected a number"),
    ("ttt", "give --prompt or --prompt_file (one of them)"),
    ("generate --prompt a --prompt_file b", "give --prompt or --prompt_file, not both"),
    ("midtrain --rollout_length 0", "rollout_length must be at least 1, got 0"),
    ("midtrain --num_generations 2 --preset expected", "num_generations"),
    ("ttt --prompt a --ttt_tau 0", "tau must be positive"),
]
PROGRAM = """
import contextlib, io, sys
sys.argv[0] = "/somewhere/refine-nsp"
from refine_nsp.cli import main
for line, words in {cases!r}:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        main(line.split())
    assert words in said.getvalue(), (line, said.getvalue())
    assert not {heavy!r} & set(sys.modules), line
"""


def test_the_table_is_what_the_dataclasses_declare():
    """`python -m refine_nsp.commands.table` (make table) writes it anew."""
    made = table()
    if (there := TABLE.read_text(encoding="utf-8")) == as_text(made):
        return
    declared = f'"transformers": "{made["transformers"]}"'
    if declared not in there:
        pytest.skip(f"the table is made with another release of transformers than {made['transformers']}")
    lines = set(there.splitlines()) ^ set(as_text(made).splitlines())
    raise AssertionError("run `make table`; these lines differ:\n" + "\n".join(sorted(lines)))


def test_help_completion_and_errors_load_no_library(tmp_path):
    for name, text in (("unknown", "lerning_rate: 1"), ("wrong", "max_length: [1]"), ("text", "learning_rate: fast")):
        (tmp_path / f"{name}.yaml").write_text(text)
    code = PROGRAM.format(cases=AT_ONCE, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_neither_does_the_module_as_launchers_start_it():
    command = [sys.executable, "-X", "importtime", "-m", "refine_nsp.cli", "midtrain", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "--dataset_name" in done.stdout and "refine_nsp.commands.parser" in loaded
    assert not HEAVY & loaded


def test_no_command_imports_another():
    for name in NAMES:
        imported = imports_of(SOURCE / "refine_nsp" / "commands" / f"{name}.py")
        assert not {f"refine_nsp.commands.{other}" for other in NAMES} & imported, name


def test_every_command_declares_itself_and_runs_by_one_name():
    """A command's module has `COMMAND`, a sentence as its summary, and `run(call, one argument for each dataclass)`."""
    for name, line in commands().items():
        tree = ast.parse((SOURCE / "refine_nsp" / "commands" / f"{name}.py").read_text(encoding="utf-8"))
        runs = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run"]
        assert len(runs) == 1 and runs[0].args.args[0].arg == "call", name
        assert line.summary.endswith(".") and line.summary[0].isupper(), name


@dataclass
class Example:
    """Settings of an example.

    Attributes:
        source: the file to read.
        size: how much of it, in percent (100% is all).
        fast: do without checks.
        weights: of the parts.
        kind: the kind of the answer.
    """

    source: Path
    size: int | None = setting(5, common=True)
    fast: bool = True
    weights: list[float] = field(default_factory=lambda: [1.0])
    kind: Literal["short", "long"] | None = None


EXAMPLE = Command("Be an example.", (Settings(Example, prefix=""), Settings(NSPConfig)), positional=("source",))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a.txt", {}),
        ("a.txt --size 7 --no_fast", {"size": 7, "fast": False}),
        ("--fast a.txt --size none", {"size": None}),
        ("a.txt --fast=false --kind long", {"fast": False, "kind": "long"}),
        ("a.txt --fast no --kind none", {"fast": False}),
        ("a.txt --weights 1 2.5", {"weights": [1.0, 2.5]}),
        ("a.txt --config c.yaml", {"size": 9, "kind": "short"}),
        ("a.txt --config c.yaml --size 8", {"size": 8, "kind": "short"}),
    ],
)
def test_words_flags_and_files_fill_a_dataclass(tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("size: '9'\nkind: short\n")
    call, (found, nsp) = EXAMPLE.call(words.split())
    assert found == Example(Path("a.txt"), **expected) and nsp == NSPConfig()
    assert call.changed() == {"source": "a.txt", **{k: v for k, v in expected.items() if v is not True}}


def test_only_what_was_given_is_handed_on_so_that_a_dataclass_keeps_its_own_defaults():
    """The table may be of another release than the dataclass."""
    call, _ = EXAMPLE.call(["a.txt", "--preset", "context", "--tau", "2"])
    assert {"source", "preset", "tau", "selection"} <= set(call.given) and not {"size", "fast", "lambda_ntp"} & set(call.given)


def test_help_shows_headings_readers_and_common_settings_first(capsys):
    with pytest.raises(SystemExit):
        EXAMPLE.call(["--help"], "example")
    shown = capsys.readouterr().out
    assert shown.startswith("usage: refine-nsp example SOURCE [--config FILE.yaml] [flags]\n\nBe an example.\n")
    assert "--size INT" in shown and "100% is all" in shown and "--weights" not in shown and "lists all" in shown
    assert "(read by estimator='closed_form')" in " ".join(shown.split())
    with pytest.raises(SystemExit):
        EXAMPLE.call(["--help_all"], "example")
    assert "--weights NUMBER ..." in capsys.readouterr().out


def test_what_files_alone_hold_is_no_flag():
    from refine_nsp.commands.pretrain import COMMAND

    with pytest.raises(RefineError, match="phases is given in a file"):
        COMMAND.call(["--phases", "1"])
