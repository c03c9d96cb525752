"""Open an attention model to be converted: its configuration, checked, and its weights one by one, whatever file they are in.

LaCT's layer holds a Llama's weights unchanged, so what counts as a source is decided here by what a Llama computes: rotary positions over
whole heads, RMS norms, SwiGLU, no bias but that of q, k and v. Everything else is refused by the name of what differs.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from refine_nsp.errors import RefineError, first_line
from refine_nsp.files import expecting, read_json
from refine_nsp.models.blocks import SUPPORTED_ACTIVATIONS
from refine_nsp.models.families import FAMILIES
from refine_nsp.models.load import TOKENIZER_FILES, adapters_of, check_folder, hub_problem, load_config, resolve

KINDS = ("llama", "mistral", "qwen2")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CARRIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*", "merges.txt", "LICENSE*")
GENERATION = "generation_config.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Fields whose value, unless it is one of those given, makes a model compute what LaCT's layers do not.
USUAL: dict[str, tuple[object, ...]] = {
    "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,), "mlp_bias": (None, False), "partial_rotary_factor": (None, 1.0),
    "num_local_experts": (None, 0), "num_experts": (None, 0), "n_routed_experts": (None, 0), "kv_lora_rank": (None,),
    "attention_multiplier": (None,), "embedding_multiplier": (None, 1.0), "residual_multiplier": (None, 1.0),
    "logits_scaling": (None, 1.0), "logit_scale": (None, 1.0), "clip_qkv": (None,), "no_rope_layers": (None, []),
    "use_qk_norm": (None, False), "quantization_config": (None,),
}  # fmt: skip


@dataclass(frozen=True)
class AttentionSource:
    """Holds an opened source.

    Attributes:
        name: as it was given.
        config: of one of the `KINDS`, checked. dtype: the weights'.
        shapes: those of its weights, by transformers' names.
        read: returns the weight of a name.
        carry: writes into a folder what belongs to a model besides its weights: tokenizer, generation config.
        license: as the file names it, or None.
    """

    name: str
    config: PreTrainedConfig
    dtype: torch.dtype
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    carry: Callable[[Path], None]
    license: str | None = None

    @property
    def window(self) -> int | None:
        """Return how many tokens its attention sees at most; None where it sees all."""
        return window_of(self.config)


def open_source(name_or_path: str | Path) -> AttentionSource:
    """Open a folder, a hub name or a GGUF file.

    Raises:
        RefineError: no such thing, pickled weights, or a model that LaCT's layers cannot hold unchanged, by the name of what differs.
    """
    name = str(name_or_path)
    if name.endswith(".gguf"):
        from refine_nsp.models.gguf_source import open_gguf

        return open_gguf(Path(name))
    where = resolve(name)
    if adapters_of(where):
        raise RefineError(f"{name} holds adapters, not a model: merge them first with refine-nsp export {name} FOLDER")
    folder = Path(where)
    if folder.is_dir() and not (folder / "config.json").exists() and (others := sorted(folder.glob("*.gguf"))):
        raise RefineError(f"{name} has no config.json, but GGUF files: name one of them, such as {others[0]}")
    if folder.exists():
        check_folder(folder)
    config = load_config(where)
    refuse_others(name, config)
    if not folder.exists():
        folder = _downloaded(where)
    files = _files(folder)
    shapes = {weight: shape for path in sorted(set(files.values())) for weight, shape in _shapes(path).items()}

    def read(weight: str) -> Tensor:
        # Opened for each weight, so that the pages of those that were read before are given back.
        with _reading(files[weight]), safe_open(files[weight], framework="pt") as file:
            return file.get_tensor(weight)

    stored = config.dtype if isinstance(config.dtype, torch.dtype) else read(next(iter(shapes))).dtype
    return AttentionSource(name, config, checked_dtype(name, stored), shapes, read, lambda out: _carry(folder, out))


def checked_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype; raise a RefineError where it is none that models are trained in."""
    if dtype not in DTYPES:
        raise RefineError(f"the weights of {name} are {dtype}; expected {', '.join(map(str, DTYPES))}: save it dequantised first")
    return dtype


def window_of(config: PreTrainedConfig) -> int | None:
    """Return the sliding window of any of a model's layers, or None."""
    fields = config.to_dict()
    layers = fields.get("layer_types")
    slides = fields.get("sliding_window") is not None and (layers is None or "sliding_attention" in layers)
    return fields["sliding_window"] if slides else None


def refuse_others(name: str, config: PreTrainedConfig) -> None:
    """Raise a RefineError, which names what differs, for a model that computes something else than LaCT's layers with its weights."""
    kind = config.model_type
    if kind in FAMILIES:
        raise RefineError(f"{name} is a fast-weight model already ({kind}); train it as it is")
    found = differences(config)
    if kind in KINDS and not found:
        return
    which = f"its {kind!r} has {'; '.join(found)}" if found else f"{kind!r} is another architecture"
    raise RefineError(
        f"{name} cannot become a LaCT model unchanged: {which}; expected a decoder of kind {', '.join(KINDS)} with plain rotary "
        "positions, RMS norms, SwiGLU and no bias but of q, k and v"
    )


def differences(config: PreTrainedConfig) -> list[str]:
    """Name what a model computes otherwise than a LaCT model with its weights would; an empty list means nothing known."""
    fields = config.to_dict()
    found = [f"{field}={fields[field]!r}" for field, usual in USUAL.items() if fields.get(field) not in usual]
    rope = fields.get("rope_parameters")
    if not rope:
        found.append("no rotary positions")
    elif any(isinstance(value, dict) for value in rope.values()):
        found.append("rotary positions that differ by layer")
    else:
        if rope.get("rope_type", "default") != "default":
            found.append(f"scaled rotary positions (rope_type={rope['rope_type']!r})")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            found.append(f"partial rotary positions (partial_rotary_factor={rope['partial_rotary_factor']})")
    activation = fields.get("hidden_act") or fields.get("hidden_activation")
    if activation not in SUPPORTED_ACTIVATIONS:
        found.append(f"another activation (hidden_act={activation!r})")
    if fields.get("attention_bias"):
        found.append("a bias of the attention's output (attention_bias=True)")
    if config.model_type == "qwen3":
        found.append("norms of q and k in each head (LaCT's attn_qk_norm is over all heads)")
    if other := set(fields.get("layer_types") or ()) - {"full_attention", "sliding_attention"}:
        found.append(f"layers that are no attention ({', '.join(sorted(other))})")
    if config.model_type not in KINDS and window_of(config) is not None:
        found.append(f"sliding layers (sliding_window={window_of(config)})")
    heads, width = fields.get("num_attention_heads"), fields.get("head_dim")
    if heads and width and heads * width != fields.get("hidden_size"):
        found.append(f"heads of another size than hidden_size / heads (head_dim={width}, {heads} heads, {fields['hidden_size']})")
    return found


def _downloaded(where: str) -> Path:
    """Return the folder of a hub name in the hub's cache, downloaded where it is not there: never pickles, never code."""
    try:
        return Path(snapshot_download(where, allow_patterns=["*.safetensors", "*.json", *CARRIED]))
    except Exception as error:
        raise hub_problem(where, error) or RefineError(f"cannot download {where}: {first_line(error)}") from error


def _files(folder: Path) -> dict[str, Path]:
    """Find the file of each weight, as transformers does: one file, or shards by an index."""
    if (index := folder / INDEX).exists() and not (folder / WEIGHTS).exists():
        shards = read_json(index, "an index of safetensors shards")
        with expecting("an index of safetensors shards", index):
            files = {str(name): folder / Path(file).name for name, file in shards["weight_map"].items()}
        if gone := sorted({path.name for path in files.values() if not path.exists()}):
            raise RefineError(f"{folder} lacks {', '.join(gone)}, which {INDEX} names; copy or download it again")
        return files
    if not (folder / WEIGHTS).exists():
        raise RefineError(f"{folder} has neither {WEIGHTS} nor {INDEX}")
    return dict.fromkeys(_shapes(folder / WEIGHTS), folder / WEIGHTS)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with _reading(path), safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


class _reading:
    """Turn safetensors' own errors into one line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SafetensorError | OSError):
            raise RefineError(f"cannot read the weights in {self.path}: {first_line(error)}") from error


def _carry(folder: Path, out: Path) -> None:
    """Copy what belongs to the model besides its weights; warn where there is no tokenizer."""
    files = {path for pattern in (*CARRIED, GENERATION) for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(files):
        shutil.copyfile(path, out / path.name)
    if not any((out / name).exists() for name in TOKENIZER_FILES):
        warnings.warn(
            f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}), so the new folder has none either", stacklevel=2
        )
