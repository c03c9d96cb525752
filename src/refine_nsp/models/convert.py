"""Convert an attention model to a LaCT model that starts as exactly itself within a window (docs/your_own_checkpoint.md).

LaCT adds to window attention what its fast weights recall, from the same q, k and v. So q, k, v, o, norms, MLP and embeddings go in
unchanged, and with `ttt_scale_proj` at zero the recall is silu(0) = 0 times something, whose gradient is not zero: training starts there.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import yaml
from torch import Tensor
from transformers import GenerationConfig

from refine_nsp.config import check_choice
from refine_nsp.environment import memory_available
from refine_nsp.errors import RefineError
from refine_nsp.fields import Reader, check_read, live, setting
from refine_nsp.files import made_whole, write_atomically
from refine_nsp.models.attention_source import DTYPES, AttentionSource, window_of
from refine_nsp.models.centring import offsets_of
from refine_nsp.models.gguf_source import open_gguf
from refine_nsp.models.lact import BASE_LEARNING_RATE, RATE_SHIFT, LaCTConfig, LaCTForCausalLM, LaCTMixer
from refine_nsp.models.room import WEIGHTS
from refine_nsp.models.safetensors_source import GENERATION, open_model
from refine_nsp.models.weight_names import some
from refine_nsp.progress import StepProgress, step_progress

# Names in the new model -> those in the source, whose rows are joined.
OUTSIDE = {
    "model.embeddings.weight": ("model.embed_tokens.weight",),
    "model.norm.weight": ("model.norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
}
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
INSIDE = {
    "attn_norm.weight": ("input_layernorm.weight",),
    "attn.qkv.weight": tuple(f"{part}.weight" for part in PROJECTIONS),
    "attn.qkv.bias": tuple(f"{part}.bias" for part in PROJECTIONS),
    "attn.o_proj.weight": ("self_attn.o_proj.weight",),
    "mlp_norm.weight": ("post_attention_layernorm.weight",),
    **{f"mlp.{part}_proj.weight": (f"mlp.{part}_proj.weight",) for part in ("gate", "up", "down")},
}
SHARED = tuple(f"{part}.{kind}" for part in PROJECTIONS[1:] for kind in ("weight", "bias"))  # several query heads may share these

LOW_RANK = Reader("w0_w2_low_rank above 0", lambda s: s.w0_w2_low_rank > 0)
MUON = Reader("use_muon", lambda s: s.use_muon)


@dataclass(frozen=True)
class MemorySettings:
    """Say what memory an attention model gets, by the names of LaCT's config.

    Attributes:
        window_size: tokens that attention sees, its own among them; farther ones only the memory can recall.
        lact_chunk_size: tokens after which the fast weights are updated.
        num_lact_heads: heads of the fast weights; each is a network of (hidden_size / heads)^2 weights, three times.
        inter_multi: width inside a fast-weight network, in widths of its head.
        w0_w2_low_rank: rank of the initial w0 and w2, beside half the identity; -1: full matrices.
        fw_init_gain: their size at the start.
        use_momentum: momentum in the fast weights' updates.
        use_muon: orthogonalise the updates. muon_dtype: of that (bfloat16, as published, or float32).
        ttt_prenorm: normalise fast weights when they are read, not when they are updated.
        qkv_silu: SiLU on the memory's queries, keys and values, as published. Without it values keep their signs, as attention's do.
        w1_learning_rate: of the updates of w1, which write values, before anything is trained; at the published 0.001 they write next to
            nothing, and the rate itself has to be learned first.
        centre_on: a file, folder or hub name of texts. The memory's queries and keys begin centred on 16 rows of it, of 1,024 tokens: their
            means, which attention's softmax does not see, would make all keys alike. The source is run over them once.
        dtype: of the weights (float32, bfloat16, float16, float64); default: the source's, and float32 for GGUF.
        seed: of the new weights.
    """

    window_size: int = setting(2048, common=True)
    lact_chunk_size: int = setting(2048, common=True)
    num_lact_heads: int = setting(4, common=True)
    inter_multi: float = setting(1.0)
    w0_w2_low_rank: int = setting(-1)
    fw_init_gain: float = setting(0.5, read_by=LOW_RANK)
    use_momentum: bool = setting(True)
    use_muon: bool = setting(False)
    muon_dtype: str = setting("bfloat16", read_by=MUON)
    ttt_prenorm: bool = setting(False)
    qkv_silu: bool = setting(True)
    w1_learning_rate: float = setting(BASE_LEARNING_RATE)
    centre_on: str | None = setting(None, common=True)
    dtype: str | None = setting(None, common=True)
    seed: int = setting(0)

    def __post_init__(self) -> None:
        check_read(self)
        for name in ("window_size", "lact_chunk_size", "num_lact_heads"):
            if (value := getattr(self, name)) < 1:
                raise RefineError(f"{name} must be at least 1, got {value}")
        if self.w0_w2_low_rank != -1 and self.w0_w2_low_rank < 1:
            raise RefineError(f"w0_w2_low_rank must be at least 1, or -1 for full matrices; got {self.w0_w2_low_rank}")
        for name in ("inter_multi", "fw_init_gain", "w1_learning_rate"):
            if not 0 < (number := getattr(self, name)) < math.inf:
                raise RefineError(f"{name} must be above 0, got {number}")
        if self.dtype is not None:
            check_choice("dtype", self.dtype, [str(dtype).removeprefix("torch.") for dtype in DTYPES])


@dataclass(frozen=True)
class Converted:
    """Reports a conversion."""

    config: LaCTConfig
    parameters: int  # in all
    new_parameters: int
    seconds: float


def convert(source: str | Path, folder: Path, settings: MemorySettings | None = None) -> Converted:
    """Write an attention model (a folder, a hub name or a GGUF file of a Llama, Mistral or Qwen2) as a LaCT model, or nothing.

    No more than a layer is in memory, but for `centre_on`, which runs the model. A RefineError for a source that cannot be converted
    unchanged, by the name of what differs, for settings that do not fit it, and for a folder that has something in it.
    """
    start = time.monotonic()
    settings = settings or MemorySettings()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise RefineError(f"{folder} is {'a file' if folder.is_file() else 'not empty'}; name a new folder")
    opened = open_gguf(Path(source)) if str(source).endswith(".gguf") else open_model(str(source))
    config = lact_config(opened, settings)
    dtype = cast(torch.dtype, config.dtype)
    with torch.device("meta"):
        model = LaCTForCausalLM(config)
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]  # as save_pretrained does
    check_weights(opened, shapes)
    largest = max(map(math.prod, shapes.values())) * (opened.dtype.itemsize + dtype.itemsize)
    if (free := memory_available()) is not None and largest > free:
        raise RefineError(
            f"the largest weight of {source} takes {largest / 1e9:.1f} GB as it is converted, and {free / 1e9:.1f} GB are free: end what "
            "else uses memory, or use a machine with more"
        )
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with made_whole(temporary, folder), step_progress(len(shapes), title="convert") as progress:
        temporary.mkdir(parents=True)
        opened.carry(temporary)
        weights = _weights(opened, model, list(shapes), settings, progress)
        write_weights(temporary / WEIGHTS, shapes, dtype, ((name, weight.to(dtype)) for name, weight in weights))
        config.save_pretrained(temporary)
        if settings.centre_on is not None:
            overwrite_weights(temporary / WEIGHTS, offsets_of(temporary, settings.centre_on))
        if not (temporary / GENERATION).exists():
            GenerationConfig.from_model_config(config).save_pretrained(temporary)
        new = sum(math.prod(shape) for name, shape in shapes.items() if not origin_of(name))
        made = Converted(config, sum(map(math.prod, shapes.values())), new, time.monotonic() - start)
        write_atomically(temporary / "README.md", card(opened, folder.absolute().name, settings, made))
    return made


def lact_config(source: AttentionSource, settings: MemorySettings) -> LaCTConfig:
    """Make the new model's configuration. Raises RefineError where the settings do not fit the source."""
    c = source.config.to_dict()
    asked, longest, window = settings.window_size, c.get("max_position_embeddings"), window_of(source.config)
    if longest is not None and asked > longest:
        raise RefineError(
            f"window_size={asked} is longer than the {longest} tokens that {source.name} was trained for: choose fewer"
        )
    if window is not None and asked > window:
        raise RefineError(f"{source.name} has a sliding window of {window} tokens itself: choose a window_size up to that")
    fast = ("window_size", "lact_chunk_size", "num_lact_heads", "inter_multi", "w0_w2_low_rank", "fw_init_gain", "use_momentum")
    kept = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings", "tie_word_embeddings",
        "pad_token_id", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    config = LaCTConfig(
        **{name: c[name] for name in kept},
        **{name: getattr(settings, name) for name in (*fast, "use_muon", "muon_dtype", "ttt_prenorm", "qkv_silu")},
        num_attn_heads=c["num_attention_heads"],
        norm_eps=c["rms_norm_eps"],
        rope_theta=c["rope_parameters"]["rope_theta"],
        qkv_bias=source.config.model_type == "qwen2",
        architectures=["LaCTForCausalLM"],
    )
    if config.fw_hidden_dim < 1:
        raise RefineError(f"inter_multi={settings.inter_multi} leaves no width inside fast-weight heads of {config.fw_head_dim}")
    config.dtype = source.dtype if settings.dtype is None else getattr(torch, settings.dtype)
    return config


def origin_of(name: str) -> tuple[str, ...]:
    """Return the source's names of the weights that make one of the new model's; none for a weight that is new."""
    if not name.startswith("model.layers."):
        return OUTSIDE[name]
    layer, inside = name.removeprefix("model.layers.").split(".", 1)
    return tuple(f"model.layers.{layer}.{part}" for part in INSIDE.get(inside, ()))


def check_weights(source: AttentionSource, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a RefineError unless the source has the weights that are needed, in their shapes, and no others."""
    c = source.config.to_dict()
    heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
    if heads % groups:
        raise RefineError(f"{source.name}: {heads} query heads cannot share {groups} key/value heads evenly")
    expected: dict[str, tuple[int, ...]] = {}
    for name, (rows, *rest) in shapes.items():
        parts = origin_of(name)
        for part in parts:
            own = rows // len(parts)
            expected[part] = (own // heads * groups if part.endswith(SHARED) else own, *rest)
    known = {name for name in source.shapes if not name.endswith("rotary_emb.inv_freq")}  # a table, which old files hold
    if c["tie_word_embeddings"] and "lm_head.weight" in known:
        known.remove("lm_head.weight")
        if not torch.equal(source.read("lm_head.weight"), source.read("model.embed_tokens.weight")):
            raise RefineError(f"{source.name}: its lm_head.weight differs from its embeddings; set tie_word_embeddings=False")
    differ = [f"{n} {list(source.shapes[n])} for {list(s)}" for n, s in expected.items() if n in known and source.shapes[n] != s]
    kinds = {"missing": sorted(expected.keys() - known), "unknown": sorted(known - expected.keys()), "of another shape": differ}
    if problems := [f"{len(names):,} {kind}: {some(names)}" for kind, names in kinds.items() if names]:
        raise RefineError(f"the weights of {source.name} are not those of its configuration: {'; '.join(problems)}")


def _weights(
    source: AttentionSource, model: LaCTForCausalLM, names: Sequence[str], settings: MemorySettings, progress: StepProgress
) -> Iterator[tuple[str, Tensor]]:
    """Yield the new model's weights in order, each made when it is its turn."""
    config, layer, new = cast(LaCTConfig, model.config), "", {}
    repeats = config.num_attn_heads // source.config.to_dict()["num_key_value_heads"]
    for name in names:
        if origin := origin_of(name):
            parts = [_repeated(source.read(part), config, repeats if part.endswith(SHARED) else 1) for part in origin]
            weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            layer_of_name, inside = name.removeprefix("model.layers.").split(".", 1)
            if layer_of_name != layer:
                layer, new = layer_of_name, new_weights(model, settings, int(layer_of_name))
            weight = new[inside.removeprefix("attn.")]
        yield name, weight
        progress.advance(0)


def _repeated(weight: Tensor, config: LaCTConfig, repeats: int) -> Tensor:
    """Give each query head its own copy of the rows of the key or value head that it shares."""
    if repeats == 1:
        return weight
    return weight.unflatten(0, (config.num_attn_heads // repeats, -1)).repeat_interleave(repeats, 0).flatten(0, 1)


@torch.no_grad()
def new_weights(model: LaCTForCausalLM, settings: MemorySettings, layer: int) -> dict[str, Tensor]:
    """Draw what a layer's mixer has and attention has not, as LaCT begins, but for a read-out that is zero."""
    with torch.device("meta"):
        mixer = LaCTMixer(cast(LaCTConfig, model.config))
    del mixer.qkv, mixer.o_proj  # these are the source's
    mixer = mixer.to(torch.float32).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed * 1_000_003 + layer)
        mixer.apply(model._init_weights)
    mixer.ttt_scale_proj.weight.zero_()
    mixer.ttt_scale_proj.bias.zero_()
    rate = settings.w1_learning_rate
    rates = mixer.lr_proj.bias.unflatten(0, (mixer.config.num_lact_heads, 3, -1))
    rates[:, 1] = rate + math.log(-math.expm1(-rate)) - RATE_SHIFT  # softplus gives it back
    return {name: weight.detach() for name, weight in mixer.named_parameters()}


def write_weights(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, weights: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a safetensors file weight by weight, in the order of `shapes`, so that no more than one of them is in memory.

    The format is eight bytes of length, a JSON header with each tensor's place, and the tensors' bytes
    (https://github.com/huggingface/safetensors#format); the library's own writer wants all of them at once. A RefineError for a weight of
    another name or shape than announced, or one that is not finite.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        announced = iter(shapes.items())
        for name, weight in weights:
            if next(announced, None) != (name, tuple(weight.shape)):
                raise RefineError(f"{name} has shape {list(weight.shape)}; expected {list(shapes.get(name, ()))}")
            if not weight.isfinite().all():
                raise RefineError(f"{name} is not finite everywhere; the source is damaged, or {dtype} cannot hold it")
            file.write(weight.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if (left := next(announced, None)) is not None:
            raise RefineError(f"{left[0]} was not written")


def overwrite_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write some tensors of a safetensors file anew, in their place, shape and dtype."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, weight in weights.items():
            file.seek(8 + length + header[name]["data_offsets"][0])
            file.write(weight.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def card(source: AttentionSource, name: str, settings: MemorySettings, made: Converted) -> str:
    """Write the model card: what the model came from, and what it is before any training."""
    head: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head["tags"] = ["refine-nsp", "fast-weights", "long-context", "lact"]
    hub_name = not Path(source.name).exists()
    if hub_name:
        head["base_model"] = source.name
    if source.license is not None:
        head["license"] = source.license
    shown = " ".join((source.name if hub_name else Path(source.name).absolute().name).replace("`", "'").split())
    c = made.config
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {' '.join(name.split())}\n",
        f"`{shown}` ({source.config.model_type}) with a memory: its weights, unchanged, in a LaCT model (`lact_swiglu`), by",
        f"`refine-nsp convert`. {made.new_parameters:,} of its {made.parameters:,} parameters are new.\n",
        "| setting | value |\n| --- | --- |",
        *(f"| `{name}` | {getattr(c, name)} |" for name in sorted(live(settings) & set(c.to_dict()) - {"dtype"})),
        *([f"| `centre_on` | {Path(settings.centre_on).name} |"] if settings.centre_on is not None else []),
        f"| `w1_learning_rate` | {settings.w1_learning_rate:g}, at the start |",
        f"| weights | {str(c.dtype).removeprefix('torch.')}, the new ones from seed {settings.seed} |\n",
        f"**It has not been trained.** Within {c.window_size} tokens it computes what its source computes. What lies farther back is",
        "forgotten, because nothing is read from the memory yet: the scale of the read-out is zero, and training moves it from there.\n",
        '```python\nimport refine_nsp\n\nmodel, tokenizer = refine_nsp.load("FOLDER")\n```\n',
        "Licence and limits of the source still hold.\n",
    ]
    return "\n".join(lines)
