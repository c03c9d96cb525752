"""A little of `make fuzz` in every run of the tests, and what the fuzzing itself must see."""

import json
import os
import sys
import time

import pytest

from tests import fuzz as module
from tests.fuzz import KINDS, broken, ended, fuzz, problem_of, unprivileged

FAST = [name for name in KINDS if name not in ("training", "training data", "answers", "questions", "folders")]
ONE = "refine-nsp: what was wrong\n"


def test_broken_input_ends_in_one_line_of_ours():
    assert fuzz(30, seed=1_000_000, quiet=True, kinds=FAST) == []


def test_real_work_on_broken_input_ends_in_one_line_of_ours():
    assert fuzz(10, seed=1_000_000, quiet=True, kinds=[name for name in KINDS if name not in FAST]) == []


@pytest.mark.slow
def test_ten_thousand_cases():
    assert fuzz(10_000, seed=0, quiet=True) == []


def test_a_command_that_hangs_is_seen(monkeypatch):
    """Also one that takes every error it meets for one of its input."""

    def sleeping(words):
        try:
            time.sleep(30)
        except Exception:
            return 1
        return 0

    def stubborn(words):
        try:
            time.sleep(30)
        except BaseException:
            return 1
        return 0

    monkeypatch.setattr(module, "SECONDS", 1)
    for command in (sleeping, stubborn):
        monkeypatch.setattr(module, "main", command)
        code, said = ended([])
        assert code == "hung for 1 s" and problem_of(code, said) == "exit code hung for 1 s"


def test_what_is_wrong_with_an_end_is_seen():
    assert problem_of(0, "model: run\n") is problem_of(1, f"steps: 3/4  0.5 min left\n{ONE}") is problem_of(2, ONE) is None
    assert problem_of(139, "") and problem_of(1, "") and problem_of(1, ONE * 2) and problem_of(0, ONE)
    assert problem_of(1, f"Failed to load\n{ONE}") and problem_of(1, "refine-nsp: x (run again with --debug for the traceback)\n")
    assert problem_of(2, f"usage: x\n{ONE}") and problem_of(2, ONE[:-1] + "x" * 1000 + "\n")


def test_half_a_file_is_seen(tmp_path):
    for name, text in (("a.json", "{"), ("a.jsonl", "{}\n{"), ("a.html", "<html>"), ("a.safetensors", "x"), ("a.json.tmp", "{}")):
        (tmp_path / name).write_text(text)
        assert broken(tmp_path / name), name
    (tmp_path / "b.json").write_text(json.dumps({}))
    assert broken(tmp_path / "b.json") is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="root cannot be made less elsewhere")
def test_root_is_refused_what_a_mode_forbids(tmp_path):
    path = tmp_path / "secret"
    path.write_text("x")
    path.chmod(0)
    with unprivileged(), pytest.raises(PermissionError):
        path.read_text()
    assert os.geteuid() != 0 or path.read_text() == "x"
