"""Validation runs where it is asked for, in the memory of a training step, and a run that ends in it has written everything."""

import pytest
import torch

from refine_nsp.cli import main
from refine_nsp.config import NSPConfig
from refine_nsp.estimate.counter import Counter
from refine_nsp.estimate.few_layers import Blueprint
from refine_nsp.estimate.memory_and_time import estimate
from refine_nsp.estimate.shapes import ShapesOnly
from refine_nsp.estimate.small_steps import FLOPS, VALIDATION, measure_step
from refine_nsp.files import read_json_lines
from refine_nsp.nsp.records import Batch
from refine_nsp.training import ReFINEConfig, ReFINETrainer
from refine_nsp.training.phases import MicroBatch, NextToken, validate
from tests.models.families import build
from tests.test_cli import TEXT, tiny
from tests.training.test_trainer import data, trainer

NTP = ("--objective", "ntp", "--save_strategy", "no")
WIDE = dict(hidden_size=64, num_hidden_layers=3, vocab_size=8192, intermediate_size=128)


@pytest.mark.parametrize("family", ["delta_net", "lact_swiglu"])
def test_validation_takes_no_more_than_a_training_step_and_no_logits_are_held_whole(family):
    model, B, T = build(family, dtype=torch.float32, **WIDE), 8, 512
    ids = torch.randint(0, 8192, (B, T), generator=torch.Generator().manual_seed(0))
    config = NSPConfig()
    with Counter() as trained:
        loss, _ = NextToken(config).loss(model, MicroBatch(Batch.of(ids), totals={"targets": 1.0}))
        loss.backward()
    with Counter() as validated:
        validate(model, [{"input_ids": ids, "lengths": torch.full((B,), T)}], config, ids.device)
    peaks = [max(counter.peaks.values()) for counter in (trained, validated)]
    assert peaks[1] < peaks[0], peaks
    assert peaks[1] < 4 * B * T * 8192


def test_validation_goes_by_the_batches_of_training_unless_told_otherwise(tmp_path):
    settings = dict(output_dir=str(tmp_path), report_to="none", per_device_train_batch_size=3)
    assert ReFINEConfig(**settings).per_device_eval_batch_size == 3
    assert ReFINEConfig(**settings, per_device_eval_batch_size=5).per_device_eval_batch_size == 5
    own = {size: trainer(tmp_path, eval_dataset=data(5), per_device_eval_batch_size=size).evaluate() for size in (1, 4)}
    for name, value in own[1].items():
        assert name.endswith("runtime") or own[4][name] == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("family", ["delta_net", "lact_swiglu"])
def test_the_estimate_counts_it(family):
    config = build(family, **WIDE).config
    settings = dict(output_dir="x", report_to="none", use_cpu=True, max_length=300, objective="ntp", gradient_checkpointing=True)
    args = ReFINEConfig(**settings, do_eval=True, per_device_eval_batch_size=2, per_device_train_batch_size=1)
    blueprint = Blueprint(config, torch.float32)
    computed, shaped = (
        measure_step(blueprint, args, VALIDATION, shapes=shapes, rows=2, tokens=300) for shapes in (None, ShapesOnly())
    )
    assert shaped.pop(FLOPS) == pytest.approx(computed.pop(FLOPS), rel=0.05)
    assert max(shaped.values()) == pytest.approx(max(computed.values()), rel=0.05)
    found, without = estimate(config, args), estimate(config, ReFINEConfig(**settings, per_device_train_batch_size=1))
    assert found.validation == pytest.approx(max(shaped.values()), rel=0.1) and without.validation == 0
    assert found.total == without.total - without.activations + max(found.activations, found.validation)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ((), []),
        (("--eval_strategy", "steps", "--eval_steps", "2"), [2]),  # the last step has validated already
        (("--eval_strategy", "epoch", "--max_steps", "1"), [1]),
        (("--do_eval", "true"), [2]),
        (("--validation_dataset", "TEXT"), [2]),
        (("--validation_fraction", "0.1"), [2]),
        (("--validation_fraction", "0"), []),
    ],
)
def test_a_run_is_validated_at_its_end_where_that_is_asked_for(tmp_path, flags, steps):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert main(tiny(tmp_path, text, *NTP, *(str(text) if flag == "TEXT" else flag for flag in flags))) == 0
    records = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records if "eval_loss" in record] == steps
    assert (tmp_path / "run" / "report.html").exists()


def test_validation_that_there_is_not_is_refused(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert main(tiny(tmp_path, text, *NTP, "--do_eval", "true", "--validation_fraction", "0")) == 1
    assert "do_eval asks for validation, but there is none" in capsys.readouterr().err


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, MemoryError])
def test_a_run_that_ends_in_its_last_validation_has_written_everything(tmp_path, monkeypatch, end):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    def ends(self, *args, **kwargs):
        raise end

    monkeypatch.setattr(ReFINETrainer, "evaluate", ends)
    try:
        ended = main(tiny(tmp_path, text, *NTP, "--do_eval", "true"))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        ended = 1
    assert ended != 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "README.md",
        "report.html",
        "trainer_state.json",
        "metrics.jsonl",
        "config.yaml",
    } <= names
