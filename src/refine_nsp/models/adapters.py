"""Find LoRA adapters as PEFT writes them, check them, and put them on the model they were trained for.

A folder with adapter_config.json holds no model: it names its base, which may be such a folder again.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from refine_nsp.errors import RefineError, first_line
from refine_nsp.files import expecting, read_json
from refine_nsp.models.protocols import CausalModel
from refine_nsp.models.weight_names import without_wrappers

if TYPE_CHECKING:
    from peft import LoraModel, PeftConfig, PeftModel
    from peft.tuners.lora import Linear, LoraLayer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SAME_BASE = (True, False, "gaussian", "orthogonal")  # init_lora_weights after which the base is still itself
# These settings of LoRA change more than what is added to a layer's weight, or do nothing to layers which are not quantized.
NOT_MERGEABLE = (
    "megatron_config", "layer_replication", "arrow_config", "alora_invocation_tokens", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "use_qalora", "ensure_weight_tying",
)  # fmt: skip
ONE_NAME = "default"  # PEFT saves the adapter of this name in a run's folder itself, others in folders inside it


@dataclass(frozen=True)
class Adapter:
    """Names a checked adapter: where, as it was given, the folder with its two files, and the base, in a revision, that it belongs on."""

    where: str
    folder: Path
    base: str
    revision: str | None


def new_adapters(model: nn.Module, config: PeftConfig, seed: int) -> PeftModel:
    """Put new adapters by PEFT's config on a model. Their weights are drawn by `seed` alone: alike in every process and every run.

    A RefineError for layers that the model does not have, or adapters that its folder could not be loaded with.
    """
    if (problem := problem_of(config.to_dict())) is not None:
        raise RefineError(f"peft_config asks for {problem}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            wrapped = _wrap(model, config)
        except Exception as error:  # each kind of setting has errors of its own
            names = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise RefineError(f"no adapters: {first_line(error)} Its linear layers are {', '.join(names)}") from error
    _check_names(wrapped, config)
    check_adapters(wrapped)
    return wrapped


def _check_names(wrapped: PeftModel, config: PeftConfig) -> None:
    """Raise a RefineError for a layer or parameter that is named and not there: PEFT adapts the others, and says nothing of it."""
    modules, parameters = ([name for name, _ in named()] for named in (wrapped.named_modules, wrapped.named_parameters))
    asked = {"target_modules": modules, "modules_to_save": modules, "target_parameters": parameters}
    for setting, there in asked.items():
        for name in [] if isinstance(given := config.to_dict().get(setting), str) else given or []:
            if not any(name.rpartition(".")[2] in path.split(".") for path in there):
                raise RefineError(f"{setting} names {name!r}, which the model does not have; leave it out")


def _wrap(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Make PEFT's model, without its advice on tied weights: `_untie` sees to them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        return peft().get_peft_model(model, config)


def problem_of(settings: Mapping[str, object]) -> str | None:
    """Say why adapters by a configuration of PEFT cannot be added to their base, which is as it was, when a folder is loaded; or None."""
    kind, initial = settings.get("peft_type"), settings.get("init_lora_weights", True)
    name = str(getattr(kind, "value", kind))
    unusual = [f"{field}={settings[field]!r}" for field in NOT_MERGEABLE if settings.get(field)]
    if name == "LORA" and initial in SAME_BASE and not unusual:
        return None
    found = ", ".join([f"peft_type={name!r}", *([f"init_lora_weights={initial!r}"] if name == "LORA" else []), *unusual])
    kinds = ", ".join(repr(known) for known in SAME_BASE)
    return f"an adapter with {found}; expected LoRA that adds to its base and changes nothing else (init_lora_weights one of {kinds})"


def check_adapters(wrapped: nn.Module | None) -> None:
    """Check that the model which a run ends with is the one that its folder loads as; tied weights are untied for that.

    A RefineError for another kind than LoRA, several adapters, or a layer whose adapter the losses or the merged model would leave out.
    """
    model = cast("PeftModel", wrapped)
    for config in model.peft_config.values():
        if (problem := problem_of(config.to_dict())) is not None:
            raise RefineError(f"the model has {problem}")
    if list(model.peft_config) != [ONE_NAME]:
        names = ", ".join(model.peft_config)
        raise RefineError(
            f"the model has the adapters {names}; expected one, called {ONE_NAME}: merge the others first (merge_and_unload)"
        )
    if _untie(model):
        warnings.warn(
            "embeddings and head share a weight, and an adapter on one of them would change both when merged: they have one each from here "
            "on (tie_word_embeddings=False)",
            stacklevel=2,
        )
    base = cast(PreTrainedModel, without_adapters(model))
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    if any(hasattr(layer, "token_adapter") for layer in model.modules()) and _adapted(embeddings, head):
        raise RefineError(
            "trainable_token_indices cannot go with an adapter on the embeddings or the head: leave one of them out"
        )
    for name, layer in model.named_modules():
        own = name.removeprefix("base_model.model.")
        if hasattr(layer, "lora_A") and hasattr(layer, "get_base_layer"):
            _check_layer(own, cast("LoraLayer", layer), layer is head)
        elif isinstance(layer, peft().utils.other.AuxiliaryTrainingWrapper):
            _check_called(own, layer.original_module)


def merged(model: PeftModel) -> PreTrainedModel:
    """Merge the adapters of PEFT's model into its base, and return that, whose parameters all learn."""
    tuner = cast("LoraModel", model.base_model)
    plain = cast(PreTrainedModel, tuner.merge_and_unload())
    # One pass leaves the layers alone that lie inside a module whose own parameters are adapted.
    while any(hasattr(layer, "lora_A") for layer in plain.modules()):
        plain = cast(PreTrainedModel, tuner.merge_and_unload())
    return plain.requires_grad_(True)


def _check_layer(name: str, layer: LoraLayer, is_head: bool) -> None:
    """Raise a RefineError where a layer's adapter cannot be merged, or would not be part of the losses."""
    base = layer.get_base_layer()
    _check_called(name, base)
    if layer.lora_bias.get(ONE_NAME) and getattr(base, "bias", None) is None:
        raise RefineError(f"lora_bias=True: {name} has no bias that it could be merged into; leave it out")
    if is_head and (layer.lora_variant or not isinstance(layer.lora_dropout[ONE_NAME], nn.Identity)):
        raise RefineError(
            f"{name} takes a plain LoRA adapter alone, without lora_dropout, use_dora and the like, since the losses read its weight as "
            "one matrix; leave these out, or train the layer itself: modules_to_save"
        )


def _check_called(name: str, module: nn.Module) -> None:
    """Raise a RefineError for a module without inputs, which PEFT's wrappers cannot replace."""
    if not inspect.signature(module.forward).parameters:
        raise RefineError(
            f"{name} makes weights and takes no input, so PEFT cannot adapt it; adapt linear layers (target_modules='all-linear'), or the "
            "parameters of its mixer"
        )


def _adapted(*layers: nn.Module) -> bool:
    """Tell whether one of the layers has LoRA inside or around it."""
    return any(hasattr(part, "lora_A") for layer in layers for part in layer.modules())


def _untie(model: PeftModel) -> bool:
    """Give embeddings and head a weight each where they share one and an adapter is on one of them; tell whether that was so."""
    base = cast(PreTrainedModel, without_adapters(model))
    layers = (base.get_input_embeddings(), base.get_output_embeddings())
    inner = [cast("LoraLayer", layer).get_base_layer() if hasattr(layer, "get_base_layer") else layer for layer in layers]
    if not _adapted(*layers) or inner[0].weight is not inner[1].weight:
        return False
    shared = cast(nn.Parameter, inner[0].weight)
    inner[1].weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    base.config.tie_word_embeddings = False
    return True


def head_weight(model: CausalModel) -> Tensor:
    """Return the weight [V, D] that makes logits of hidden states, with what adapters on the head add to it."""
    head = model.lm_head
    if not hasattr(head, "lora_A"):
        return cast(nn.Linear, head).weight
    adapted = cast("Linear", head)
    names = [] if adapted.disable_adapters or adapted.merged else adapted.active_adapters
    return sum((adapted.get_delta_weight(name) for name in names), cast(nn.Linear, adapted.get_base_layer()).weight)


def without_adapters(model: nn.Module) -> nn.Module:
    """Return the model inside PEFT's, whose layers hold the adapters; one without adapters as it is."""
    return cast("PeftModel", model).get_base_model() if hasattr(model, "get_base_model") else model


def find_adapter(where: str, revision: str | None = None) -> Adapter | None:
    """Find the adapter of a folder or a hub name, or None; a RefineError for one that cannot be merged into its base."""
    file = _file(where, CONFIG, revision)
    if file is None:
        return None
    settings = read_json(file, "a configuration of PEFT")
    with expecting("a configuration of PEFT", file):
        base, _ = settings["base_model_name_or_path"], settings["peft_type"]
    if not isinstance(base, str) or not base:
        raise RefineError(f"{file} names no base: set base_model_name_or_path to the model that the adapter was trained on")
    if (problem := problem_of(settings)) is not None:
        raise RefineError(f"{where} is {problem}: merge it where it was made")
    if _file(where, WEIGHTS, revision) is None:
        raise RefineError(
            f"{where} is an adapter without {WEIGHTS}; pickled weights (adapter_model.bin) can run code when loaded and are refused: "
            "save it with safetensors where you trust it"
        )
    return Adapter(where, file.parent, base, settings.get("revision"))


def _file(where: str, name: str, revision: str | None) -> Path | None:
    """Find a file of a folder, or of a hub name; None where there is none, or no such place (loading the model says which)."""
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


def peft() -> ModuleType:
    """Import PEFT, or raise a RefineError that says how to get it."""
    try:
        import peft as library
    except ImportError as error:
        raise RefineError("LoRA adapters need PEFT: pip install 'refine-nsp[lora]'") from error
    return library


def attach(model: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """Put an adapter on its base, ready to be trained on; a RefineError where it has not the layers or shapes of this base."""
    library = peft()
    try:
        config = library.LoraConfig.from_pretrained(str(adapter.folder))
        config.inference_mode, config.base_model_name_or_path = False, model.name_or_path
        wrapped = _wrap(model, config)
        _untie(wrapped)
        own = set(library.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
        weights = {without_wrappers(name): w for name, w in load_file(adapter.folder / WEIGHTS).items()}
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
