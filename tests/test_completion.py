"""Shell completion, in the shells that are installed: commands, flags and choices as the parsers have them."""

import argparse
import shutil
import subprocess

import pytest

from refine_nsp.cli import main
from refine_nsp.commands import NAMES
from refine_nsp.commands.completion import whole_parser

SHELLS = ("bash", "zsh", "fish")
# What is typed, and all that the last word can become.
TYPED = [
    (("mid",), {"midtrain"}),
    (("midtrain", "--estim"), {"--estimator"}),
    (("midtrain", "--estimator", ""), {"sampled", "closed_form"}),
    (("midtrain", "--learning_rate", "1e-4", "--preset", "co"), {"context"}),
    (("evaluate", "my_model", "--ttt_sco"), {"--ttt_scope"}),
    (("completion", ""), set(SHELLS)),
]
IN_BASH = """
source {script}
COMP_WORDS=(refine-nsp {words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); COMPREPLY=()
_shtab_refine_nsp
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return whole_parser()


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("completion")
    capture = pytest.MonkeyPatch()
    paths = {}
    for shell in SHELLS:
        path = folder / f"refine-nsp.{shell}"
        with path.open("w") as stream:
            capture.setattr("sys.stdout", stream)
            assert main(["completion", shell]) == 0
        paths[shell] = str(path)
    capture.undo()
    return paths


def needs(shell: str) -> str:
    return shutil.which(shell) or pytest.skip(f"{shell} is not installed")


def test_every_command_is_there_with_its_flags(parser):
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert list(commands) == list(NAMES)
    flags = set(commands["midtrain"]._option_string_actions) | {"--config"}
    assert {"--preset", "--reward_funcs", "--dataset_name", "--dry_run", "--debug"} <= flags
    assert not [f for command in commands.values() for a in command._actions for f in a.option_strings if "-" in f[2:]]


@pytest.mark.parametrize(("words", "expected"), TYPED, ids=lambda x: " ".join(x) if isinstance(x, tuple) else "")
def test_bash_completes(scripts, words, expected):
    quoted = " ".join(f"'{w}'" for w in words)
    script = IN_BASH.format(script=scripts["bash"], words=quoted)
    done = subprocess.run([needs("bash"), "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert set(done.stdout.split()) == expected


def test_bash_completes_files_after_flags_that_take_one(scripts, tmp_path):
    (tmp_path / "recipe.yaml").touch()
    script = IN_BASH.format(script=scripts["bash"], words="midtrain --config rec")
    done = subprocess.run([needs("bash"), "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=True)
    assert done.stdout.split() == ["recipe.yaml"]


@pytest.mark.parametrize(("words", "expected"), TYPED, ids=lambda x: " ".join(x) if isinstance(x, tuple) else "")
def test_fish_completes(scripts, words, expected):
    line = " ".join(["refine-nsp", *words])
    command = f"source {scripts['fish']}; complete -C '{line}'"
    done = subprocess.run([needs("fish"), "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert {row.split("\t")[0] for row in done.stdout.splitlines()} == expected


def test_zsh_reads_the_script(scripts):
    """zsh completes in an interactive line editor only; here it must at least be a whole program to it."""
    subprocess.run([needs("zsh"), "-n", scripts["zsh"]], capture_output=True, timeout=60, check=True)


def test_another_shell_is_refused(capsys):
    assert main(["completion", "csh"]) == 2
    assert "bash" in capsys.readouterr().err
