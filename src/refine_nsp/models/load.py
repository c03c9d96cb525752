"""Load a model and its tokenizer from the package, a folder or the hub, with errors a user can act on."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from refine_nsp.config import check_choice
from refine_nsp.errors import RefineError, closest, first_line
from refine_nsp.files import read_json
from refine_nsp.models.adapters import Adapter, attach, find_adapter, merged
from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.models.borrowed.check import check
from refine_nsp.models.borrowed.classes import class_for
from refine_nsp.models.borrowed.trunk import StatefulCausalModel
from refine_nsp.models.checks.ways import quiet
from refine_nsp.models.families import FAMILIES, register
from refine_nsp.models.room import check_room
from refine_nsp.models.weight_names import renaming, some
from refine_nsp.ops.memory import part

if TYPE_CHECKING:
    from peft import PeftModel

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SHIPPED = {f"refine-nsp/{name}": ASSETS / name for name in ("tiny-delta-net", "tiny-gated-deltanet", "tiny-lact")}
DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
HUB_PROBLEMS: dict[tuple[type[Exception], ...], str] = {
    (GatedRepoError,): "is gated: accept its terms at https://huggingface.co/{name}, then log in (hf auth login, or HF_TOKEN)",
    (
        RepositoryNotFoundError,
    ): "is not on the hub, or private: look its name up there (it may have another), or log in (hf auth login)",
    (RevisionNotFoundError,): "has no such revision on the hub",
    (
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    ): "is no folder here and not in the hub's cache, and the hub cannot be reached: where "
    "there is a network, hf download {name} --local-dir FOLDER, then name that folder; shipped: " + ", ".join(SHIPPED),
}


LoadingInfo = Mapping[str, Collection[str | tuple[object, ...]]]  # names that a checkpoint and a model do not share, by kind


class Configured(Protocol):
    """Has a configuration, whether it is a model or wraps one."""

    @property
    def config(self) -> PreTrainedConfig: ...


def resolve(name_or_path: str | Path) -> str:
    """Return the folder of a shipped model, or the name unchanged (a folder or a hub name)."""
    name = str(name_or_path)
    if name in SHIPPED:
        return str(SHIPPED[name])
    if Path(name).parts[-3:-1] == ("refine_nsp", ASSETS.name) and not Path(name).exists():
        return resolve(f"refine-nsp/{Path(name).name}")  # adapters may name the folder of another installation as their base
    if name.startswith("refine-nsp/"):
        raise RefineError(f"no shipped model {name!r}{closest(name, SHIPPED)}; shipped: {', '.join(SHIPPED)}")
    return name


LoadedModel = FastWeightForCausalLM | StatefulCausalModel
M = TypeVar("M", bound=PreTrainedModel)


def load(
    name_or_path: str | Path, dtype: torch.dtype | str | None = None, **kwargs: Any
) -> tuple[LoadedModel, PreTrainedTokenizerBase]:
    """Load a model (in eval mode) and its tokenizer by a shipped name, a folder in the hub's layout, or a hub name.

    LoRA adapters are merged into the base that they name, so the result is a plain model.

    Args:
        name_or_path: for example `"refine-nsp/tiny-delta-net"`; any causal language model of transformers will do
            (docs/models_and_states.md), and so will LoRA adapters of PEFT.
        dtype: the weights'; None is the one that the model's configuration names (float32 for a shipped name, however it is stored).
        kwargs: passed to `from_pretrained` (device_map, revision, ...).

    Raises:
        RefineError: no such folder or name, no causal language model, a pickle checkpoint, missing or unknown parameters (with the
            list) or ones that are not finite, or no tokenizer; adapters without their base, or that cannot be merged into it.
    """
    return load_model(name_or_path, dtype, **kwargs), load_tokenizer(name_or_path)


def load_model(name_or_path: str | Path, dtype: torch.dtype | str | None = None, **kwargs: Any) -> LoadedModel:
    """Load the model alone; see `load`."""
    where = resolve(name_or_path)
    if adapters_of(where, kwargs.get("revision")):
        model = cast(LoadedModel, merged(load_adapter(where, dtype, **kwargs)))
        model.name_or_path = where  # an adapter that is put on it next belongs on this, not on the base
        _check_numbers(where, model)
        return model.eval()
    config = _config_of_weights(where)
    ours = config.model_type in FAMILIES
    model_class: type[LoadedModel] = FAMILIES[config.model_type][2] if ours else class_for(config)
    model = _read(where, config, model_class, dtype, kwargs)
    if not ours:
        check(cast(StatefulCausalModel, model))
    return model.eval()


def load_as_it_is(name_or_path: str | Path, dtype: torch.dtype | str | None = None, **kwargs: Any) -> PreTrainedModel:
    """Load a causal model as transformers has it, without states of this package's; a RefineError also for adapters. See `load`."""
    where = resolve(name_or_path)
    if adapters_of(where, kwargs.get("revision")):
        raise RefineError(f"{where} holds adapters, no model; make one of them and their base: refine-nsp export {where} FOLDER")
    config = _config_of_weights(where)
    if config.model_type in FAMILIES:
        return load_model(where, dtype, **kwargs)
    return _read(where, config, class_for(config)._refine_plain, dtype, kwargs).eval()


def _config_of_weights(where: str) -> PreTrainedConfig:
    """Load the configuration of a folder or hub name that should have weights too."""
    folder = Path(where)
    if folder.exists():
        check_folder(folder)
    return load_config(where)


def _read(
    where: str, config: PreTrainedConfig, model_class: type[M], dtype: torch.dtype | str | None, kwargs: Mapping[str, Any]
) -> M:
    """Read the weights into a model of the given class, and raise a RefineError unless they are its own, all and finite."""
    if isinstance(dtype, str):
        check_choice("dtype", dtype, DTYPES)
    if model_class.config_class is not type(config):
        config = config.get_text_config(decoder=True)  # a model of several kinds of input has one for text
    else:
        check_room(where, config, dtype, kwargs)

    def read(**more: Any) -> tuple[M, LoadingInfo]:
        # Shapes that differ are accepted here, to be named below with all else that differs, instead of in transformers' long tables.
        with part("loading"), quiet(bars=True):
            loaded: object = model_class.from_pretrained(
                where, config=config, dtype=dtype if dtype is not None else "auto", use_safetensors=True, trust_remote_code=False,
                output_loading_info=True, ignore_mismatched_sizes=True, **more, **kwargs,
            )  # fmt: skip
        return cast(tuple[M, LoadingInfo], loaded)

    try:
        model, names = read()
        if names["unexpected_keys"] and names["missing_keys"]:
            added, patterns = renaming(where, sorted(map(str, names["unexpected_keys"])))
            unwrapped = read(key_mapping=patterns) if patterns else (model, names)
            if patterns and not any(unwrapped[1].values()):
                model, names = unwrapped
                # transformers would put back the parts that it left out when it loaded the names.
                left_out = [c for c in vars(model)["_weight_conversions"] if c.target_patterns != [""]]
                vars(model)["_weight_conversions"] = left_out
                warnings.warn(
                    f"the weights of {where} were saved through a wrapper: {added} is left out of their names", stacklevel=2
                )
    except RefineError:
        raise
    except Exception as error:  # transformers', safetensors' and torch's own kinds, for every way a file can be broken
        raise hub_problem(where, error) or RefineError(f"cannot load the weights of {where}: {first_line(error)}") from error
    _check_tokens(where, model)
    _check_names(where, names)
    _check_numbers(where, model)
    return model


def load_adapter(name_or_path: str | Path, dtype: torch.dtype | str | None = None, **kwargs: Any) -> PeftModel:
    """Load LoRA adapters on their base as PEFT's own model, to be trained on; a RefineError where there are none. See `load`."""
    where = resolve(name_or_path)
    adapters = adapters_of(where, kwargs.get("revision"))
    if not adapters:
        raise RefineError(f"{where} holds no adapter (adapter_config.json and adapter_model.safetensors)")
    own = adapters[0]
    kwargs = {k: v for k, v in kwargs.items() if k != "revision"} | ({"revision": own.revision} if own.revision else {})
    try:
        base = load_model(own.base, dtype, **kwargs)
    except RefineError as error:
        raise RefineError(f"the base of the adapter {where} (see its adapter_config.json) cannot be loaded: {error}") from error
    return attach(base, own)


def adapters_of(name_or_path: str | Path, revision: str | None = None) -> list[Adapter]:
    """Find the adapters that lead to a plain model, the outermost first; several where a base is an adapter itself."""
    where, found = resolve(name_or_path), []
    while (adapter := find_adapter(where, revision)) is not None:
        found.append(adapter)
        where, revision = resolve(adapter.base), adapter.revision
        if where in (a.where for a in found):
            raise RefineError(
                f"the adapter {adapter.where} names {where} as its base, which leads back to itself: set base_model_name_or_path in its "
                "adapter_config.json to a model, or move the adapter to a folder of its own"
            )
    return found


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer alone; see `load`. Adapters without one have their base's."""
    where = resolve(name_or_path)
    folder = Path(where)
    if folder.is_dir() and not has_tokenizer(folder):
        if adapters := adapters_of(where):
            return load_tokenizer(adapters[0].base)
        raise RefineError(
            f"{where} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy one there, or name another: --tokenizer_name"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        tokenizer("a")  # some broken files show only now
        return tokenizer
    except Exception as error:  # the tokenizers' parsers have errors of their own
        raise hub_problem(where, error) or RefineError(f"cannot load the tokenizer of {where}: {first_line(error)}") from error


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a folder holds a tokenizer."""
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def check_vocabulary(model: nn.Module | Configured, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a RefineError when the tokenizer can produce ids that the model has no embedding for."""
    if len(tokenizer) > (size := cast(Configured, model).config.vocab_size):
        raise RefineError(f"the tokenizer has {len(tokenizer)} tokens but the model's vocab_size is {size}; use the model's own")


def _check_tokens(where: str, model: PreTrainedModel) -> None:
    """Raise a RefineError for special tokens that are no ids."""
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = vars(config).get(name)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(i) is int for i in ids):
                raise RefineError(f"{where}: {name} is {value!r} in its {type(config).__name__}; expected the number of a token")


def _check_names(where: str, found: LoadingInfo) -> None:
    """Raise a RefineError unless a checkpoint has the model's parameters, all of them and no others."""
    kinds = {"missing_keys": "missing", "unexpected_keys": "unknown to the model", "mismatched_keys": "of another shape"}
    named = {what: sorted(key if isinstance(key, str) else str(key[0]) for key in found[kind]) for kind, what in kinds.items()}
    problems = [f"{len(keys):,} {what}: {some(keys)}" for what, keys in named.items() if keys]
    if problems:
        raise RefineError(
            f"the weights of {where} are not those of its config.json: {'; '.join(problems)}; expected the files that belong together "
            "(a missing parameter would be random, an unknown one unused)"
        )


@torch.no_grad()
def _check_numbers(where: str, model: PreTrainedModel) -> None:
    """Raise a RefineError unless every weight is finite: a model with one that is not would answer nonsense without a word."""
    # A sum is not finite where a term is not; a sum that only overflows is looked at again below.
    suspects = [(name, p) for name, p in model.named_parameters() if not p.is_meta and not p.sum(dtype=torch.float32).isfinite()]
    broken = {name: int((~p.isfinite()).sum()) for name, p in suspects if not p.isfinite().all()}
    if broken:
        found = ", ".join(f"{name} ({count})" for name, count in broken.items())
        raise RefineError(
            f"the weights of {where} are not all finite: NaN or infinity in {found}; a run that diverged wrote them, or the file is "
            "damaged: take an earlier checkpoint or another copy"
        )


def load_config(name_or_path: str | Path) -> PreTrainedConfig:
    """Load the configuration of anything that `load` takes; weights need not be there."""
    where = resolve(name_or_path)
    if adapters := adapters_of(where):
        where = resolve(adapters[-1].base)
    register()  # again: another library may have been imported since
    try:
        return AutoConfig.from_pretrained(where, trust_remote_code=False)
    except RefineError:
        raise
    except Exception as error:
        if "custom code" in str(error):
            raise RefineError(
                f"{where} cannot be called without code of its own (auto_map in its config.json), which is not run here; expected a model "
                f"that transformers {transformers.__version__} has; load such a one yourself, and see what holds of it by "
                "refine_nsp.models.checks.diagnose(model)"
            ) from error
        raise hub_problem(where, error) or RefineError(
            f"cannot load a model from {where!r}: {first_line(error)}; expected a folder with config.json and "
            f"*.safetensors, a hub name, or one of {', '.join(SHIPPED)}"
        ) from error


def hub_problem(name: str, error: BaseException) -> RefineError | None:
    """Say why the hub refused a name, with the fix, where an error of transformers comes from that; else None."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    problems = (problem for kinds, problem in HUB_PROBLEMS.items() if any(isinstance(e, kinds) for e in causes))
    return next((RefineError(f"{name} {problem.format(name=name)}") for problem in problems), None)


def check_folder(folder: Path) -> None:
    """Raise a RefineError unless a folder holds config.json and weights that no program can hide in."""
    if not folder.is_dir():
        raise RefineError(f"{folder} is a file; expected a model folder with config.json and *.safetensors")
    if not (config := folder / "config.json").exists():
        raise RefineError(f"{folder} has no config.json; expected a model folder with config.json and *.safetensors")
    read_json(config, "a model's configuration")
    if not list(folder.glob("*.safetensors")):
        if pickles := sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_ENDINGS):
            raise RefineError(
                f"{folder} holds only pickled weights ({pickles[0]}), which can run code when loaded and are refused; convert them to "
                "safetensors where you trust them"
            )
        raise RefineError(f"{folder} has no *.safetensors weights")
