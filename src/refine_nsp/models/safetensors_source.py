"""Open a model of safetensors as a source to be converted, from a folder or the hub: each weight is read when it is asked for."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from refine_nsp.errors import RefineError, first_line
from refine_nsp.files import expecting, read_json
from refine_nsp.models.attention_source import DTYPES, AttentionSource, refuse_others
from refine_nsp.models.load import TOKENIZER_FILES, adapters_of, check_folder, has_tokenizer, hub_problem, load_config, resolve
from refine_nsp.models.room import INDEX, WEIGHTS

CARRIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*", "merges.txt", "LICENSE*")
GENERATION = "generation_config.json"


def open_model(name: str) -> AttentionSource:
    """Open a folder or a hub name; a RefineError for pickled weights, or a model that LaCT's layers cannot hold unchanged."""
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
        try:
            folder = Path(snapshot_download(where, allow_patterns=["*.safetensors", "*.json", *CARRIED]))  # no pickles, no code
        except Exception as error:
            raise hub_problem(where, error) or RefineError(f"cannot download {where}: {first_line(error)}") from error
    files = _files(folder)
    shapes = {weight: shape for path in sorted(set(files.values())) for weight, shape in _shapes(path).items()}

    def read(weight: str) -> Tensor:
        # Opened for each weight, so that the pages of those that were read before are given back.
        with _opened(files[weight]) as file:
            return file.get_tensor(weight)

    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else read(next(iter(shapes))).dtype
    if dtype not in DTYPES:
        raise RefineError(f"the weights of {name} are {dtype}; expected {', '.join(map(str, DTYPES))}: save it dequantised first")
    return AttentionSource(name, config, dtype, shapes, read, lambda out: _carry(folder, out))


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
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """Open a safetensors file, whose own errors become one line."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise RefineError(f"cannot read the weights in {path}: {first_line(error)}") from error


def _carry(folder: Path, out: Path) -> None:
    """Copy what belongs to the model besides its weights; warn where there is no tokenizer."""
    files = {path for pattern in (*CARRIED, GENERATION) for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(files):
        shutil.copyfile(path, out / path.name)
    if not has_tokenizer(out):
        warnings.warn(
            f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}), so the new folder has none either", stacklevel=2
        )
