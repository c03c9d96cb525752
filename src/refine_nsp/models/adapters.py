"""LoRA adapters as PEFT writes them: found, checked, and put on the model they were trained for.

A folder with adapter_config.json holds no model: it names its base, which may be such a folder again. It is read as models are: JSON and
safetensors, nothing that could run code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from refine_nsp.errors import RefineError, first_line

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SAME_BASE = (True, False, "gaussian", "orthogonal")  # init_lora_weights after which the base is still itself
NOT_MERGEABLE = ("megatron_config", "layer_replication", "arrow_config", "alora_invocation_tokens")


@dataclass(frozen=True)
class Adapter:
    """A checked adapter. where: as it was named; folder: with its two files; base, revision: the model it belongs on."""

    where: str
    folder: Path
    base: str
    revision: str | None


def new_adapters(model: nn.Module, config: Any, seed: int) -> Any:
    """A model with new adapters by PEFT's config, whose weights are drawn by `seed` alone: alike in every process and every run.

    Raises:
        RefineError: layers to adapt that the model does not have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return peft().get_peft_model(model, config)
        except ValueError as error:
            names = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise RefineError(f"no adapters: {first_line(error)} Its linear layers are {', '.join(names)}") from error


def without_adapters(model: nn.Module) -> nn.Module:
    """The model inside PEFT's, whose layers hold the adapters; one without adapters as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator,no-any-return]


def find_adapter(where: str, revision: str | None = None) -> Adapter | None:
    """The adapter of a folder or a hub name; None where that holds none.

    Raises:
        RefineError: an adapter without a base, without safetensors, or of a kind that cannot be merged into its base.
    """
    file = _file(where, CONFIG, revision)
    if file is None:
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        base, kind, initial = settings["base_model_name_or_path"], settings["peft_type"], settings.get("init_lora_weights", True)
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise RefineError(f"{file} is not a configuration of PEFT: {first_line(error)}") from error
    if not isinstance(base, str) or not base:
        raise RefineError(f"{file} names no base: set base_model_name_or_path to the model that the adapter was trained on")
    unusual = [f"{name}={settings[name]!r}" for name in NOT_MERGEABLE if settings.get(name)]
    if kind != "LORA" or initial not in SAME_BASE or unusual:
        found = ", ".join([f"peft_type={kind!r}", f"init_lora_weights={initial!r}", *unusual])
        raise RefineError(
            f"{where} is an adapter with {found}; expected LoRA that adds to its base and changes nothing else: merge it where it was made"
        )
    if _file(where, WEIGHTS, revision) is None:
        raise RefineError(
            f"{where} is an adapter without {WEIGHTS}; pickled weights (adapter_model.bin) can run code when loaded and are refused: "
            "save it with safetensors where you trust it"
        )
    return Adapter(where, file.parent, base, settings.get("revision"))


def _file(where: str, name: str, revision: str | None) -> Path | None:
    """A file of a folder, or of a hub name by its cache; None where there is none, or no such place (loading the model says which)."""
    if Path(where).exists():
        path = Path(where) / name
        return path if path.is_file() else None
    try:
        found = cached_file(
            where, name, revision=revision, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def peft() -> Any:
    """The library, or a RefineError that says how to get it."""
    try:
        import peft as library
    except ImportError as error:
        raise RefineError("LoRA adapters need PEFT: pip install 'refine-nsp[lora]'") from error
    return library


def attach(model: PreTrainedModel, adapter: Adapter) -> Any:
    """An adapter on its base, by PEFT, ready to be trained on.

    Raises:
        RefineError: PEFT is not installed, or the adapter has not the layers or shapes of this base.
    """
    library = peft()
    try:
        config = library.LoraConfig.from_pretrained(str(adapter.folder))
        config.inference_mode, config.base_model_name_or_path = False, model.name_or_path
        wrapped = library.get_peft_model(model, config)
        own = set(library.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
        weights = load_file(adapter.folder / WEIGHTS)
        # A layer of the base that is kept with the adapter (an adapted head) is known too.
        kinds = {"missing": own - set(weights), "unknown to the base": set(weights) - own - set(wrapped.state_dict())}
        if any(kinds.values()):
            found = "; ".join(f"{len(names)} {kind}: {', '.join(sorted(names)[:8])}" for kind, names in kinds.items() if names)
            raise RefineError(f"the adapter {adapter.where} does not belong on {adapter.base}: {found}")
        library.set_peft_model_state_dict(wrapped, weights)
    except RefineError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:  # each library's own
        raise RefineError(f"cannot put the adapter {adapter.where} on {adapter.base}: {first_line(error)}") from error
    return wrapped
