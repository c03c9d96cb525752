"""A converted model is its source within a window, and transformers' own sliding-window attention beyond it (float64 throughout)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import refine_nsp
from refine_nsp.cli import main
from refine_nsp.errors import RefineError
from refine_nsp.models.convert import MemorySettings, convert
from refine_nsp.models.load import load, load_model, load_tokenizer
from tests.hub import hub
from tests.models.transformers_models import COMMON, float64_throughout

pytestmark = pytest.mark.filterwarnings("ignore:.*has no tokenizer")
WINDOW, T = 12, 60
MEMORY = MemorySettings(window_size=WINDOW, lact_chunk_size=16, num_lact_heads=2)
TIGHT = dict(rtol=1e-12, atol=1e-12)
LAYERS = dict(num_hidden_layers=2, max_position_embeddings=128)
SOURCES = {
    "llama": lambda: LlamaConfig(**COMMON, **LAYERS, tie_word_embeddings=True, rms_norm_eps=1e-4),
    "mistral": lambda: MistralConfig(**COMMON, **LAYERS, sliding_window=None, rope_theta=500.0),
    "qwen2": lambda: Qwen2Config(**COMMON | {"num_key_value_heads": 1}, **LAYERS),
    "all_heads": lambda: LlamaConfig(**COMMON | {"num_key_value_heads": 4}, **LAYERS),
}


def source_of(config: PreTrainedConfig, dtype: torch.dtype = torch.float64) -> Any:
    """A source in eval mode, every parameter moved off its initial value."""
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def saved(folder: Path, config: PreTrainedConfig | None = None, dtype: torch.dtype = torch.float64) -> Path:
    source_of(config or SOURCES["llama"](), dtype).save_pretrained(folder)
    return folder


def with_our_tables(model: Any) -> Any:
    """transformers makes the frequencies of its rotary positions in float32."""
    rotary, config = model.model.rotary_emb, model.config
    width = config.hidden_size // config.num_attention_heads
    rotary.inv_freq = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    return model


def with_window(model: Any) -> Any:
    """transformers' own attention in a window, with the same weights."""
    fields = model.config.to_dict()
    if model.config.model_type == "qwen2":
        config: PreTrainedConfig = Qwen2Config(
            **fields | dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=0, layer_types=None)
        )
    else:
        config = MistralConfig(
            **{k: v for k, v in fields.items() if k not in ("model_type", "sliding_window")}, sliding_window=WINDOW
        )
    config._attn_implementation = "eager"
    kind = type(model) if config.model_type == "qwen2" else MistralForCausalLM
    windowed = kind(config).to(torch.float64).eval()
    windowed.load_state_dict(model.state_dict())
    return with_our_tables(windowed)


def tokens(rows: int = 2, length: int = T, seed: int = 1) -> torch.Tensor:
    return torch.randint(4, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def converted(tmp_path):
    """A converted Llama, and the same with a memory that is read."""
    convert(saved(tmp_path / "source"), tmp_path / "new", MEMORY)
    return load_model(tmp_path / "new"), awake(load_model(tmp_path / "new"))


@torch.no_grad()
def awake(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "ttt_scale_proj" in name:
            parameter.normal_(generator=torch.Generator().manual_seed(2))
        if name.endswith("lr_proj.bias"):
            parameter.fill_(4.0)
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", SOURCES)
def test_it_equals_its_source_in_the_window_and_window_attention_beyond(kind, tmp_path):
    source = source_of(SOURCES[kind]())
    source.save_pretrained(tmp_path / "source")
    made = convert(tmp_path / "source", tmp_path / "new", MEMORY)
    model, ids = load_model(tmp_path / "new"), tokens()
    assert model.dtype == torch.float64 and model.config.model_type == "lact_swiglu"
    assert made.parameters == sum(p.numel() for p in model.parameters())
    got = model(ids, use_cache=False).logits
    with float64_throughout():
        torch.testing.assert_close(got[:, :WINDOW], source(ids[:, :WINDOW]).logits, rtol=1e-6, atol=1e-6)
        full = with_our_tables(source)(ids).logits
        torch.testing.assert_close(got[:, :WINDOW], full[:, :WINDOW], **TIGHT)
        assert not torch.allclose(got[:, WINDOW:], full[:, WINDOW:], atol=1e-3)
        torch.testing.assert_close(got, with_window(source)(ids).logits, **TIGHT)


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        dict(w0_w2_low_rank=4, fw_init_gain=0.3),
        dict(use_muon=True, muon_dtype="float32"),
        dict(use_momentum=False, ttt_prenorm=True),
        dict(inter_multi=1.5),
        dict(qkv_silu=False),
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_every_kind_of_memory_begins_unread(fields, tmp_path):
    settings = MemorySettings(**dict(window_size=WINDOW, lact_chunk_size=16, num_lact_heads=2) | fields)
    source = source_of(SOURCES["llama"]())
    source.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "new", settings)
    model, ids = load_model(tmp_path / "new"), tokens()
    assert all(getattr(model.config, name) == value for name, value in fields.items())
    silent = model(ids, use_cache=False).logits
    with float64_throughout():
        torch.testing.assert_close(silent, with_window(source)(ids).logits, **TIGHT)
    assert not torch.allclose(awake(model)(ids, use_cache=False).logits[:, 32:], silent[:, 32:], atol=1e-3)


def test_w1_is_taught_at_the_rate_asked_for_and_the_others_at_lacts(tmp_path):
    settings = MemorySettings(window_size=WINDOW, lact_chunk_size=16, num_lact_heads=2, w1_learning_rate=10.0)
    convert(saved(tmp_path / "source"), tmp_path / "new", settings)
    mixer = load_model(tmp_path / "new").model.layers[0].attn
    rates = mixer._fast_inputs(*inputs_of(mixer))[1].lr.flatten(0, 2)
    torch.testing.assert_close(rates.mean(0), torch.tensor([1e-3, 10.0, 1e-3], dtype=rates.dtype), rtol=0.1, atol=0)


def inputs_of(mixer):
    x = torch.randn(1, 8, mixer.config.hidden_size, dtype=mixer.w1.dtype, generator=torch.Generator().manual_seed(0)) / 8
    return x, *mixer._project(x, torch.zeros(1, dtype=torch.long))


def test_new_weights_begin_as_a_lact_models(tmp_path):
    convert(saved(tmp_path / "source"), tmp_path / "new", MEMORY)
    convert(tmp_path / "source", tmp_path / "again", MEMORY)
    convert(
        tmp_path / "source", tmp_path / "other", MemorySettings(window_size=WINDOW, lact_chunk_size=16, num_lact_heads=2, seed=1)
    )
    one, again, other = (load_file(tmp_path / name / "model.safetensors") for name in ("new", "again", "other"))
    torch.testing.assert_close(one, again, rtol=0, atol=0)
    first, second = (one[f"model.layers.{i}.attn.w0"] for i in (0, 1))
    assert first.std().item() == pytest.approx(16**-0.5, rel=0.15) and not torch.equal(first, second)
    assert not torch.equal(first, other["model.layers.0.attn.w0"])
    assert not one["model.layers.0.attn.ttt_scale_proj.weight"].any() and not one["model.layers.0.attn.ttt_scale_proj.bias"].any()
    assert one["model.layers.0.attn.qk_scale"].eq(1).all() and one["model.layers.0.attn.lr_proj.weight"].any()
    assert "lm_head.weight" not in one  # tied


def test_the_read_out_learns_from_the_first_step(converted):
    silent, read = converted
    ids = tokens()
    silent(ids, labels=ids).loss.backward()
    for layer in silent.model.layers:
        assert layer.attn.ttt_scale_proj.weight.grad.abs().max() > 1e-6
        assert not layer.attn.w1.grad.any()  # behind a scale of zero, until the scale has moved
    read(ids, labels=ids).loss.backward()
    assert all(layer.attn.w1.grad.any() for layer in read.model.layers)


@torch.no_grad()
def test_states_snapshots_and_padding_are_exact(converted):
    for model in converted:
        ids = tokens()
        full = model(ids, use_cache=False).logits
        cache = model(ids[:, :40]).past_key_values
        for t in range(40, T):
            step = model(ids[:, t : t + 1], past_key_values=cache).logits
            torch.testing.assert_close(step[:, 0], full[:, t], rtol=1e-9, atol=1e-11)
        out = model(ids, snapshot_positions=torch.tensor([[9, 35], [20, 47]]), use_cache=False)
        for row, (b, t) in enumerate([(0, 9), (0, 35), (1, 20), (1, 47)]):
            rest = model(ids[b : b + 1, t + 1 :], past_key_values=out.snapshots.index(torch.tensor([row])), use_cache=False)
            torch.testing.assert_close(rest.logits[0], full[b, t + 1 :], rtol=1e-9, atol=1e-11)
        padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], 1)
        mask = torch.cat([torch.zeros(2, 5), torch.ones(2, T)], 1).long()
        torch.testing.assert_close(model(padded, attention_mask=mask, use_cache=False).logits[:, 5:], full, rtol=1e-9, atol=1e-11)


def test_it_is_saved_loaded_and_generated_from(tmp_path):
    tokenizer = load_tokenizer("refine-nsp/tiny-delta-net")
    source = saved(tmp_path / "source", LlamaConfig(**COMMON | {"vocab_size": len(tokenizer)}, **LAYERS), torch.bfloat16)
    tokenizer.save_pretrained(source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 3, "max_new_tokens": 7, "do_sample": False}))
    (source / "code.py").write_text("raise SystemExit")
    argv = [
        "convert",
        str(source),
        str(tmp_path / "new"),
        "--window_size",
        "12",
        "--lact_chunk_size",
        "8",
        "--num_lact_heads",
        "2",
    ]
    assert main(argv) == 0 and not list(tmp_path.glob("*.tmp"))
    model, own = load(tmp_path / "new")
    assert model.dtype == torch.bfloat16 and model.generation_config.max_new_tokens == 7 and model.config.eos_token_id == 3
    assert own("some text").input_ids == tokenizer("some text").input_ids
    made = model.generate(tokens(1, 9), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert made.shape == (1, 29)
    model.save_pretrained(tmp_path / "twice")
    torch.testing.assert_close(load_model(tmp_path / "twice").state_dict(), model.state_dict(), rtol=0, atol=0)
    text = (tmp_path / "new" / "README.md").read_text()
    assert "`source` (llama)" in text and "has not been trained" in text and "| `window_size` | 12 |" in text
    assert not (tmp_path / "new" / "code.py").exists()


def test_the_memory_is_centred_on_a_text(tmp_path, capsys):
    tokenizer = load_tokenizer("refine-nsp/tiny-delta-net")
    config = LlamaConfig(**COMMON | {"vocab_size": len(tokenizer)}, **LAYERS)
    source = saved(tmp_path / "source", config)
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"row {i} of a text " * (9 + i)}) + "\n" for i in range(20))
    )
    argv = ["convert", str(source), str(tmp_path / "new"), "--lact_chunk_size", "8", "--num_lact_heads", "2"]
    argv += ["--window_size", "12", "--centre_on", str(tmp_path / "texts.jsonl")]
    assert main(argv) != 0 and not list(tmp_path.glob("new*"))
    assert "has no tokenizer" in capsys.readouterr().err
    tokenizer.save_pretrained(source)
    assert main(argv) == 0 and not list(tmp_path.glob("*.tmp"))
    model = load_model(tmp_path / "new")
    rows = [torch.tensor([tokenizer(f"row {i} of a text " * (9 + i)).input_ids[:128]]) for i in range(16)]
    with torch.no_grad():
        inputs = [model.model.layers[0].attn_norm(model.model.embeddings(row)) for row in rows]
        q, k, _ = torch.cat([model.model.layers[0].attn.qkv(x)[0] for x in inputs]).chunk(3, -1)
    offset = model.model.layers[0].attn.qk_offset
    torch.testing.assert_close(offset, -torch.stack([q.mean(0), k.mean(0)], 1), **TIGHT)
    assert model.model.layers[1].attn.qk_offset.abs().min() > 0  # of another layer's own input
    convert(source, tmp_path / "plain", MEMORY)
    ids = tokens()
    torch.testing.assert_close(
        model(ids, use_cache=False).logits, load_model(tmp_path / "plain")(ids, use_cache=False).logits, **TIGHT
    )
    assert "| `centre_on` | texts.jsonl |" in (tmp_path / "new" / "README.md").read_text()


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_too_short_to_centre_on_is_refused(text, tmp_path):
    source = saved(tmp_path / "source", LlamaConfig(**COMMON | {"vocab_size": 1024}, **LAYERS))
    load_tokenizer("refine-nsp/tiny-delta-net").save_pretrained(source)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": text}) + "\n")
    settings = MemorySettings(window_size=WINDOW, lact_chunk_size=16, num_lact_heads=2, centre_on=str(tmp_path / "texts.jsonl"))
    with pytest.raises(RefineError, match="no text of two tokens"):
        convert(source, tmp_path / "new", settings)
    assert not list(tmp_path.glob("new*"))


def test_a_model_in_shards_and_another_dtype(tmp_path):
    model = source_of(SOURCES["qwen2"](), torch.float32)
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    model.save_pretrained(tmp_path / "whole")
    for name in ("source", "whole"):
        convert(tmp_path / name, tmp_path / f"{name}_new", MemorySettings(window_size=8, num_lact_heads=2, dtype="float64"))
    weights = [load_file(tmp_path / f"{name}_new" / "model.safetensors") for name in ("source", "whole")]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert all(weight.dtype == torch.float64 for weight in weights[0].values())
    sorted((tmp_path / "source").glob("*.safetensors"))[1].unlink()
    with pytest.raises(RefineError, match="lacks model-00002-of-"):
        convert(tmp_path / "source", tmp_path / "third", MemorySettings(window_size=8, num_lact_heads=2))


LINEAR = {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}
PARTIAL = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}
REFUSED = {
    "qwen3": (Qwen3Config, dict(head_dim=8), "norms of q and k in each head"),
    "scaled": (LlamaConfig, dict(rope_parameters=LINEAR), "rope_type='linear'"),
    "partial": (LlamaConfig, dict(rope_parameters=PARTIAL), "partial_rotary_factor=0.5"),
    "activation": (LlamaConfig, dict(hidden_act="gelu"), "hidden_act='gelu'"),
    "output_bias": (LlamaConfig, dict(attention_bias=True), "attention_bias=True"),
    "mlp_bias": (LlamaConfig, dict(mlp_bias=True), "mlp_bias=True"),
    "head_size": (LlamaConfig, dict(head_dim=16), "head_dim=16, 4 heads"),
    "soft_caps": (Gemma2Config, dict(head_dim=8), "attn_logit_softcapping=50.0"),
    "experts": (MixtralConfig, dict(), "num_local_experts=8"),
    "no_rotary": (GPT2Config, dict(), "no rotary positions"),
    "sliding": (MistralConfig, dict(sliding_window=8), "sliding window of 8 tokens itself"),
    "too_long": (LlamaConfig, dict(max_position_embeddings=8), "longer than the 8 tokens"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_differs_is_refused_by_name(kind, tmp_path, capsys):
    """By the configuration alone, before any weight is looked at."""
    config_class, fields, words = REFUSED[kind]
    config_class(**COMMON | LAYERS | fields).save_pretrained(tmp_path / "source")
    save_file({"model.embed_tokens.weight": torch.zeros(64, 32)}, tmp_path / "source" / "model.safetensors")
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "new"), "--window_size", "12", "--num_lact_heads", "2"]) == 1
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message and not (tmp_path / "new").exists()


def test_sources_that_are_none(tmp_path):
    source, out = saved(tmp_path / "source"), tmp_path / "new"

    def refused(words: str, where: Path | str = source, settings: MemorySettings = MEMORY) -> None:
        with pytest.raises(RefineError, match=words) as error:
            convert(where, out, settings)
        assert "\n" not in str(error.value) and not out.exists()

    weights = load_file(source / "model.safetensors")
    for broken, words in (
        ({k: v for k, v in weights.items() if "layers.1.mlp.up" not in k}, "1 missing: model.layers.1.mlp.up_proj.weight"),
        (
            weights | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)},
            "1 unknown: model.layers.0.self_attn.q_norm.weight",
        ),
        (weights | {"model.norm.weight": torch.ones(31)}, r"1 of another shape: model.norm.weight \[31\] for \[32\]"),
        (weights | {"lm_head.weight": torch.ones(64, 32)}, "its lm_head.weight differs"),
        (weights | {"model.norm.weight": torch.full((32,), torch.nan).double()}, "model.norm.weight is not finite"),
    ):
        save_file(broken, source / "model.safetensors")
        refused(words)
    (source / "model.safetensors").write_bytes(b"no weights")
    refused("cannot read the weights")
    save_file(weights, source / "model.safetensors")
    refused("multiple of num_lact_heads", settings=MemorySettings(window_size=8, num_lact_heads=5))
    refused("is a fast-weight model already", "refine-nsp/tiny-lact")
    refused("no file", tmp_path / "none.gguf")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused("only pickled weights")
    for fields, words in (
        (dict(lact_chunk_size=0), "lact_chunk_size must be at least 1"),
        (dict(w0_w2_low_rank=0), "w0_w2_low_rank"),
        (dict(muon_dtype="float32"), "needs use_muon"),
        (dict(dtype="int8"), "dtype"),
    ):
        with pytest.raises(RefineError, match=words):
            MemorySettings(**fields)
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(RefineError, match="is not empty"):
        convert(source, out, MEMORY)


def test_old_tables_and_a_head_like_the_embeddings_are_no_obstacle(tmp_path):
    source = saved(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
    }
    save_file(weights | more, source / "model.safetensors")
    convert(source, tmp_path / "new", MEMORY)
    assert load_model(tmp_path / "new").config.tie_word_embeddings


PROGRAM = """
import json, sys
import refine_nsp
from refine_nsp.cli import main
codes = [main(["convert", name, f"new{i}", "--window_size", "12", "--num_lact_heads", "2"]) for i, name in enumerate(sys.argv[1:])]
print(json.dumps(codes))
"""


def test_a_name_on_the_hub(tmp_path):
    """Downloaded without what is not needed; a process of its own, since the hub's address is read at import."""
    source = saved(tmp_path / "source", SOURCES["mistral"](), torch.float32)
    load_tokenizer("refine-nsp/tiny-delta-net").save_pretrained(source)
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    with hub({"org/model": source}) as address:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": str(Path(refine_nsp.__file__).parents[1])}
        command = [sys.executable, "-c", PROGRAM, "org/model", "org/gone"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 1] and "org/gone is not on the hub" in done.stderr, done.stderr
    assert "base_model: org/model" in (tmp_path / "new0" / "README.md").read_text()
    assert load(tmp_path / "new0")[0].config.window_size == 12
    assert not list((tmp_path / "cache").rglob("pytorch_model.bin")) and not (tmp_path / "new1").exists()
