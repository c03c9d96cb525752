"""Two processes over gloo give the losses and the model of one with the same global batch. They are started once for all, and once
more for what is slow."""

import json
from collections.abc import Collection
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from refine_nsp.training.lane_states import LANES_FILE
from refine_nsp.training.pending_rollouts import ROLLOUTS_FILE
from tests.children import run_side_by_side
from tests.training.jobs import JOBS, run_jobs

# Short local windows, so that short rows have weights too.
CLOSED_FORM = {"preset": "expected", "reward_funcs": "prefix_match", "rollout_length": 2, "local_window": 8}
GROUPS = {"num_generations": 2, "advantage_scale": "global", "baseline": "leave_one_out"}
# A chunk of this LaCT is 16 tokens: no row is long enough for the fast weights to learn, so their learning rates move nothing.
SHORT_LACT = {
    "family": "lact_swiglu", "lengths": [12 + i % 4 for i in range(16)], "objective": "ntp", "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False}, "ddp_find_unused_parameters": False,
}  # fmt: skip
# Documents of one to five windows, in eight lanes.
CARRIED = {
    "lengths": [90, 33, 61, 120, 47, 75, 20, 101, 64, 88], "carry_states": True, "max_length": 25, "max_steps": 5,
    "ddp_find_unused_parameters": False,
}  # fmt: skip
# Steps are of 8 rows of several lengths, shuffled. Sizes: of a micro-batch with two processes, and with one.
ALIKE = {
    "ntp": ("midtrain", {"objective": "ntp", "evaluate": True}, 4, 8),
    "paper": ("midtrain", {"lambda_rl": 1.0}, 4, 2),
    "one scale within the pass": ("midtrain", {**GROUPS, "schedule": "fused", "lambda_rl": 1.0}, 4, 8),
    "lact, one scale": ("midtrain", {**GROUPS, "family": "lact_swiglu", "selection": "context_kl", "local_window": 8}, 2, 4),
    "several steps from one batch of rollouts": ("midtrain", {**GROUPS, "steps_per_generation": 2}, 2, 1),
    "lact, several steps from one batch of rollouts": (
        "midtrain",
        {**GROUPS, "family": "lact_swiglu", "steps_per_generation": 2},
        2,
        4,
    ),
    "hybrid, several steps from one batch of rollouts": (
        "midtrain",
        {**GROUPS, "family": "qwen3_next", "steps_per_generation": 2},
        2,
        4,
    ),
    "scores beforehand": ("scored", {**CLOSED_FORM, "packed": True}, 2, 4),
    "packed": ("midtrain", {"packed": True, "num_generations": 2, "lambda_rl": 1.0}, 2, 4),
    "streamed, twice": ("midtrain", {"streamed": True, "max_steps": 3, "lambda_rl": 1.0}, 2, 8),
    "mixed, with answers": ("midtrain", {**GROUPS, "mixed": True, "max_steps": 4, "lambda_rl": 1.0}, 2, 4),
    "closed form": ("midtrain", CLOSED_FORM, 2, 4),
    "by segments": ("midtrain", {**GROUPS, "segment_tokens": 17, "lambda_rl": 1.0}, 2, 4),
    "lact, closed form": ("midtrain", {**CLOSED_FORM, "family": "lact_swiglu", "gradient_checkpointing": True}, 4, 1),
    "lact, short rows": ("midtrain", SHORT_LACT, 4, 8),
    "hybrid": ("midtrain", {**GROUPS, "family": "qwen3_next", "lambda_rl": 1.0}, 2, 4),
    "hybrid, closed form": ("midtrain", {**CLOSED_FORM, "family": "qwen3_next"}, 2, 4),
    "carried": ("midtrain", {**CARRIED, **CLOSED_FORM, "carry_between_documents": 0.5}, 2, 4),
    "carried, lact, rollouts": (
        "midtrain",
        {**CARRIED, **GROUPS, "family": "lact_swiglu", "lambda_rl": 1.0, "evaluate": True},
        4,
        2,
    ),
    "carried, streamed": ("midtrain", {**CARRIED, "objective": "ntp", "streamed": True}, 1, 8),
    "distilled": ("distilled", {"family": "lact_swiglu", "evaluate": True}, 4, 8),
    "transferred": ("distilled", {"family": "lact_swiglu", "objective": "transfer", "evaluate": True}, 4, 8),
    "distilled, scores beforehand": ("distilled", {"context_scores": "teacher", "packed": True, "lambda_ntp": 0.0}, 2, 4),
    "distilled, mixed, with answers": ("distilled", {"mixed": True, "max_steps": 3}, 2, 4),
    "nested ntp": ("posttrain", {"objective": "ntp"}, 4, 8),
    "nested": ("posttrain", {**GROUPS, "schedule": "snapshot", "reference": "random", "inner_steps": 2}, 1, 2),
    "nested closed form": ("posttrain", CLOSED_FORM, 4, 8),
}
SLOW = {  # are slow: each is like one that is not
    "lact, one scale", "lact, several steps from one batch of rollouts", "hybrid, several steps from one batch of rollouts", "packed",
    "lact, short rows", "hybrid", "carried", "carried, streamed", "distilled, mixed, with answers",
}  # fmt: skip
CARRIED_STEPS = {**CARRIED, **GROUPS, "lambda_rl": 1.0, "family": "gated_deltanet"}
THREE_STEPS = {**GROUPS, "max_steps": 3, "steps_per_generation": 3, "lambda_rl": 1.0}
SAVED = {"save_strategy": "steps", "save_steps": 1}


def batches(size: int, processes: int) -> dict[str, int]:
    """Settings that make steps of 8 rows."""
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size // processes}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """What two processes made of all jobs: a folder each. Beside them `one` and `carried one`: runs that one process began."""
    folder = tmp_path_factory.mktemp("two")
    JOBS["midtrain"](folder / "one", **THREE_STEPS, **SAVED, **batches(8, 1))
    JOBS["forget"](folder / "one", [2, 3])
    JOBS["midtrain"](folder / "carried one", **{**CARRIED_STEPS, **SAVED, **batches(8, 1), "max_steps": 2})
    three = {**THREE_STEPS, **batches(2, 2)}
    jobs = [
        ("midtrain", "straight", three),
        ("midtrain", "stopped", {**three, **SAVED}),
        ("forget", "stopped", {"checkpoints": [2, 3]}),
        ("copy", "alone", {"source": str(folder / "stopped")}),
        ("midtrain", "stopped", {**three, "resume": True}),
        ("midtrain", "one", {**THREE_STEPS, **batches(1, 2), "resume": True}),
    ]
    carried = {**CARRIED_STEPS, **batches(2, 2)}
    jobs += [
        ("midtrain", "carried straight", {**carried, **SAVED}),
        ("copy", "carried stopped", {"source": str(folder / "carried straight")}),
        ("forget", "carried stopped", {"checkpoints": [3, 4, 5]}),
        ("copy", "carried alone", {"source": str(folder / "carried stopped")}),
        ("midtrain", "carried stopped", {**carried, "resume": True}),
        ("midtrain", "carried one", {**carried, "resume": True}),
    ]
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": f"{i} " + "alpha beta " * 60}) for i in range(40)))
    argv = ["--dataset_name", str(folder / "texts.jsonl"), "--output_dir", str(folder / "tokenized"), "--max_length", "64"]
    jobs += [("tokenize", "tokenized", {"argv": [*argv, "--use_cpu", "--dry_run"]})]
    return run(folder, [*jobs, *alike(ALIKE.keys() - SLOW)])


@pytest.fixture(scope="module")
def more(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("more"), alike(SLOW))


def alike(names: Collection[str]) -> list:
    return [(kind, name, {**batches(size, 2), **settings}) for name, (kind, settings, size, _) in ALIKE.items() if name in names]


def run(folder: Path, jobs: list) -> Path:
    (folder / "jobs.json").write_text(json.dumps([(kind, str(folder / name), settings) for kind, name, settings in jobs]))
    run_side_by_side(partial(run_jobs, folder / "jobs.json"), folder)
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    error = folder / "error.txt"
    assert not error.exists(), error.read_text()[-3000:]
    return load_file(folder / "model.safetensors")


def figures_of(folder: Path) -> list[dict[str, float]]:
    """Losses, and all validation, of each log."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    wanted = [{k: v for k, v in line.items() if "loss" in k or k.startswith(("eval_", "source_share_"))} for line in lines]
    return [{k: v for k, v in figures.items() if "runtime" not in k and k != "train_loss"} for figures in wanted]


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_the_first_process_of_a_machine_tokenizes_for_all(two):
    error = two / "tokenized" / "error.txt"
    assert not error.exists(), error.read_text()
    assert [json.loads((two / "tokenized" / f"{i}.json").read_text()) for i in range(2)] == [40, 0]


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ALIKE])
def test_two_processes_equal_one_with_the_same_global_batch(tmp_path, request, name):
    kind, settings, _, alone = ALIKE[name]
    both = request.getfixturevalue("more" if name in SLOW else "two") / name
    JOBS[kind](tmp_path, **batches(alone, 1), **settings)
    assert_close(weights_of(both), weights_of(tmp_path), 1e-9)
    for figures, own in zip(figures_of(both), figures_of(tmp_path), strict=True):
        assert figures == pytest.approx(own, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "other"), [("paper", "ntp"), ("closed form", "ntp"), ("nested", "nested ntp"), ("nested closed form", "nested ntp")]
)
def test_the_runs_that_are_alike_had_something_to_learn_from(two, name, other):
    a, b = weights_of(two / name), weights_of(two / other)
    assert max(float((a[n] - b[n]).abs().max()) for n in a) > 1e-3


def test_scores_made_by_two_processes_are_those_of_one(tmp_path, two):
    JOBS["scored"](tmp_path, **batches(4, 1), **ALIKE["scores beforehand"][1])
    one, both = (json.loads((folder / "scores.json").read_text()) for folder in (tmp_path, two / "scores beforehand"))
    assert one == both and sum(map(sum, one)) > 0
    scored = [int((two / "scores beforehand" / f"scored.{rank}").read_text()) for rank in (0, 1)]
    assert sum(scored) == len(one)  # each row once


def test_two_processes_resume_with_the_rollouts_each_had_left(two):
    left = [load_file(two / "stopped" / "checkpoint-1" / ROLLOUTS_FILE.format(rank)) for rank in (0, 1)]
    assert not torch.equal(left[0]["0.input_ids"], left[1]["0.input_ids"])
    assert_close(weights_of(two / "stopped"), weights_of(two / "straight"), 1e-12)


def test_a_run_goes_on_alike_on_another_number_of_processes(two):
    straight = weights_of(two / "straight")
    JOBS["midtrain"](two / "alone", **THREE_STEPS, **batches(4, 1), resume=True)
    assert_close(weights_of(two / "alone"), straight, 1e-9)  # from two processes to one
    assert_close(weights_of(two / "one"), straight, 1e-9)  # and from one to two


def test_lanes_go_on_on_another_number_of_processes(two):
    straight = weights_of(two / "carried straight")
    assert all(torch.equal(x, straight[name]) for name, x in weights_of(two / "carried stopped").items())
    lanes = [load_file(two / "carried alone" / "checkpoint-2" / LANES_FILE.format(rank)) for rank in (0, 1)]
    numbers = [{int(name.split(".")[0]) for name in own} for own in lanes]
    assert numbers == [{0, 1, 4, 5}, {2, 3, 6, 7}]
    JOBS["midtrain"](two / "carried alone", **CARRIED_STEPS, **batches(4, 1), resume=True)
    assert_close(weights_of(two / "carried alone"), straight, 1e-9)  # from two processes to one
    assert_close(weights_of(two / "carried one"), straight, 1e-9)  # and from one to two
