"""A GGUF file is converted to what transformers reads from it; each thing that its reading would not tell is refused by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from refine_nsp.cli import main
from refine_nsp.errors import RefineError
from refine_nsp.models.convert import MemorySettings, convert
from refine_nsp.models.load import load
from tests.models.test_convert import source_of, tokens
from tests.models.transformers_models import COMMON

WINDOW = 12
MEMORY = MemorySettings(window_size=WINDOW, lact_chunk_size=16, num_lact_heads=2)
ARGUMENTS = ["--window_size", "12", "--num_lact_heads", "2"]
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers.": "blk.",
}  # fmt: skip


def write(path: Path, architecture: str = "llama", **more: float | str) -> None:
    """A tiny Llama as llama.cpp's own converter writes one, quantised where rows are long enough."""
    gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
    config = LlamaConfig(**COMMON | {"intermediate_size": 64}, num_hidden_layers=2, tie_word_embeddings=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500.0)
    writer.add_rope_dimension_count(int(more.pop("dimension_count", 8)))
    writer.add_vocab_size(64)
    writer.add_string("general.license", "apache-2.0")
    for key, value in more.items():
        name = f"{architecture}.{key.replace('__', '.')}"
        writer.add_string(name, value) if isinstance(value, str) else writer.add_uint32(name, int(value))
    writer.add_tokenizer_model("gpt2")
    words = [*map(chr, range(33, 94)), "AB"]
    writer.add_token_list(["<pad>", "<s>", *words])
    writer.add_token_types([3, 3, *[1] * len(words)])
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(5)
    for name, weight in source_of(config, torch.float32).state_dict().items():
        if name == "lm_head.weight":
            continue
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:  # llama.cpp's rotary pairs are neighbours
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        for ours, theirs in PARTS.items():
            name = name.replace(ours, theirs)
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_it_equals_what_transformers_reads(tmp_path):
    write(tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", tmp_path / "new", MEMORY)
    model, tokenizer = load(tmp_path / "new")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).eval()
    assert theirs.config.rope_parameters["rope_theta"] == model.config.rope_theta == 500.0
    ids = tokens()[:, :WINDOW]
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert model.config.eos_token_id == 5 and model.config.tie_word_embeddings and model.dtype == torch.float32
    assert (
        tokenizer("CAB").input_ids[-2:] == [36, 63]
        and "quantization_config" not in (tmp_path / "new" / "config.json").read_text()
    )
    assert "license: apache-2.0" in (tmp_path / "new" / "README.md").read_text()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (dict(architecture="gemma2"), "holds a model of architecture 'gemma2'"),
        (dict(architecture="nobodys"), "holds a model of architecture 'nobodys'; expected one of llama, qwen2"),
        (dict(rope__scaling__type="yarn"), r"scaled rotary positions \(yarn\)"),
        (dict(expert_count=4), "4 experts"),
        (dict(dimension_count=4), "rope.dimension_count=4"),
    ],
    ids=["architecture", "unknown", "scaled", "experts", "partial"],
)
def test_what_differs_is_refused_by_name(more, words, tmp_path):
    write(tmp_path / "tiny.gguf", **more)
    with pytest.raises(RefineError, match=words) as error:
        convert(tmp_path / "tiny.gguf", tmp_path / "new", MEMORY)
    assert "\n" not in str(error.value) and not (tmp_path / "new").exists()


def test_a_damaged_file(tmp_path):
    write(tmp_path / "tiny.gguf")
    (tmp_path / "half.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes()[:5000])
    (tmp_path / "none.gguf").write_bytes(b"no model")
    for name in ("half.gguf", "none.gguf"):
        with pytest.raises(RefineError, match="damaged or no GGUF file"):
            convert(tmp_path / name, tmp_path / "new", MEMORY)
    with pytest.raises(RefineError, match=r"name one of them, such as .*half\.gguf"):
        convert(tmp_path, tmp_path / "new", MEMORY)


def test_without_the_package_the_error_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["convert", str(tmp_path / "tiny.gguf"), str(tmp_path / "new"), *ARGUMENTS]) == 1
    assert "pip install 'refine-nsp[gguf]'" in capsys.readouterr().err
