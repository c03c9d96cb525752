"""A full disk, a file-size limit, broken numbers, data that goes away: a clear line, an exit code, and nothing spoiled."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors.torch import load_file
from torch.distributed.checkpoint import save
from torch.utils.data import get_worker_info

from refine_nsp import load
from refine_nsp.cli import main
from refine_nsp.errors import RefineError
from refine_nsp.evaluation.run import read_rows
from refine_nsp.stopping import TERMINATED_CODE
from refine_nsp.training.checkpoints import Checkpoint
from tests.models.families import build
from tests.models.transformers_models import plain
from tests.test_cli import TEXT, tiny
from tests.tiny.test_pretrain import TINY as TINY_BASE
from tests.tiny.test_pretrain import leave_curves_undrawn, library, small_tokenizer, texts  # noqa: F401, fixtures
from tests.tiny.test_pretrain import tiny as tiny_base
from tests.training import test_trainer

EVALUATION = "evaluate --tasks niah_single_1 --lengths 512".split()


def check_one_line(code: int, said: str) -> None:
    """A command failed, and said so in one line of ours."""
    ours = [line for line in said.splitlines() if line.startswith("refine-nsp:")]
    assert code == 1 and len(ours) == 1 and "--debug" not in said and "Traceback" not in said, said[-1000:]


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
    check_one_line(code, said)
    run = tmp_path / "run"
    assert all(Checkpoint(folder).problem() is None for folder in run.glob("checkpoint-*"))
    for file in run.glob("*.safetensors"):
        load_file(file)


@pytest.mark.parametrize(
    ("command", "largest_file"),
    [("evaluate", 100), ("evaluate", 1_500), ("evaluate", 10_000), ("inspect", 10_000), ("report", 1_000)],
)
def test_no_room_for_the_files_of_other_commands(tmp_path, text, command, largest_file):
    """No file of a final name is half of one, and an evaluation keeps what it has."""
    text.write_text(TEXT[:600])
    if command == "report":
        text.write_text(TEXT)
        assert main(tiny(tmp_path, text)) == 0
    argv = {
        "evaluate": [*EVALUATION, "--samples", "2", "--output_dir", str(tmp_path / "out")],
        "inspect": ["inspect", "refine-nsp/tiny-delta-net", str(text), "--output", str(tmp_path / "page.html")],
        "report": ["report", str(tmp_path / "run"), "--output", str(tmp_path / "page.html")],
    }[command]
    code, said = limited(argv, largest_file)
    check_one_line(code, said)
    for file in (tmp_path / "out").rglob("*.json"):
        json.loads(file.read_text())
    for page in (tmp_path / "page.html", tmp_path / "out" / "report.html"):
        assert not page.exists() or page.read_text().rstrip().endswith("</html>")
    if command == "evaluate":
        assert main(argv) == 0 and len(read_rows(tmp_path / "out", "niah_single_1")) == 2


def posttrain(tmp_path: Path) -> list[str]:
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "{"The key is 4711. " * 9}", "answers": ["4711"]}}\n' * 8)
    given = "--use_cpu --report_to none --max_steps 2 --max_length 256 --positions_per_sequence 2 --save_strategy steps --save_steps 1"
    return ["posttrain", "--dataset_name", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "run"), *given.split()]


@pytest.mark.parametrize("largest_file", [300, 100_000, 12_000_000])
def test_no_room_for_the_files_of_post_training(tmp_path, largest_file):
    check_one_line(*limited(posttrain(tmp_path), largest_file))
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        assert Checkpoint(folder).problem() is None
    for file in (tmp_path / "run").glob("*.safetensors"):
        load_file(file)


@pytest.mark.parametrize("largest_file", [100, 20_000, 60_000])
def test_no_room_for_the_files_of_pretraining(tmp_path, library, monkeypatch, largest_file):  # noqa: F811
    """What is there is whole, and the run can be resumed from it."""
    args = tiny_base(tmp_path / "base", {"facts": 0.3})
    settings = {name: getattr(args, name) for name in TINY_BASE} | {"phases": [asdict(phase) for phase in args.phases]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings | {"output_dir": str(tmp_path / "base"), "use_cpu": True}))
    argv = ["pretrain", "--config", str(tmp_path / "c.yaml")]
    check_one_line(*limited(argv, largest_file))
    for folder in (tmp_path / "base").glob("checkpoint-*"):
        assert Checkpoint(folder).problem() is None
    assert not list((tmp_path / "base").glob("*.safetensors"))
    leave_curves_undrawn(monkeypatch)
    assert main([*argv, "--resume_from_checkpoint", "last"]) == 0 and load(tmp_path / "base")


def test_no_room_for_a_comparison(tmp_path):
    assert main([*EVALUATION, "--samples", "1", "--output_dir", str(tmp_path / "a")]) == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for page in ("page.html", "page.md"):
        check_one_line(*limited(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / page)], 100))
        assert not (tmp_path / page).exists() and not list(tmp_path.glob("*.tmp"))


def test_no_room_for_an_exported_model(tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    model = build("delta_net")
    model.config.save_pretrained(checkpoint)
    save({"model": model.state_dict()}, checkpoint_id=checkpoint / f"{FSDP_MODEL_NAME}_0", no_dist=True)
    argv = ["export", str(checkpoint), str(tmp_path / "plain")]
    check_one_line(*limited(argv, 5_000))
    assert not (tmp_path / "plain").exists() and not list(tmp_path.glob("*.tmp"))
    assert main(argv) == 0 and load_file(tmp_path / "plain" / "model.safetensors")


def test_no_room_for_a_converted_model(tmp_path):
    plain("llama").save_pretrained(tmp_path / "source")
    load("refine-nsp/tiny-delta-net")[1].save_pretrained(tmp_path / "source")
    argv = ["convert", str(tmp_path / "source"), str(tmp_path / "new"), "--window_size", "12", "--num_lact_heads", "2"]
    check_one_line(*limited(argv, 50_000))
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob("*.tmp"))


def test_no_room_for_the_cache_of_tokens(tmp_path, text, monkeypatch):
    """Nor is half a cache taken for a whole one afterwards."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    check_one_line(*limited(tiny(tmp_path, text), 2_000))
    assert not (tmp_path / "run").exists() and main(tiny(tmp_path, text)) == 0


@pytest.mark.parametrize(("what", "size"), [("run", "200k"), ("run", "2m"), ("cache", "16k")])
def test_a_full_disk(tmp_path, text, monkeypatch, capfd, what, size):
    """One of our own, where we may have one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no right to mount a disk of our own")
    try:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", (disk if what == "cache" else tmp_path) / "cache")
        argv = tiny(disk if what == "run" else tmp_path, text, "--save_strategy", "steps", "--save_steps", "1")
        code = main(argv)
        check_one_line(code, capfd.readouterr().err)
        assert all(Checkpoint(folder).problem() is None for folder in (disk / "run").glob("checkpoint-*"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


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
    assert "Traceback" not in said and said.count("refine-nsp:") == 1 and "has gone while it was streamed" in said, said[-600:]
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_streamed_data_that_changes(tmp_path, text, capsys, monkeypatch):
    """Cut after the second step: no checkpoint is made of what was read since, and the ones before are not gone on with."""
    from refine_nsp.training import ReFINETrainer

    step, steps = ReFINETrainer.training_step, []

    def cutting(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 2:
            text.write_text(TEXT[: len(TEXT) // 2])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ReFINETrainer, "training_step", cutting)
    argv = tiny(tmp_path, text, "--streaming", "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "1")
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert f"{text} had {len(TEXT)} bytes when it was opened and has {len(TEXT) // 2} now" in said and "Traceback" not in said
    assert [folder.name for folder in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    assert main([*argv, "--resume_from_checkpoint", "last"]) == 1
    assert f"streamed files had {len(TEXT)} bytes in 1 files; these have {len(TEXT) // 2}" in capsys.readouterr().err
    text.write_text(TEXT)
    assert main([*argv, "--resume_from_checkpoint", "last"]) == 0


def test_data_that_changes_after_it_was_read(tmp_path, text, monkeypatch):
    """Tokens are kept when a run begins: what becomes of the file changes nothing."""
    from refine_nsp.training import ReFINETrainer

    assert main(tiny(tmp_path / "a", text)) == 0
    step = ReFINETrainer.training_step

    def spoiling(self, *args, **kwargs):
        text.write_text("gone")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ReFINETrainer, "training_step", spoiling)
    assert main(tiny(tmp_path / "b", text)) == 0
    a, b = (load_file(tmp_path / name / "run" / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, text, capsys, bad):
    """Before anything is trained, measured or said with them."""
    model, tokenizer = load("refine-nsp/tiny-delta-net")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, :3] = bad
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    for argv in (
        tiny(tmp_path, text, "--model_name_or_path", str(tmp_path / "broken")),
        ["generate", str(tmp_path / "broken"), "--prompt", "Once"],
        [
            "evaluate",
            str(tmp_path / "broken"),
            "--tasks",
            "niah_single_1",
            "--lengths",
            "512",
            "--output_dir",
            str(tmp_path / "e"),
        ],
    ):
        assert main(argv) == 1
        assert "NaN or infinity in model.layers.1.mlp.down_proj.weight (3)" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_scores_in_the_data_that_are_not_finite(tmp_path):
    """A step made of them is skipped, as any whose loss is not finite."""
    rows = test_trainer.data(4)
    rows = rows.map(lambda row: {"context_scores": [math.nan] * len(row["input_ids"])})
    settings = {"preset": "expected", "reward_funcs": "prefix_match", "rollout_length": 2, "max_steps": 2}
    t = test_trainer.trainer(tmp_path, train_dataset=rows, **settings)
    before = test_trainer.weights(t)
    t.train()
    after = test_trainer.weights(t)
    assert t.guard.skipped == 2 and all(torch.equal(after[name], before[name]) for name in before)


NOWHERE = "/sys/refine-nsp"  # where nobody can write, root included


@pytest.mark.skipif(not Path("/sys/kernel").exists(), reason="no /sys to be refused by")
@pytest.mark.parametrize("command", ["midtrain", "posttrain", "evaluate", "quickstart", "pretrain"])
def test_an_output_that_cannot_be_written(tmp_path, text, capsys, monkeypatch, command):
    """Known before any work is done."""
    from refine_nsp.training import ReFINETrainer

    monkeypatch.setattr(ReFINETrainer, "training_step", None)
    monkeypatch.setattr("refine_nsp.evaluation.tasks.answer_all", None)
    (tmp_path / "prompts.jsonl").write_text(f'{{"prompt": "{"The key is 4711. " * 9}", "answers": ["4711"]}}\n' * 8)
    argv = {
        "midtrain": tiny(tmp_path, text),
        "posttrain": ["posttrain", "--dataset_name", str(tmp_path / "prompts.jsonl"), "--use_cpu", "--report_to", "none"],
        "evaluate": [*EVALUATION, "--samples", "1"],
        "quickstart": ["quickstart"],
        "pretrain": ["pretrain"],
    }[command]
    code, said = main([*argv, "--output_dir", NOWHERE]), capsys.readouterr().err
    check_one_line(code, said)
    assert NOWHERE in said


def test_a_page_that_cannot_be_written(tmp_path, text, capsys):
    text.write_text(TEXT[:300])
    code = main(["inspect", "refine-nsp/tiny-delta-net", str(text), "--output", f"{NOWHERE}/page.html"])
    said = capsys.readouterr().err
    check_one_line(code, said)
    assert NOWHERE in said


def test_an_evaluation_that_is_asked_to_stop(tmp_path, capsys, monkeypatch):
    """As a scheduler does, after the first answers: they are kept, and the rest is answered as it would have been."""
    from refine_nsp.evaluation import tasks

    prompts = tmp_path / "prompts.jsonl"  # answers to them are sampled by the published protocol
    prompts.write_text("".join(json.dumps({"prompt": TEXT[500 * i : 500 * i + 1500], "answer": "y"}) + "\n" for i in range(3)))
    argv = ["evaluate", "--tasks", "prompts", "--prompts", str(prompts), "--protocol", "published", "--batch_tokens", "600"]
    assert main([*argv, "--output_dir", str(tmp_path / "straight")]) == 0
    answer, asked = tasks.answer_all, []

    def asking(*args, **kwargs):
        for answered in answer(*args, **kwargs):
            yield answered
            asked.append(1)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(tasks, "answer_all", asking)
    capsys.readouterr()
    assert main([*argv, "--output_dir", str(tmp_path / "stopped")]) == TERMINATED_CODE
    said = capsys.readouterr().err
    assert len(asked) == 1 and said.count("terminated; run the same command again") == 1 and "Traceback" not in said
    monkeypatch.undo()
    assert main([*argv, "--output_dir", str(tmp_path / "stopped")]) == 0
    straight, stopped = (read_rows(tmp_path / name, "prompts") for name in ("straight", "stopped"))
    assert len(straight) == 3 and straight == stopped


def test_a_data_worker_that_dies(tmp_path, text, capsys, monkeypatch):
    """Killed as the memory of a machine runs out, say."""
    from refine_nsp.training import data

    collate = data.collate

    def dying(rows):
        if get_worker_info() is not None and len(list((tmp_path / "run").glob("checkpoint-*"))) > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return collate(rows)

    monkeypatch.setattr("refine_nsp.training.trainer.collate", dying)
    argv = tiny(
        tmp_path, text, "--max_steps", "40", "--save_strategy", "steps", "--save_steps", "1", "--dataloader_num_workers", "1"
    )
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert said.count("refine-nsp:") == 1 and "worker" in said and "Traceback" not in said and "--debug" not in said, said
    folders = list((tmp_path / "run").glob("checkpoint-*"))
    assert folders and all(Checkpoint(folder).problem() is None for folder in folders)
