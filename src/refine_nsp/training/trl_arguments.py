"""Convert TRL-style trainer arguments (a model name, reward functions, a PEFT config, rows of text) to ours, or refuse them and say how."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from refine_nsp.config import RewardSpec
from refine_nsp.errors import RefineError
from refine_nsp.models.adapters import check_adapters, new_adapters, peft
from refine_nsp.models.load import adapters_of, load_model, load_tokenizer
from refine_nsp.nsp.rewards import resolve_reward, wants_columns
from refine_nsp.training.arguments import ReFINEConfig
from refine_nsp.training.data import TEXT_COLUMN, TOKENS_COLUMN, in_windows, tokenize


def with_rewards(args: ReFINEConfig, reward_funcs: RewardSpec | Sequence[RewardSpec] | None) -> ReFINEConfig:
    """Return the settings with other rewards; the caller's stay as they are."""
    if reward_funcs is None:
        return args
    rewards: list[RewardSpec] = [reward_funcs] if isinstance(reward_funcs, str) or callable(reward_funcs) else list(reward_funcs)
    for reward in rewards:
        resolve_reward(reward)
    args = copy.copy(args)
    args.nsp = replace(args.nsp, reward_funcs=rewards[0] if len(rewards) == 1 else rewards)
    return args


def model_given(
    model: nn.Module | str | Path | None, tokenizer: PreTrainedTokenizerBase | None, peft_config: object, args: ReFINEConfig
) -> tuple[nn.Module | None, PreTrainedTokenizerBase | None]:
    """Return the model itself, with new adapters where they are asked for, and its tokenizer. RefineError where adapters are asked for on
    top of adapters, which leaves open which are to be trained."""
    if isinstance(model, str | Path):
        adapted = bool(adapters_of(model))
        tokenizer = tokenizer if tokenizer is not None else load_tokenizer(model)
        model = cast(nn.Module, load_model(model, dtype=args.weights_dtype(None)))
    else:
        adapted = hasattr(model, "peft_config")
    if peft_config is None:
        if model is None or not hasattr(model, "peft_config"):
            return model, tokenizer
        check_adapters(model)
    elif not isinstance(peft_config, peft().PeftConfig):
        raise RefineError(f"peft_config must be PEFT's, such as LoraConfig(target_modules='all-linear'), got {peft_config!r:.60}")
    elif adapted:
        raise RefineError(
            "got peft_config for a model that has adapters: to train those further leave it out, and give the model as "
            "refine_nsp.models.load.load_adapter(FOLDER) returns it; for new ones merge first (refine-nsp export)"
        )
    else:
        model = new_adapters(cast(nn.Module, model), peft_config, args.seed)
    # A run's folder names the model that its adapters belong to.
    if not any(config.base_model_name_or_path for config in cast(Any, model).peft_config.values()):
        warnings.warn(
            "the model has no name_or_path, so a folder of its adapters cannot say what they belong on: save it, load that folder, and put "
            "adapters on what is loaded",
            stacklevel=2,
        )
    return model, tokenizer


def tokenized(data: object, tokenizer: PreTrainedTokenizerBase | None, args: ReFINEConfig) -> object:
    """Cut rows of text into windows of tokens, as `midtrain` does, in each of several sets by name; return anything else as it is."""
    if isinstance(data, Mapping):
        return {name: tokenized(rows, tokenizer, args) for name, rows in data.items()}
    if not isinstance(data, Dataset | IterableDataset):
        return data
    columns = data.column_names or []
    if TEXT_COLUMN not in columns or TOKENS_COLUMN in columns:
        return in_windows(data, args.max_length, args.nsp.shortest) if args.carry_states else data
    if tokenizer is None:
        raise RefineError(f"the dataset has a column {TEXT_COLUMN!r} and no input_ids: give the tokenizer as processing_class")
    shortest, keep = args.nsp.shortest, wants_columns(args.nsp)
    return tokenize(data, tokenizer, TEXT_COLUMN, args.max_length, shortest, False, keep, carried=args.carry_states)
