"""Load a fast-weight model and its tokenizer from the package, a folder or the hub, with errors a user can act on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from refine_nsp.errors import RefineError, closest, first_line
from refine_nsp.models.families import FAMILIES

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SHIPPED = {f"refine-nsp/{name}": ASSETS / name for name in ("tiny-delta-net", "tiny-gated-deltanet", "tiny-lact")}
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def resolve(name_or_path: str | Path) -> str:
    """Folder of a shipped model, or the name unchanged (a folder or a hub name)."""
    name = str(name_or_path)
    if name in SHIPPED:
        return str(SHIPPED[name])
    if name.startswith("refine-nsp/"):
        raise RefineError(f"no shipped model {name!r}{closest(name, SHIPPED)}; shipped: {', '.join(SHIPPED)}")
    return name


def load(name_or_path: str | Path, dtype: torch.dtype | str | None = None, **kwargs: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """Model (eval mode) and tokenizer of a shipped name, a folder in the hub's layout, or a hub name.

    Args:
        name_or_path: for example `"refine-nsp/tiny-delta-net"`.
        dtype: of the weights; None is the one the model's configuration names (of a shipped name float32, however it is stored).
        kwargs: passed to `from_pretrained` (device_map, revision, ...).

    Raises:
        RefineError: no such folder or name, not a fast-weight model, a pickle checkpoint, no tokenizer, or a tokenizer with
            more tokens than the model has embeddings.
    """
    return load_model(name_or_path, dtype, **kwargs), load_tokenizer(name_or_path)


def load_model(name_or_path: str | Path, dtype: torch.dtype | str | None = None, **kwargs: Any) -> Any:
    """The model alone; see `load`."""
    where = resolve(name_or_path)
    folder = Path(where)
    if folder.exists():
        _check_folder(folder)
    config = _load_config(where)
    if config.model_type not in FAMILIES:
        raise RefineError(
            f"{where} holds a {config.model_type!r} model, which has no fast weights handled here; "
            f"expected one of {', '.join(FAMILIES)}"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype if dtype is not None else "auto", use_safetensors=True, trust_remote_code=False, **kwargs
        )
    except OSError as error:
        raise RefineError(f"cannot load the weights of {where}: {first_line(error)}") from error
    return model.eval()


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer alone; see `load`."""
    where = resolve(name_or_path)
    folder = Path(where)
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise RefineError(
            f"{where} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy one there, or name another (midtrain: --tokenizer_name)"
        )
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RefineError(f"cannot load the tokenizer of {where}: {first_line(error)}") from error


def check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a RefineError when the tokenizer can produce ids the model has no embedding for."""
    if len(tokenizer) > model.config.vocab_size:
        raise RefineError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's vocab_size is {model.config.vocab_size}; "
            "use the tokenizer the model was trained with"
        )


def _load_config(where: str) -> Any:
    try:
        return AutoConfig.from_pretrained(where, trust_remote_code=False)
    except RefineError:
        raise
    except (OSError, ValueError) as error:
        raise RefineError(
            f"cannot load a model from {where!r}: {first_line(error)}; expected a folder with config.json and "
            f"*.safetensors, a hub name, or one of {', '.join(SHIPPED)}"
        ) from error


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise RefineError(f"{folder} is a file; expected a model folder with config.json and *.safetensors")
    config = folder / "config.json"
    if not config.exists():
        raise RefineError(f"{folder} has no config.json; expected a model folder with config.json and *.safetensors")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RefineError(f"{config} is not valid JSON: {first_line(error)}") from error
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_ENDINGS)
        if pickles:
            raise RefineError(
                f"{folder} holds only pickled weights ({pickles[0]}), which can run code when loaded and are refused; "
                "convert them to safetensors where you trust them"
            )
        raise RefineError(f"{folder} has no *.safetensors weights")
