"""A run that finds no memory ends with one line, which names the part of the step that asked for it."""

import re
from dataclasses import fields

import pytest
import torch
from transformers import Trainer

from refine_nsp.cli import main
from refine_nsp.commands.shared import ModelArguments
from refine_nsp.config import NSPConfig
from refine_nsp.models.blocks import FastWeightModel
from refine_nsp.training import ReFINEConfig
from refine_nsp.training.remedies import TEST_TIME, TRAINING
from refine_nsp.training.test_time import TestTimeConfig
from tests.ops.test_memory import cuda
from tests.test_cli import fails, tiny
from tests.training.test_trainer import trainer


@pytest.mark.parametrize(("remedies", "holders"), [
    (TRAINING, (ReFINEConfig, NSPConfig, ModelArguments)), (TEST_TIME, (TestTimeConfig, NSPConfig)),
])  # fmt: skip
def test_remedies_name_settings_that_there_are(remedies, holders):
    known = {f.name for holder in holders for f in fields(holder)}
    named = {name for remedy in remedies.values() for name in re.findall(r"\b[a-z]+_[a-z_]+\b", remedy)} - {"fast_weights"}
    assert named and named <= known


def refused(*args, **kwargs):
    cuda()


def second_pass(monkeypatch):
    """A trunk that runs once a step."""
    forward, calls = FastWeightModel.forward, []

    def counted(self, *args, **kwargs):
        calls.append(self)
        return forward(self, *args, **kwargs) if len(calls) == 1 else cuda()

    monkeypatch.setattr(FastWeightModel, "forward", counted)


def in_backward(monkeypatch):
    def refuse(ctx, *gradients):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes.")

    monkeypatch.setattr("refine_nsp.ops.norm._ScaledNorm.backward", staticmethod(refuse))


PLACES = {
    "In the weights, which asked for 20.00 GiB": (lambda m: m.setattr(Trainer, "_move_model_to_device", refused), ()),
    "In the forward pass": (lambda m: m.setattr(FastWeightModel, "forward", refused), ()),
    "In the rollouts, which asked for 20.00 GiB": (lambda m: m.setattr("refine_nsp.nsp.rollouts.sample_tokens", refused), ()),
    "In the head's logits": (lambda m: m.setattr("refine_nsp.nsp.next_token.linear_cross_entropy", refused), ()),
    "In the pass over local windows": (second_pass, ("--preset", "expected", "--local_window", "8")),
    "In the backward pass, which asked for 8.00 GiB": (in_backward, ()),
    "In the optimizer step": (lambda m: m.setattr(torch.optim.AdamW, "step", refused), ()),
    "In the validation": (lambda m: m.setattr("refine_nsp.training.phases.validate", refused), ()),
}


@pytest.mark.parametrize("words", PLACES)
def test_the_part_that_asked_is_named(words, tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n" * 200)
    patch, flags = PLACES[words]
    patch(monkeypatch)
    more = (
        "--validation_dataset",
        str(text),
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
        "--per_device_eval_batch_size",
        "2",
    )
    fails(capsys, tiny(tmp_path, text, *flags, *(more if "validation" in words else ())), words)


def test_an_evaluation_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(FastWeightModel, "forward", refused)
    argv = ["evaluate", "refine-nsp/tiny-delta-net", "--tasks", "niah", "--lengths", "512", "--samples", "1"]
    fails(capsys, [*argv, "--output_dir", str(tmp_path / "out")], "In the evaluation")
    assert main(["--help"]) == 0


def test_weights_that_do_not_fit_where_they_are_evaluated(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to", refused)
    argv = ["evaluate", "refine-nsp/tiny-delta-net", "--tasks", "niah", "--lengths", "512", "--samples", "1"]
    fails(capsys, [*argv, "--output_dir", str(tmp_path / "out")], "In the weights")


def test_smaller_batches_are_tried_where_that_is_asked_for(tmp_path, monkeypatch):
    forward, sizes = FastWeightModel.forward, []

    def of_few_rows(self, input_ids=None, *args, **kwargs):
        if len(input_ids) > 2:
            cuda()
        sizes.append(len(input_ids))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(FastWeightModel, "forward", of_few_rows)
    run = trainer(tmp_path, objective="ntp", auto_find_batch_size=True, per_device_train_batch_size=4, max_steps=2)
    assert run.train().global_step == 2 and max(sizes) == 2
