"""Two processes that hold half of every weight each (FSDP2, over gloo) give the model of one process; their checkpoints resume and
become plain folders. They are started once for all (once more for the slow ones)."""

import json
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from refine_nsp.cli import main
from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.nsp.schedule import Needs, with_schedule
from refine_nsp.training.checkpoints import Checkpoint, export_checkpoint
from refine_nsp.training.lane_states import LANES_FILE
from tests.children import run_side_by_side
from tests.models.families import build
from tests.training.jobs import JOBS
from tests.training.sharded_jobs import run_sharded_jobs
from tests.training.test_distributed import CARRIED, CLOSED_FORM, GROUPS, SAVED, assert_close, batches, figures_of, weights_of
from tests.training.test_trainer import trainer

SHARDED = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", "reshard_after_forward": True}
CHECKPOINTING = {**SHARDED, "activation_checkpointing": True}
GRADIENTS = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
ROLLOUTS = {**GROUPS, "lambda_rl": 1.0}
# Pairs of rows, dealt to the processes in turn: one process has rows without any context beyond the local window.
UNEVEN = {"lengths": [12, 13, 60, 50] * 4, "train_sampling_strategy": "sequential"}
# Kind, settings, how it is sharded, rows of a micro-batch (twice as many where one process is alone).
ALIKE = {
    "rollouts": ("midtrain", {**ROLLOUTS, "schedule": "snapshot", "evaluate": True}, SHARDED, 2),
    "rollouts within the pass, checkpointing": ("midtrain", {**ROLLOUTS, "schedule": "fused"}, CHECKPOINTING, 4),
    "lact, checkpointing": ("midtrain", {**ROLLOUTS, "family": "lact_swiglu", "schedule": "snapshot"}, CHECKPOINTING, 2),
    "lact, closed form, gradient_checkpointing": ("midtrain", {**CLOSED_FORM, **GRADIENTS, "family": "lact_swiglu"}, SHARDED, 4),
    "closed form, rows of one process without context": ("midtrain", {**CLOSED_FORM, **UNEVEN}, SHARDED, 2),
    "closed form by segments, fewer on one process": ("midtrain", {**CLOSED_FORM, **UNEVEN, "segment_tokens": 17}, SHARDED, 2),
    "several steps from one batch of rollouts": ("midtrain", {**ROLLOUTS, "steps_per_generation": 2}, SHARDED, 2),
    "closed form, scores beforehand": ("scored", {**CLOSED_FORM, **UNEVEN}, SHARDED, 2),
    "hybrid, checkpointing": ("midtrain", {**CLOSED_FORM, **UNEVEN, "family": "qwen3_next"}, CHECKPOINTING, 2),
    "hybrid by segments, checkpointing": (
        "midtrain",
        {**CLOSED_FORM, **UNEVEN, "family": "qwen3_next", "segment_tokens": 17},
        CHECKPOINTING,
        2,
    ),
    "hybrid, closed form": ("midtrain", {**CLOSED_FORM, **UNEVEN, "family": "qwen3_next"}, SHARDED, 2),
    "hybrid, rollouts, checkpointing": ("midtrain", {**ROLLOUTS, **UNEVEN, "family": "qwen3_next"}, CHECKPOINTING, 2),
    "hybrid, rollouts": ("midtrain", {**ROLLOUTS, **UNEVEN, "family": "falcon_h1", "evaluate": True}, SHARDED, 2),
    "rollouts by segments": ("midtrain", {**ROLLOUTS, **UNEVEN, "segment_tokens": 17}, SHARDED, 2),
    "carried, lact, checkpointing": ("midtrain", {**CARRIED, **CLOSED_FORM, "family": "lact_swiglu"}, CHECKPOINTING, 2),
    "carried, rollouts by segments": ("midtrain", {**CARRIED, **ROLLOUTS, "segment_tokens": 10, "evaluate": True}, SHARDED, 2),
    "distilled": ("distilled", {**UNEVEN, "family": "lact_swiglu", "evaluate": True}, SHARDED, 2),
    "transferred": ("distilled", {**UNEVEN, "family": "lact_swiglu", "objective": "transfer", "evaluate": True}, SHARDED, 2),
    "distilled, scores beforehand": ("distilled", {**UNEVEN, "context_scores": "teacher"}, CHECKPOINTING, 2),
    "nested closed form": ("posttrain", CLOSED_FORM, SHARDED, 2),
    "nested": ("posttrain", {**ROLLOUTS, "schedule": "snapshot", "inner_steps": 2}, SHARDED, 2),
}
# What `make test` has time for: both kinds of models and a hybrid, sampled and closed form, both phases.
FIRST = {
    "rollouts", "lact, checkpointing", "closed form by segments, fewer on one process", "several steps from one batch of rollouts",
    "hybrid, checkpointing", "hybrid, rollouts", "carried, lact, checkpointing", "distilled", "nested closed form",
}  # fmt: skip
FOUR_STEPS = {**ROLLOUTS, "max_steps": 4, "steps_per_generation": 2}
LANES = {**CARRIED, **CLOSED_FORM, "max_steps": 4, "fsdp": True, "fsdp_config": SHARDED}


def plain(settings: dict) -> dict:
    """Without what belongs to shards."""
    return {k: v for k, v in settings.items() if not k.startswith(("fsdp", "gradient_checkpointing"))}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """What two processes made of jobs: a folder each."""
    folder = tmp_path_factory.mktemp("sharded")
    four = {**FOUR_STEPS, **batches(2, 2), "fsdp": True}
    jobs = [
        ("midtrain", "straight", {**four, **SAVED, "fsdp_config": SHARDED}),
        ("copy", "stopped", {"source": str(folder / "straight")}),
        ("forget", "stopped", {"checkpoints": [2, 3, 4]}),
        ("midtrain", "stopped", {**four, "fsdp_config": CHECKPOINTING, "resume": True}),
        ("midtrain", "lanes", {**LANES, **batches(2, 2), **SAVED}),
        ("copy", "lanes stopped", {"source": str(folder / "lanes")}),
        ("forget", "lanes stopped", {"checkpoints": [3, 4]}),
        ("copy", "lanes alone", {"source": str(folder / "lanes stopped")}),
        ("midtrain", "lanes stopped", {**LANES, **batches(2, 2), "resume": True}),
    ]
    run(folder, [*jobs, *alike(FIRST)], 2)
    return folder


@pytest.fixture(scope="module")
def more(tmp_path_factory, two) -> Path:
    """The others, and runs that went from one process to two, and from two to one."""
    folder = tmp_path_factory.mktemp("more")
    alone = {**FOUR_STEPS, **batches(4, 1), "fsdp": True, "fsdp_config": SHARDED}
    jobs = [("copy", "alone", {"source": str(two / "straight")}), ("forget", "alone", {"checkpoints": [2, 3, 4]})]
    jobs += [("midtrain", "one", {**alone, **SAVED}), ("forget", "one", {"checkpoints": [2, 3, 4]})]
    jobs += [
        ("copy", "lanes alone", {"source": str(two / "lanes alone")}),
        ("midtrain", "lanes one", {**LANES, **batches(8, 1), **SAVED, "max_steps": 2}),
    ]
    jobs += [("midtrain", "lanes alone", {**LANES, **batches(4, 1), "resume": True})]
    run(folder, [*jobs, ("midtrain", "alone", {**alone, "resume": True})], 1)
    four = {**FOUR_STEPS, **batches(2, 2), "fsdp": True, "fsdp_config": SHARDED}
    resumed = [
        ("midtrain", "one", {**four, "resume": True}),
        ("midtrain", "lanes one", {**LANES, **batches(2, 2), "resume": True}),
    ]
    run(folder, [*resumed, *alike(ALIKE.keys() - FIRST)], 2)
    return folder


def alike(names: Collection[str]) -> list:
    return [
        (kind, name, {**batches(size, 2), **settings, "fsdp": True, "fsdp_config": sharded})
        for name, (kind, settings, sharded, size) in ALIKE.items()
        if name in names
    ]


def run(folder: Path, jobs: list, processes: int) -> None:
    (folder / "jobs.json").write_text(json.dumps([(kind, str(folder / name), settings) for kind, name, settings in jobs]))
    run_side_by_side(partial(run_sharded_jobs, folder / "jobs.json"), folder, processes)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in ALIKE])
def test_shards_equal_one_process_with_the_same_global_batch(tmp_path, request, name):
    kind, settings, _, size = ALIKE[name]
    both = request.getfixturevalue("two" if name in FIRST else "more") / name
    JOBS[kind](tmp_path, **batches(2 * size, 1), **plain(settings))
    assert_close(weights_of(tmp_path), weights_of(both), 1e-9)
    for figures, own in zip(figures_of(both), figures_of(tmp_path), strict=True):
        assert figures == pytest.approx(own, rel=1e-6, abs=1e-9)


def test_checkpoints_in_shards_resume(two):
    checkpoint = two / "straight" / "checkpoint-1"
    assert (checkpoint / "pytorch_model_fsdp_0" / ".metadata").exists() and not (checkpoint / "model.safetensors").exists()
    assert_close(weights_of(two / "stopped"), weights_of(two / "straight"), 1e-12)


def test_lanes_resume_where_weights_are_in_shards(two):
    lanes = [load_file(two / "lanes" / "checkpoint-2" / LANES_FILE.format(rank)) for rank in (0, 1)]
    assert [{int(name.split(".")[0]) for name in own} for own in lanes] == [{0, 1, 4, 5}, {2, 3, 6, 7}]
    straight = weights_of(two / "lanes")
    assert all(torch.equal(x, straight[name]) for name, x in weights_of(two / "lanes stopped").items())


@pytest.mark.slow
def test_checkpoints_in_shards_resume_on_another_number_of_processes(two, more):
    straight = weights_of(two / "straight")
    assert_close(weights_of(more / "one"), straight, 1e-9)  # from one to two
    assert_close(weights_of(more / "alone"), straight, 1e-9)  # and from two to one
    for name in ("lanes one", "lanes alone"):
        assert_close(weights_of(more / name), weights_of(two / "lanes"), 1e-9)


def test_a_run_goes_on_with_weights_as_they_were_saved(tmp_path, two):
    """In shards or whole."""
    shards = two / "straight" / "checkpoint-1"
    with pytest.raises(RefineError, match=r"holds weights in shards, and this run holds them whole; .*refine-nsp export"):
        JOBS["midtrain"](tmp_path, **FOUR_STEPS, **batches(4, 1), resume=str(shards))
    Checkpoint(shards).check_shards(True)
    (tmp_path / "model.safetensors").touch()
    Checkpoint(tmp_path).check_shards(False)
    with pytest.raises(RefineError, match="holds whole weights, and this run shares them out"):
        Checkpoint(tmp_path).check_shards(True)


def test_checkpoints_in_shards_become_plain_folders(tmp_path, two):
    assert main(["export", str(two / "straight" / "checkpoint-4"), str(tmp_path / "model")]) == 0
    exported, saved = load_file(tmp_path / "model" / "model.safetensors"), weights_of(two / "straight")
    assert exported.keys() == saved.keys() == build("delta_net").state_dict().keys()
    assert_close(exported, saved, 0.0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_close(dict(model.named_parameters()), saved, 0.0)
    with pytest.raises(RefineError, match="is not empty"):
        export_checkpoint(two / "straight" / "checkpoint-4", tmp_path / "model")
    with pytest.raises(RefineError, match="is a plain folder already"):
        export_checkpoint(tmp_path / "model", tmp_path / "again")
    with pytest.raises(RefineError, match="holds no sharded weights"):
        export_checkpoint(tmp_path / "nothing", tmp_path / "again")


@pytest.mark.parametrize(("family", "settings"), [("delta_net", {"segment_tokens": 17}), ("qwen3_next", {})])
def test_rollouts_from_segments_are_sampled_in_a_pass_of_their_own_in_shards(tmp_path, family, settings):
    model, nsp = trainer(tmp_path, family).model, NSPConfig(schedule="fused", **settings)
    assert with_schedule(nsp, Needs(shards=model)) == replace(nsp, schedule="snapshot")
    closed = NSPConfig.preset("expected", **settings)
    assert with_schedule(closed, Needs(shards=model)) is closed
    assert with_schedule(NSPConfig(schedule="fused"), Needs(shards=build("delta_net"))).schedule == "fused"


def test_rollouts_of_a_hybrid_by_segments_are_refused_in_shards(tmp_path):
    """Each segment would be cut at the positions of its process."""
    with pytest.raises(RefineError, match=r"segment_tokens=17: rollouts of qwen3_next .*leave segment_tokens out"):
        with_schedule(NSPConfig(segment_tokens=17), Needs(shards=trainer(tmp_path, "qwen3_next").model))
