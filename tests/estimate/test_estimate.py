"""The estimate against what steps really need: computed and counted whole, and as the memory of a process that trains."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import KimiLinearConfig, NemotronHConfig, Qwen3_5TextConfig, Qwen3NextConfig

from refine_nsp.cli import main
from refine_nsp.commands.estimate import Patience, notes_of
from refine_nsp.commands.shared import ModelArguments, with_adapters
from refine_nsp.errors import RefineError
from refine_nsp.estimate import small_steps
from refine_nsp.estimate.counter import Counter
from refine_nsp.estimate.few_layers import Blueprint, few_layers, kinds_of_layers, layer_kinds
from refine_nsp.estimate.memory_and_time import device_named, dtype_of, estimate
from refine_nsp.estimate.shapes import ShapesOnly
from refine_nsp.estimate.small_steps import FLOPS, extrapolate, measure_step
from refine_nsp.models.convert import convert
from refine_nsp.models.load import load_config, load_model
from refine_nsp.nsp.records import Batch
from refine_nsp.ops.memory import part
from refine_nsp.training import ReFINEConfig
from refine_nsp.training.memory_rate import check_memory
from refine_nsp.training.phases import MicroBatch
from refine_nsp.training.teacher import teacher_of
from refine_nsp.training.transfer import Transfer
from tests.estimate import measured_models
from tests.models.families import build
from tests.models.test_convert import MEMORY, SOURCES, source_of
from tests.models.transformers_models import CONFIGS, plain, skip_if_old

WINDOWS = {"window_size": 32, "lact_chunk_size": 32}
NTP = {"objective": "ntp"}


def arguments(T, **settings):
    defaults = dict(output_dir="x", report_to="none", use_cpu=True, max_length=T, per_device_train_batch_size=1)
    return ReFINEConfig(**{**defaults, **settings})


def test_what_is_held_is_counted_once_and_until_it_goes():
    with Counter() as counter:
        a = torch.zeros(1000)
        b = a.view(10, 100)
        c = b + 1
        del c
        a.add_(1)
        d = torch.ones(2, 500) @ torch.ones(500, 3)
    assert counter.peaks[""] >= 8000 and counter.bytes == 4000 + 24
    assert counter.flops == 2 * 2 * 500 * 3 and float(d[0, 0]) == 500


def test_straight_lines_are_followed():
    def measure(layers, tokens):
        return {"a": 3.0 + layers * (2.0 + 5.0 * tokens), "b": 1.0 * tokens}

    found = extrapolate(measure, {"layers": 24, "tokens": 16384}, {"layers": (1, 2), "tokens": (512, 1024)})
    assert found == pytest.approx(measure(24, 16384))
    assert extrapolate(measure, {"layers": 2, "tokens": 600}, {"layers": (1, 2), "tokens": (512, 1024)}) == measure(2, 600)


def peak_of(config, args, shapes=None, **sizes):
    figures = measure_step(Blueprint(config, torch.float32), args, args.objective, shapes=shapes, **sizes)
    flops = figures.pop(FLOPS)
    return max(figures.values()), flops


def config_named(name):
    if name in CONFIGS:
        return CONFIGS[name]()
    return build(name, hidden_size=64, num_heads=2, num_hidden_layers=2).config


@pytest.mark.parametrize(("name", "settings"), [
    *((name, settings) for name in ("delta_net", "llama", "qwen3_next", "bamba")
      for settings in (NTP, {"preset": "expected", "bf16": True})),
    *((name, {"preset": "mid_training"}) for name in ("delta_net", "bamba")),
])  # fmt: skip
def test_a_step_run_for_its_shapes_needs_what_a_computed_one_does(name, settings):
    """To the byte, but where positions are drawn: prefixes are then as long as it happens, and in short texts that counts."""
    config, args = config_named(name), arguments(200, **settings)
    skip_if_old(Blueprint(config, torch.float32).on_meta())
    computed, shaped = (peak_of(config, args, shapes, tokens=200) for shapes in (None, ShapesOnly()))
    assert shaped == (pytest.approx(computed, rel=0.25) if settings.get("preset") == "mid_training" else computed)


@pytest.mark.parametrize("name", ["delta_net", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_5", "bamba"))])
def test_a_training_measured(name):
    """Within 15 % of what the process takes: weights, optimizer, gradients and activations."""
    skip_if_old(Blueprint(measured_models.config_of(name, measured_models.SMALL), torch.float32).on_meta())
    # Freed memory goes back at once, so that what is resident is what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.estimate.measured_job", name]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True, timeout=600
    )
    measured = json.loads(done.stdout.splitlines()[-1])["bytes"]
    found = estimate(measured_models.config_of(name, measured_models.LARGE), measured_models.arguments(name))
    assert found.optimizer == 2 * found.weights > 0.2 * found.total  # no part is lost in another
    assert found.total == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(("family", "settings"), [
    ("delta_net", NTP),
    ("delta_net", {"preset": "expected", "context_scores": "cached", "gradient_checkpointing": True}),
    pytest.param("lact_swiglu", {"num_generations": 2, "advantage_group": "position"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_model_of_more_layers_and_tokens_than_are_counted(family, settings):
    """Within 15 % of the whole step, computed and counted."""
    sizes = dict(vocab_size=16384, hidden_size=64, intermediate_size=128, num_heads=2, num_hidden_layers=5)
    config, args = build(family, **sizes, **(WINDOWS if family == "lact_swiglu" else {})).config, arguments(2000, **settings)
    found = estimate(config, args)
    peak, flops = peak_of(config, args, tokens=2000)
    assert found.activations == pytest.approx(peak, rel=0.15)
    assert found.flops == pytest.approx(flops, rel=0.1)


@pytest.mark.parametrize("name", ["qwen3_5", "bamba"])
def test_a_hybrid_of_more_layers_and_tokens_than_are_counted(name):
    config = measured_models.config_of(name, measured_models.SMALL | {"num_hidden_layers": 6})
    skip_if_old(Blueprint(config, torch.float32).on_meta())
    args = arguments(1500, **NTP)
    found, (peak, flops) = estimate(config, args), peak_of(config, args, tokens=1500)
    assert found.activations == pytest.approx(peak, rel=0.15)
    assert found.flops == pytest.approx(flops, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [NTP, {"preset": "expected"}, {"preset": "context"}, {"preset": "mid_training"},
                                      {**NTP, "gradient_checkpointing": True}, {**NTP, "segment_tokens": 1024}])  # fmt: skip
@pytest.mark.parametrize("name", ["refine-nsp/tiny-delta-net", "refine-nsp/tiny-gated-deltanet", "refine-nsp/tiny-lact"])
def test_the_shipped_models(name, settings):
    config, args = load_config(name), arguments(8192, **settings)
    sizes = {"segment": 1024, "segments": 8} if "segment_tokens" in settings else {"tokens": 8192}
    peak, flops = peak_of(config, args, **sizes)
    found = estimate(config, args)
    # More than is taken is the safe side: LaCT with checkpointing is estimated 17 % too high since it takes 4 % less than it did.
    assert 0.85 * peak <= found.activations <= 1.2 * peak
    assert found.flops == pytest.approx(flops, rel=0.1)


def test_parts_that_are_arithmetic():
    config, args = load_config("refine-nsp/tiny-delta-net"), arguments(512, objective="ntp", gradient_accumulation_steps=2)
    one, shared = estimate(config, args), estimate(config, args, processes=4, sharded=True)
    assert one.optimizer == 2 * one.weights == 2 * one.gradients and one.tokens == 1024 and shared.tokens == 4096
    assert shared.optimizer == one.optimizer / 4 and shared.weights == one.weights / 4 + one.weights / config.num_hidden_layers


def test_steps_with_adapters_are_counted():
    """Rollouts too, which call the model inside PEFT's."""
    config, args = load_config("refine-nsp/tiny-delta-net"), arguments(256)
    adapters = partial(with_adapters, arguments=ModelArguments(use_peft=True), seed=0)
    found, whole = estimate(config, args, adapters=adapters), estimate(config, args)
    assert found.uncounted is None and found.optimizer < whole.optimizer / 3
    assert found.activations == pytest.approx(whole.activations, rel=0.3) and found.flops > 0


def test_layers_that_differ():
    for name, few, more in (
        ("qwen3_next", [0, 1], {2: 1}), ("bamba", [0, 1], {2: 1}), ("nemotron_h", [0, 1, 2, 3], {}), ("llama", [0], {1: 1}),
    ):  # fmt: skip
        blueprint = Blueprint(CONFIGS[name](), torch.float32)
        model, kept = blueprint.on_meta(), blueprint.on_meta(few[-1:])
        assert few_layers(kinds_of_layers(model)) == (few, more)
        assert layer_kinds(kept.config) == layer_kinds(model.config)[few[-1] : few[-1] + 1]


# The sizes of the checkpoints that docs/models_and_states.md names.
NEMOTRON = dict(
    hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", hidden_size=2688, n_routed_experts=128,
    num_experts_per_tok=6, moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712, num_key_value_heads=2,
    mamba_num_heads=64, mamba_head_dim=64, ssm_state_size=128, n_groups=8,
)  # fmt: skip
QWEN = dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=2,
            linear_num_value_heads=16, tie_word_embeddings=True)  # fmt: skip
NAMED = {
    "Qwen3-Next-80B": (Qwen3NextConfig, {}, 80e9),
    "Kimi-Linear-48B": (KimiLinearConfig, {}, 49e9),
    "Nemotron-3-Nano-30B": (NemotronHConfig, NEMOTRON, 31.6e9),
    "Qwen3.5-2B": (Qwen3_5TextConfig, QWEN, 1.9e9),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if "Qwen" in n else pytest.mark.slow) for n in NAMED])
def test_a_model_of_any_size(name):
    """In a process that may not have 16 GB, weights of 300 GB."""
    make, sizes, parameters = NAMED[name]
    lines = []
    found = estimate(make(**sizes), arguments(16384, **NTP), dtype=torch.bfloat16, progress=lines.append)
    assert found.uncounted is None and found.weights == pytest.approx(2 * parameters, rel=0.05)
    assert found.activations > 1e9 and found.flops > 6 * 1e9 * 16384
    assert lines and f"of {len(lines)}" in lines[-1]


def test_what_cannot_be_counted_is_named(capsys, monkeypatch):
    def fails(*args, **kwargs):
        raise NotImplementedError("no rule for aten::strange")

    monkeypatch.setattr(small_steps, "measure_step", fails)
    assert main(["estimate", "refine-nsp/tiny-delta-net", "--max_length", "256", "--device", "rtx4090"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "optimizer state" in out and "in all without activations" in out and "seconds a step" not in out
    assert "warning: activations and time are missing" in out and "no rule for aten::strange" in out


def test_weights_are_what_the_trainer_loads():
    config = CONFIGS["qwen3_5"]()
    plain, mixed = arguments(512), arguments(512, bf16=True)
    assert dtype_of(config, plain) == torch.float32  # where nothing is known of the checkpoint
    config.dtype = torch.bfloat16
    assert dtype_of(config, plain) == dtype_of(config, mixed, "bfloat16") == torch.bfloat16
    assert dtype_of(config, mixed) == dtype_of(config, plain, "float32") == torch.float32
    assert "weights in float32 (autocast keeps them so)" in notes_of(config, mixed, None, torch.float32)


def test_who_waits_is_told():
    lines = []
    for every in (60.0, 0.0):
        Patience(lines.append, every)("counting")
    assert lines == ["counting"]


def test_the_command(capsys):
    assert (
        main(["estimate", "refine-nsp/tiny-delta-net", "--max_length", "256", "--objective", "ntp", "--device", "rtx4090"]) == 0
    )
    out = capsys.readouterr().out
    assert "optimizer state" in out and "seconds a step" in out and "warning" not in out
    assert "weights in float32 (the configuration's)" in " ".join(out.split())
    with pytest.raises(RefineError, match="known are b200"):
        device_named("h1000")


@pytest.mark.filterwarnings("ignore:.*has no tokenizer")
def test_transfer_is_counted_layer_by_layer(tmp_path):
    """Within 15 % of the whole step, computed and counted; the memory alone has gradients and an optimizer's state."""
    source = SOURCES["llama"]()
    source.num_hidden_layers = 5
    teacher = source_of(source)
    teacher.save_pretrained(tmp_path / "teacher")
    convert(tmp_path / "teacher", tmp_path / "student", MEMORY)
    args = arguments(2000, objective="transfer", teacher=str(tmp_path / "teacher"))
    found = estimate(load_config(tmp_path / "student"), args)
    student = load_model(tmp_path / "student")
    check_memory(student, args, own_optimizer=False)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert found.uncounted is None and found.optimizer == 2 * 8 * trained and found.teacher > 0
    phase = Transfer(args.nsp, teacher_of(load_model(tmp_path / "teacher")))
    batch = MicroBatch(Batch.of(torch.randint(0, 64, (1, 2000))))
    batch.totals = phase.count(batch)
    with Counter() as counter:
        loss = phase.loss(student, batch)[0]
        with part("backward"):
            loss.backward()
    assert found.activations == pytest.approx(max(counter.peaks.values()), rel=0.15)
    assert found.flops == pytest.approx(counter.flops, rel=0.1)


@pytest.mark.filterwarnings("ignore:.*has no tokenizer")
def test_a_teacher_is_counted_with_its_own_layers_and_weights(tmp_path):
    teacher = plain("llama", dtype=torch.bfloat16)
    teacher.save_pretrained(tmp_path / "teacher")
    config = build("lact_swiglu", num_hidden_layers=4).config
    distills = {"objective": "distill", "teacher": str(tmp_path / "teacher")}
    ntp = estimate(config, arguments(200, **NTP))
    online, kept, floor = (
        estimate(config, arguments(200, **distills, **more))
        for more in ({}, {"context_scores": "teacher"}, {"lambda_context": 0.0})
    )
    assert online.uncounted is None
    assert online.teacher == sum(2 * p.numel() for p in teacher.parameters()) == online.weights - ntp.weights
    assert online.flops > kept.flops == floor.flops > ntp.flops
    # Twice the layers of the teacher are twice its passes.
    deeper = teacher.config
    deeper.num_hidden_layers = 4
    type(teacher)(deeper).to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    again = estimate(config, arguments(200, **distills, context_scores="teacher"))
    assert again.flops > kept.flops and again.activations == pytest.approx(kept.activations, rel=0.2)
