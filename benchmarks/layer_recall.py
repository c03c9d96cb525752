"""Ask how soon the memory of one layer learns to recall a passage that lies beyond the window, for several kinds of memory.

    python benchmarks/layer_recall.py --teacher SOURCE --novels novels.parquet --layers 8 20

SOURCE is an attention model as `refine-nsp convert` takes it (a folder of a Llama). Rows of 1,024 tokens hold a passage twice, more than
a window apart. On the second reading the teacher's attention brings back values from the first: its output over far keys, without the
first two (sinks, which hold no text), is what a layer's memory is trained to give, on the teacher's own inputs and on these tokens only.
Then on held-out rows the first reading is replaced by other text, in the memory's input alone: what changes in its output is what it
recalled of the passage. `recalled` is 1 - |changed - wanted|^2 / |wanted|^2, wanted the teacher's output over the passage's keys, and
`cosine` the angle between the two. Nothing goes through the depth, so a kind of memory takes seconds; it says what one layer can begin to
learn, not what a whole model recalls.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from refine_nsp.models.attention_source import AttentionSource
from refine_nsp.models.convert import MemorySettings, lact_config, new_weights
from refine_nsp.models.lact import LaCTForCausalLM, LaCTMixer
from refine_nsp.models.safetensors_source import open_model
from refine_nsp.ops.lact import lact
from refine_nsp.ops.rotary import apply_rotary, rotary_tables
from refine_nsp.report.tables import Table

T, W = 1024, 256
SINKS = 2
KINDS: dict[str, dict[str, object]] = {
    "as published": {},
    "no SiLU": {"qkv_silu": False},
    "no SiLU, w1 at 1": {"qkv_silu": False, "w1_learning_rate": 1.0},
    "no SiLU, w1 at 10": {"qkv_silu": False, "w1_learning_rate": 10.0},
    "SiLU, w1 at 10": {"w1_learning_rate": 10.0},
    "no SiLU, w1 at 10, thrice as wide": {"qkv_silu": False, "w1_learning_rate": 10.0, "inter_multi": 3.0},
    "no SiLU, w1 at 1, centred": {"qkv_silu": False, "w1_learning_rate": 1.0, "centred": True},
    "no SiLU, w1 at 1, centred, 9 heads, thrice as wide": {
        "qkv_silu": False,
        "w1_learning_rate": 1.0,
        "centred": True,
        "num_lact_heads": 9,
        "inter_multi": 3.0,
    },
    "no SiLU, Muon": {"qkv_silu": False, "use_muon": True, "muon_dtype": "float32"},
}


@dataclass(frozen=True)
class Rows:
    """Hold tokens [n, T], where the passage stands for the first and for the second time, and its length."""

    ids: Tensor
    spans: tuple[tuple[int, int, int], ...]

    def second(self) -> Tensor:
        """Mark the second readings, but for their first tokens, which nothing announces; [n, T, 1] float."""
        mask = torch.zeros(*self.ids.shape, 1)
        for row, (_, second, length) in enumerate(self.spans):
            mask[row, second + 4 : second + length] = 1.0
        return mask


@dataclass(frozen=True)
class Layer:
    """Hold a layer's inputs [n, T, D], what far keys give [n, T, D], and what the passage's alone give."""

    inputs: Tensor
    far: Tensor
    passage: Tensor


def rows_of(novels: Sequence[str], tokenizer: object, count: int, seed: int) -> Rows:
    """Write rows of novels in which a passage of 100 to 219 tokens comes back, 280 to 479 tokens after its end."""
    drawn = random.Random(seed)

    def stretch(tokens: int) -> list[int]:
        book = drawn.choice([n for n in novels if len(n) > 8 * T])
        start = drawn.randrange(len(book) - 7 * T)
        return tokenizer(book[start : start + 7 * T], add_special_tokens=False)["input_ids"][1:][:tokens]  # type: ignore[operator]

    ids, spans = [], []
    for _ in range(count):
        before, length, gap = drawn.randrange(SINKS, 150), drawn.randrange(100, 220), drawn.randrange(280, 480)
        passage = stretch(length)
        ids.append([*stretch(before), *passage, *stretch(gap), *passage, *stretch(T)][:T])
        spans.append((before, before + length + gap, min(length, T - before - length - gap)))
    return Rows(torch.tensor(ids), tuple(spans))


@torch.no_grad()
def attention_of(teacher: LlamaForCausalLM, rows: Rows, layers: Sequence[int]) -> dict[int, Layer]:
    """Run the teacher, and compute what the layers' attention brings from far keys."""
    caught: dict[int, list[Tensor]] = {i: [] for i in layers}
    hooks = [
        teacher.model.layers[i].input_layernorm.register_forward_hook(lambda _, __, out, i=i: caught[i].append(out.float()))
        for i in layers
    ]
    for some in rows.ids.split(4):
        teacher.model(some, use_cache=False)
    for hook in hooks:
        hook.remove()
    c = teacher.config
    width = c.head_dim or c.hidden_size // c.num_attention_heads
    tables = rotary_tables(torch.arange(T)[None], width, c.rope_parameters["rope_theta"], torch.float32)
    t = torch.arange(T)
    causal = t[:, None] >= t
    far = (t[:, None] - t >= W) & (t >= SINKS)
    found = {}
    for i in layers:
        given, whole, part = torch.cat(caught[i]), [], []
        qkv = projections(teacher, i)
        for x, (first, second, length) in zip(given.split(1), rows.spans, strict=True):
            q, k, v = ((x @ w.T).unflatten(-1, (c.num_attention_heads, -1)) for w in qkv.chunk(3))
            q, k, v = apply_rotary(q, *tables).transpose(1, 2), apply_rotary(k, *tables).transpose(1, 2), v.transpose(1, 2)
            scores = (q @ k.mT / width**0.5).masked_fill(~causal, -torch.inf).softmax(-1)
            ours = torch.zeros(T, T, dtype=torch.bool)
            ours[second : second + length, first : first + length] = True
            for kept, mask in ((whole, far), (part, ours)):
                kept.append(((scores * mask) @ v).transpose(1, 2).flatten(2))
        found[i] = Layer(given, torch.cat(whole), torch.cat(part))
    return found


def projections(teacher: LlamaForCausalLM, i: int) -> Tensor:
    """Return the weights of q, k and v [3 D, D], those of k and v once for each query head."""
    attention = teacher.model.layers[i].self_attn
    heads, groups = teacher.config.num_attention_heads, teacher.config.num_key_value_heads
    k, v = (
        p.weight.float().unflatten(0, (groups, -1)).repeat_interleave(heads // groups, 0).flatten(0, 1)
        for p in (attention.k_proj, attention.v_proj)
    )
    return torch.cat([attention.q_proj.weight.float(), k, v])


def mixer_of(source: AttentionSource, teacher: LlamaForCausalLM, i: int, kind: dict[str, object], inputs: Tensor) -> LaCTMixer:
    """Make a layer's mixer as `convert` does, with a read-out that is open, since here it is all that counts.

    With `centred` in the kind it is centred on the layer's inputs [n, T, D].
    """
    given = {name: value for name, value in kind.items() if name != "centred"}
    settings = MemorySettings(window_size=W, lact_chunk_size=W, **({"num_lact_heads": 3} | given))  # type: ignore[arg-type]
    config = lact_config(source, settings)
    with torch.device("meta"):
        model = LaCTForCausalLM(config)
    mixer = LaCTMixer(config)
    weights = new_weights(model, settings, i) | {"qkv.weight": projections(teacher, i), "o_proj.weight": mixer.o_proj.weight}
    mixer.load_state_dict(weights)
    nn.init.constant_(mixer.ttt_scale_proj.bias, 0.5)
    if "centred" in kind:
        with torch.no_grad():
            mixer.qk_offset.copy_(-torch.stack(mixer.qkv(inputs[:16]).mean((0, 1)).chunk(3)[:2], 1))
    for name, parameter in mixer.named_parameters():
        parameter.requires_grad_(not name.startswith(("qkv", "o_proj")))
    return mixer


def recall(mixer: LaCTMixer, x: Tensor) -> Tensor:
    """Compute what a mixer's memory adds to attention, [n, T, D]."""
    offsets = torch.zeros(len(x), dtype=torch.long)
    q, k, v, tables = mixer._project(x, offsets)
    queries, tokens = mixer._fast_inputs(x, q, k, v, tables)
    c = mixer.config
    read, _ = lact(queries, tokens, mixer._initial_weights(), c.update_rule, c.lact_chunk_size, None, offsets)
    return (mixer.ttt_norm(read) * F.silu(mixer.ttt_scale_proj(x)).transpose(1, 2)[..., None]).transpose(1, 2).flatten(2)


def train(mixer: LaCTMixer, layer: Layer, rows: Rows, steps: int, learning_rate: float) -> None:
    """Teach a memory what far keys give on second readings, two rows a step."""
    optimizer = torch.optim.AdamW([p for p in mixer.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 10) * (1 - s / steps))
    second = rows.second()
    for step in range(steps):
        some = (torch.arange(2) + 2 * step) % len(second)
        with torch.autocast("cpu", torch.bfloat16):
            given = recall(mixer, layer.inputs[some])
        wanted = layer.far[some] * second[some]
        loss = (given.float() * second[some] - wanted).square().sum() / wanted.square().sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(mixer.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def measure(mixer: LaCTMixer, layer: Layer, rows: Rows) -> tuple[float, float, float]:
    """Return the share of far attention explained on second readings, the share of the passage recalled, and the cosine of that."""
    second, other = rows.second(), layer.inputs.clone()
    for row, (first, _, length) in enumerate(rows.spans):
        other[row, first : first + length] = layer.inputs[(row + 1) % len(other), first : first + length]
    given = recall(mixer, layer.inputs)
    changed, wanted, far = (given - recall(mixer, other)) * second, layer.passage * second, layer.far * second
    explained = 1 - (given * second - far).square().sum() / far.square().sum()
    recalled = 1 - (changed - wanted).square().sum() / wanted.square().sum()
    return float(explained), float(recalled), float((changed * wanted).sum() / (changed.norm() * wanted.norm() + 1e-12))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of a Llama, as convert takes it")
    parser.add_argument("--novels", required=True, type=Path, help="parquet file of long texts with a column `text`")
    parser.add_argument("--layers", nargs="+", type=int, default=[8, 20])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--rows", type=int, default=40, help="rows to train on; six more are measured [40]")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    parser.add_argument("--seeds", type=int, default=1, help="initial memories of each kind [1]")
    args = parser.parse_args()
    source = open_model(args.teacher)
    teacher = cast(LlamaForCausalLM, AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.bfloat16).eval())
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    novels = pq.read_table(args.novels, columns=["text"])["text"].to_pylist()
    held_out = max(1, len(novels) // 8)
    taught, asked = rows_of(novels[held_out:], tokenizer, args.rows, 0), rows_of(novels[:held_out], tokenizer, 6, 1)
    layers = attention_of(teacher, taught, args.layers), attention_of(teacher, asked, args.layers)
    table = []
    for i in args.layers:
        for kind in args.kinds:
            for seed in range(args.seeds):
                start = time.process_time()
                mixer = mixer_of(source, teacher, i, KINDS[kind] | {"seed": seed}, layers[0][i].inputs)
                train(mixer, layers[0][i], taught, args.steps, args.learning_rate)
                explained, recalled, cosine = measure(mixer, layers[1][i], asked)
                table.append(
                    [
                        str(i),
                        kind,
                        str(seed),
                        f"{explained:.3f}",
                        f"{recalled:.3f}",
                        f"{cosine:.2f}",
                        f"{time.process_time() - start:.0f}",
                    ]
                )
                print(*table[-1], sep="  ", flush=True)
    print(
        Table(
            "What a layer's memory learned to recall",
            ["layer", "memory", "seed", "explained", "recalled", "cosine", "seconds"],
            table,
        ).markdown()
    )


if __name__ == "__main__":
    main()
