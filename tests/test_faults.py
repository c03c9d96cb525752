"""A full disk, a file-size limit, broken numbers, data that goes away: a clear line, an exit code, and nothing spoiled."""

import math
import os
import resource
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from refine_nsp.cli import main
from refine_nsp.errors import RefineError
from refine_nsp.training.checkpoints import checkpoint_problem
from tests.test_cli import TEXT, tiny
from tests.training import test_trainer


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def limited(argv: list[str], largest_file: int) -> tuple[int, str]:
    """Exit code of a command in a process whose files cannot grow beyond so many bytes, and what it said."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.dup2(writing, 2)
            sys.stdout = sys.stderr = os.fdopen(writing, "w", buffering=1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
            code = main(argv)
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, errors="replace") as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


@pytest.mark.parametrize("largest_file", [300, 3_000, 100_000, 3_000_000, 12_000_000])
def test_no_room_for_a_file(tmp_path, text, largest_file):
    """From the first line of the settings to the optimizer's moments."""
    argv = tiny(tmp_path, text, "--save_strategy", "steps", "--save_steps", "1")
    code, said = limited(argv, largest_file)
    ours = [line for line in said.splitlines() if line.startswith("refine-nsp:")]
    assert code == 1 and len(ours) == 1 and "--debug" not in said and "Traceback" not in said, said[-1000:]
    run = tmp_path / "run"
    assert all(checkpoint_problem(folder) is None for folder in run.glob("checkpoint-*"))
    for file in run.glob("*.safetensors"):
        load_file(file)


def test_an_output_folder_that_is_a_file(tmp_path, text, capsys):
    (tmp_path / "run").write_text("mine")
    assert main(tiny(tmp_path, text)) == 1
    said = capsys.readouterr().err
    assert said.count("refine-nsp:") == 1 and (tmp_path / "run").read_text() == "mine"


def test_a_reward_that_is_not_finite_is_named(tmp_path):
    def broken(*, completion_ids, **_):
        return torch.full(completion_ids.shape, math.inf)

    with pytest.raises(RefineError, match="the reward broken returned inf for a rollout"):
        test_trainer.trainer(tmp_path, reward_funcs=broken).train()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path, bad):
    """One bad step is skipped and counted; the steps after it learn."""
    t = test_trainer.trainer(tmp_path, max_steps=3)
    before = test_trainer.weights(t)
    spoiled = []

    def spoil(gradient):
        if t.state.global_step == 1:
            spoiled.append(1)
            return gradient + bad
        return gradient

    t.model.lm_head.weight.register_hook(spoil)
    t.train()
    after = test_trainer.weights(t)
    assert spoiled and t.guard.skipped == 1
    assert all(bool(w.isfinite().all()) for w in after.values()) and any(not torch.equal(after[n], before[n]) for n in before)


def test_streamed_data_that_goes_away(tmp_path, text, capsys, monkeypatch):
    """The file is removed after the first step."""
    from refine_nsp.training import ReFINETrainer

    step = ReFINETrainer.training_step

    def removing(self, *args, **kwargs):
        for file in (tmp_path / "texts").glob("*"):
            file.unlink()
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ReFINETrainer, "training_step", removing)
    (tmp_path / "texts").mkdir()
    for i in range(3):
        (tmp_path / "texts" / f"{i}.txt").write_text(TEXT[: 3000 + i])
    argv = tiny(
        tmp_path, tmp_path / "texts", "--streaming", "--max_steps", "200", "--save_strategy", "steps", "--save_steps", "1"
    )
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count("refine-nsp:") == 1, said[-600:]
    assert all(checkpoint_problem(folder) is None for folder in (tmp_path / "run").glob("checkpoint-*"))
