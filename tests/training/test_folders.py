"""A folder holds one run: resumed alike or refused, a finished one left as it is, an earlier one set aside whole."""

import json
import os
import signal
import warnings

import pytest
import torch

from refine_nsp.cli import main
from refine_nsp.errors import RefineError
from refine_nsp.report.runs import read_run
from refine_nsp.training.run_folder import RunFolder
from tests.test_cli import TEXT, tiny
from tests.training import test_nested
from tests.training.test_trainer import assert_close, data, trainer, weights

SAVES = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def lines_of(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("refine-nsp: ")]


@pytest.mark.parametrize("settings", [
    {"max_steps": 5},  # in the middle of an epoch
    {"max_steps": 5, "steps_per_generation": 3, "schedule": "snapshot"},  # with rollouts that wait
    {"max_steps": 4},  # at its end
    {"max_steps": -1, "num_train_epochs": 1},
])  # fmt: skip
def test_a_finished_run_is_resumed_as_it_is(tmp_path, settings):
    first = trainer(tmp_path, **settings, **SAVES)
    first.train()
    again = trainer(tmp_path, **settings, **SAVES, eval_dataset=data(4))
    said = again.train(resume_from_checkpoint=True)
    assert said.global_step == again.state.global_step == first.state.global_step
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(again).values(), strict=True))
    assert len(list(tmp_path.glob("checkpoint-*"))) == first.state.global_step
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert "train_runtime" in last and "train_loss" not in last
    again.evaluate()


def test_a_finished_nested_run_is_resumed_as_it_is(tmp_path):
    runs = [test_nested.trainer(tmp_path, output_dir=str(tmp_path), max_steps=3, **SAVES) for _ in range(2)]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(*(weights(t).values() for t in runs), strict=True))


@pytest.mark.parametrize(("settings", "words"), [
    ({"seed": 7}, "seed was 42, now 7"),
    ({"learning_rate": 1e-6}, "learning_rate was 0.01, now 1e-06"),
    ({"objective": "ntp"}, "objective was 'refine', now 'ntp'"),
    ({"lambda_rl": 0.7, "reward_funcs": "cosine"}, "reward_funcs was 'hybrid', now 'cosine'; lambda_rl was 0.2, now 0.7"),
    ({"train_dataset": data(8)}, "training_data was '16 examples .*now '8 examples"),
    ({"train_dataset": data(16, 50)}, "training_data was '16 examples .*now '16 examples"),
    ({"family": "gated_deltanet"}, "model was 'delta_net, "),
    ({"lr_scheduler_type": "linear"}, "lr_scheduler_type was 'constant', now 'linear'"),
    ({"max_steps": 1}, "has made 2 steps, more than max_steps=1"),
])  # fmt: skip
def test_what_was_made_otherwise_is_refused_by_name(tmp_path, settings, words):
    trainer(tmp_path, max_steps=2, **SAVES).train()
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(RefineError, match=words):
        trainer(tmp_path, **{"max_steps": 2, **SAVES, **settings}).train(resume_from_checkpoint=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_what_weights_do_not_depend_on_may_differ(tmp_path):
    straight = trainer(tmp_path / "a", max_steps=4)
    straight.train()
    trainer(tmp_path / "b", max_steps=2, **SAVES).train()
    other = {"logging_steps": 2, "save_steps": 4, "save_strategy": "steps", "run_name": "other", "eval_strategy": "steps", "eval_steps": 1,
             "eval_dataset": data(4), "log_completions": True, "segment_tokens": 40, "gradient_checkpointing": True,
             "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_skipped_steps": 9}  # fmt: skip
    again = trainer(tmp_path / "b", max_steps=4, **other)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert_close(weights(again), weights(straight))


def test_a_schedule_that_knows_its_last_step_is_not_given_another(tmp_path):
    settings = {"lr_scheduler_type": "linear", **SAVES}
    trainer(tmp_path, max_steps=2, **settings).train()
    with pytest.raises(RefineError, match=r"max_steps was 2, now 4 \(lr_scheduler_type=linear follows it\)"):
        trainer(tmp_path, max_steps=4, **settings).train(resume_from_checkpoint=True)


def test_a_new_run_sets_an_earlier_one_aside(tmp_path):
    first = trainer(tmp_path, max_steps=3, learning_rate=1e-2, eval_dataset=data(4), **SAVES)
    first.train()
    first.evaluate()
    first.save_model()
    (tmp_path / "notes.txt").write_text("of the user")
    second = trainer(tmp_path, max_steps=2, learning_rate=1e-6, eval_dataset=data(4), **SAVES)
    own = second.evaluate()  # before it trains, and its own
    with pytest.warns(UserWarning, match="had an earlier run in it, which is in .*earlier-1 now; .*earlier-1/checkpoint-3"):
        second.train()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-1",
        "checkpoint-2",
        "earlier-1",
        "metrics.jsonl",
        "notes.txt",
    ]
    assert RunFolder(tmp_path).last_complete().path.name == "checkpoint-2"
    run, earlier = read_run(tmp_path), read_run(tmp_path / "earlier-1")
    assert run.curve("eval_loss") == ([0], [own["eval_loss"]]) and run.curve("loss")[0] == [1, 2]
    assert earlier.curve("eval_loss")[0] == [3] and earlier.curve("loss")[0] == [1, 2, 3]
    assert (tmp_path / "earlier-1" / "model.safetensors").exists()
    # The earlier one can be gone on with, here: then it is the other's turn to be set aside.
    again = trainer(tmp_path, max_steps=4, learning_rate=1e-2, **SAVES)
    with pytest.warns(UserWarning, match="earlier-2/checkpoint-2"):
        again.train(resume_from_checkpoint=str(tmp_path / "earlier-1" / "checkpoint-3"))
    straight = trainer(tmp_path / "straight", max_steps=4, learning_rate=1e-2)
    straight.train()
    assert_close(weights(again), weights(straight), atol=1e-12)


def test_figures_of_steps_that_are_made_again_are_the_later_ones(tmp_path):
    records = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 3.0}, {"step": 3, "eval_loss": 3.5},
               {"step": 2, "loss": 2.1}, {"step": 2, "eval_loss": 2.6}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    run = read_run(tmp_path)
    assert run.curve("loss") == ([1, 2], [1.0, 2.1]) and run.curve("eval_loss") == ([2], [2.6])


def test_one_command_line_begins_goes_on_and_has_finished(tmp_path, text, capsys):
    argv = tiny(tmp_path, text, "--save_strategy", "steps", "--save_steps", "1", "--resume_from_checkpoint", "last",
                "--validation_fraction", "0.2", "--learning_rate", "1e-3")  # fmt: skip
    run = tmp_path / "run"
    assert main(argv) == 0
    assert lines_of(capsys) == [f"refine-nsp: {run} has no checkpoint to resume from: the run begins anew"]
    made = (run / "model.safetensors").read_bytes()
    assert main(argv) == 0  # finished
    assert not lines_of(capsys) and (run / "model.safetensors").read_bytes() == made
    (run / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
    assert main(argv) == 0
    assert len(lines_of(capsys)) == 1 and (run / "model.safetensors").read_bytes() == made
    for step in (1, 2):
        (run / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"")
    assert main(argv) == 0
    said = lines_of(capsys)
    assert len(said) == 4 and said[2].endswith("the run begins anew") and "earlier-1" in said[3], said
    assert (run / "model.safetensors").read_bytes() == made


def test_a_refused_command_changes_nothing(tmp_path, text, capsys):
    argv = tiny(tmp_path, text, "--save_strategy", "steps", "--save_steps", "1", "--learning_rate", "1e-3")
    assert main(argv) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    argv[argv.index("1e-3")] = "1e-6"
    assert main([*argv, "--resume_from_checkpoint", "last"]) == 1
    assert "learning_rate was 0.001, now 1e-06" in lines_of(capsys)[-1]
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_sigterm_while_a_module_is_imported_is_no_error_of_that_module(capsys, monkeypatch):
    from refine_nsp.commands import midtrain

    def importing(*given):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except SystemExit:
            raise ImportError("initialization failed") from None

    monkeypatch.setattr(midtrain, "run", importing)
    assert main(["midtrain"]) == 143
    assert capsys.readouterr().err.startswith("terminated; ")


def test_our_warnings_are_lines_of_ours_and_others_stay(tmp_path, text, capsys, monkeypatch):
    from refine_nsp.commands import midtrain

    def loud(*given):
        warnings.warn("two\nlines", stacklevel=1)
        warnings.warn_explicit("another's", UserWarning, "torch/somewhere.py", 7)

    monkeypatch.setattr(midtrain, "run", loud)
    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(loud, "__code__", loud.__code__.replace(co_filename=midtrain.__file__))
        assert main(["midtrain"]) == 0
    assert warnings.showwarning is shown
    said = capsys.readouterr().err
    assert said.startswith("refine-nsp: two lines\n") and said.count("two") == 1
