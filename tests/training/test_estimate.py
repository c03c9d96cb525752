"""The estimate against what steps really need: counted whole, and as the memory of a process."""

import math

import pytest
import torch

from refine_nsp.cli import main
from refine_nsp.errors import RefineError
from refine_nsp.models.load import load_config
from refine_nsp.training import ReFINEConfig
from refine_nsp.training.estimate import FLOPS, device_named, estimate, layer_kinds, measure_step, period_of, shortened
from refine_nsp.training.simulation import counted, extrapolate
from tests.models.families import build
from tests.models.transformers_models import CONFIGS

WINDOWS = {"window_size": 32, "lact_chunk_size": 32}
NTP = {"objective": "ntp"}


def arguments(T, **settings):
    defaults = dict(output_dir="x", report_to="none", use_cpu=True, max_length=T, per_device_train_batch_size=1)
    return ReFINEConfig(**{**defaults, **settings})


def test_what_is_held_is_counted_once_and_until_it_goes():
    with counted() as counter:
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


def peak_of(config, args, **sizes):
    figures = measure_step(config, args, args.objective, None, None, **sizes)
    flops = figures.pop(FLOPS)
    return max(figures.values()), flops


@pytest.mark.parametrize(("family", "settings"), [
    ("delta_net", NTP),
    ("delta_net", {"preset": "exact", "context_scores": "cached", "gradient_checkpointing": True}),
    ("lact_swiglu", {"num_generations": 2, "advantage_group": "position"}),
])  # fmt: skip
def test_a_model_of_more_layers_and_tokens_than_are_counted(family, settings):
    """Within 15 % of the whole step, counted."""
    sizes = dict(vocab_size=16384, hidden_size=64, intermediate_size=128, num_heads=2, num_hidden_layers=5)
    config, args = build(family, **sizes, **(WINDOWS if family == "lact_swiglu" else {})).config, arguments(2000, **settings)
    found = estimate(config, args)
    peak, flops = peak_of(config, args, layers=5, rows=1, tokens=2000)
    assert found.activations == pytest.approx(peak, rel=0.15)
    assert found.flops == pytest.approx(flops, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [NTP, {"preset": "exact"}, {"preset": "context"}, {"preset": "mid_training"},
                                      {**NTP, "gradient_checkpointing": True}, {**NTP, "segment_tokens": 1024}])  # fmt: skip
@pytest.mark.parametrize("name", ["refine-nsp/tiny-delta-net", "refine-nsp/tiny-gated-deltanet", "refine-nsp/tiny-lact"])
def test_the_shipped_models(name, settings):
    config, args = load_config(name), arguments(8192, **settings)
    sizes = {"segment": 1024, "segments": 8} if "segment_tokens" in settings else {"tokens": 8192}
    peak, flops = peak_of(config, args, layers=config.num_hidden_layers, rows=1, **sizes)
    found = estimate(config, args)
    assert found.activations == pytest.approx(peak, rel=0.15)
    assert found.flops == pytest.approx(flops, rel=0.1)


def test_parts_that_are_arithmetic():
    config, args = load_config("refine-nsp/tiny-delta-net"), arguments(512, objective="ntp", gradient_accumulation_steps=2)
    one, shared = estimate(config, args), estimate(config, args, processes=4, sharded=True)
    assert one.optimizer == 2 * one.weights == 2 * one.gradients and one.tokens == 1024 and shared.tokens == 4096
    assert shared.optimizer == one.optimizer / 4 and shared.weights == one.weights / 4 + one.weights / config.num_hidden_layers


def test_layers_that_differ():
    for name, period in (("qwen3_next", 2), ("bamba", 2), ("nemotron_h", 4), ("llama", 1)):
        config = CONFIGS[name]()
        kinds = layer_kinds(config)
        assert period_of(kinds) == period
        assert layer_kinds(shortened(config, 1)) == kinds[:1]
    found = estimate(CONFIGS["qwen3_5"](), arguments(256, objective="ntp"))
    assert found.activations > 0 and math.isfinite(found.flops)


def test_the_command(capsys):
    assert (
        main(["estimate", "refine-nsp/tiny-delta-net", "--max_length", "256", "--objective", "ntp", "--device", "rtx4090"]) == 0
    )
    out = capsys.readouterr().out
    assert "optimizer state" in out and "seconds a step" in out and "warning" not in out
    with pytest.raises(RefineError, match="known are b200"):
        device_named("h1000")
