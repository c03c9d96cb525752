"""Read the arguments of lm-eval's model, its device, and the generation settings of a request as lm-eval's own `HFLM` does.

An argument of `HFLM` that has no meaning here is refused by name.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from refine_nsp.errors import RefineError, closest, first_line
from refine_nsp.models.generation import Decoding
from refine_nsp.processes import process_state
from refine_nsp.prompts.encoding import encode_text, leading_tokens

try:
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.utils import warning_once
except ImportError as missing:
    raise RefineError("tasks of lm-eval need lm-eval 0.4.12 or newer: pip install -U 'refine-nsp[eval]' lm-eval") from missing

logger = logging.getLogger("lm_eval.models.refine_nsp")  # a child of lm-eval's, so that its command line shows these warnings

DEFAULT_NEW_TOKENS = 256
LM_EVAL_SETTINGS = ("until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Settings of `generate` that our own decoding follows. With any other, transformers generates the answer.
OWN_SETTINGS = ("do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens", "use_cache")
# Entries of a model's configuration that do not ask for transformers' `generate`; end tokens are read by `end_tokens`.
OF_NO_EFFECT = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config")
NEUTRAL = {
    "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "typical_p": 1.0,
    "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip
SEVERAL = ("num_return_sequences", "return_dict_in_generate")
NO_SPLIT = "data are split among processes instead: accelerate launch -m refine_nsp.evaluation.harness ..."
# Arguments of HFLM that are not taken: the values that ask for nothing (None does too), and what to do instead.
OTHERS: dict[str, tuple[tuple[Any, ...], str]] = {
    "backend": (("default", "causal"), "only causal models are loaded"),
    "revision": (("main",), "hf download NAME --revision REVISION --local-dir FOLDER, then give pretrained=FOLDER"),
    "subfolder": (("",), "give pretrained=FOLDER/SUBFOLDER"),
    "truncation": ((False,), "give max_length"),
    "logits_cache": ((True, False), ""),  # it saves time in HFLM and changes no result
    "softmax_dtype": (("float32", torch.float32), "log-probabilities are computed in float32"),
    "mixed_precision_dtype": ((), "give dtype"),
    "trust_remote_code": ((False,), "code that comes with a checkpoint is never run"),
    "use_fast_tokenizer": ((True,), "give a tokenizer object as tokenizer"),
    **dict.fromkeys(("parallelize", "max_memory_per_gpu", "max_cpu_memory", "tp_plan"), ((False,), NO_SPLIT)),
    "offload_folder": (("./offload",), NO_SPLIT),
    "peft": ((), "give pretrained=ADAPTER, a folder of LoRA adapters, which are loaded with their base"),
    "delta": ((), "add the weights up and save the sum first"),
    **dict.fromkeys(("autogptq", "gptqmodel", "gguf_file"), ((False,), "weights are loaded as *.safetensors only")),
}


def refuse(others: Mapping[str, object], names: Iterable[str]) -> None:
    """Raise RefineError for an argument that nothing reads; `names` are the arguments that are read."""
    for name, value in others.items():
        if name not in OTHERS:
            raise RefineError(f"the model refine-nsp has no argument {name!r}{closest(name, [*names, *OTHERS])}")
        neutral, instead = OTHERS[name]
        if value is not None and value not in neutral:
            raise RefineError(f"the model refine-nsp does not take {name}={value!r}: {instead}")


def place(device: torch.device | str | None) -> torch.device:
    """Return the device asked for, or the process' own, with a warning, where this machine does not have it, as HFLM does.

    lm-eval's command line always asks for one (`cuda:0`), also on a machine without CUDA.
    """
    state = process_state()
    if device is None or state.num_processes > 1:
        return torch.device(state.device)
    try:
        asked = torch.device(device)
        module = torch.get_device_module(asked)
        if module.is_available() and (asked.index or 0) < module.device_count():
            return asked
    except RuntimeError:  # the name is not that of a device, or this torch was built without it
        pass
    logger.warning("this machine has no device %s: the model runs on %s", device, state.device)
    return torch.device(state.device)


def with_bos(tokenizer: PreTrainedTokenizerBase, wanted: bool) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer that begins texts with BOS, or with nothing."""
    if wanted and tokenizer.bos_token_id is None:
        raise RefineError("add_bos_token=True, and the tokenizer has no BOS token; set tokenizer.bos_token")
    own = copy.deepcopy(tokenizer)
    own.add_bos_token = bool(wanted)
    if leading_tokens(own) != ([own.bos_token_id] if wanted else []):
        raise RefineError(f"{type(tokenizer).__name__} does not do add_bos_token={wanted}; leave it out, or set it up so")
    return own


@dataclass(frozen=True)
class Settings:
    """Say how an answer is generated.

    Attributes:
        decoding: how our own decoding samples; None: transformers' `generate` runs with `options`.
        until: stop strings, EOS among them.
        budget: the most tokens to generate.
        max_length: tokens of prompt and answer together, used in place of the budget; None: the budget counts.
    """

    decoding: Decoding | None
    options: dict[str, object]
    until: list[str]
    budget: int
    max_length: int | None

    def for_prompt(self, tokens: int) -> Settings:
        """Return the settings for an answer behind a prompt of so many tokens."""
        if self.max_length is None:
            return self
        if self.max_length <= tokens:
            raise RefineError(f"max_length={self.max_length} counts prompt and answer, and the prompt has {tokens} tokens")
        return replace(self, budget=self.max_length - tokens, max_length=None)


def read_settings(asked: dict[str, object], own: GenerationConfig, eos: str | None, seed: int) -> Settings:
    """Read the generation settings of a request as HFLM does: those `asked` for, else as in the model's `own` configuration.

    A setting that is unknown, or whose value makes no sense, is a RefineError.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    known = (*vars(GenerationConfig()), *LM_EVAL_SETTINGS)
    if unknown := [name for name in given if name not in known]:
        raise RefineError(f"no generation setting {unknown[0]!r}{closest(unknown[0], known)}")
    try:
        normal: dict[str, Any] = dict(normalize_gen_kwargs(given, DEFAULT_NEW_TOKENS))
        until, budget = handle_stop_sequences(normal.pop("until"), eos), normal.pop("max_gen_toks")
        max_length = None if (longest := normal.pop("max_length", None)) is None else int(longest)
        temperature = float(normal.pop("temperature", 0.0))
    except (ValueError, TypeError) as error:
        raise RefineError(f"generation settings {given}: {first_line(error)}") from error
    if budget < 0 or not all(isinstance(stop, str) for stop in until):
        raise RefineError(f"generation settings {given}: expected strings to stop at and a number of tokens that is not negative")
    if normal["do_sample"]:
        normal["temperature"] = temperature
    special = _special(normal, own)
    decoding = _decoding(normal, own, seed)
    return Settings(None if special else decoding, normal if special else {}, until, budget, max_length)


def _special(normal: dict[str, Any], own: GenerationConfig) -> bool:
    """Tell whether a setting, of the request or of the model's configuration, is one that our own decoding does not follow."""
    of_model = {name: value for name, value in own.to_diff_dict().items() if name not in OF_NO_EFFECT}
    found = {
        name: value for name, value in {**of_model, **normal}.items()
        if name not in OWN_SETTINGS and value is not None and value is not False and value != NEUTRAL.get(name)
    }  # fmt: skip
    if several := [name for name in SEVERAL if name in found]:
        raise RefineError(f"{several[0]}={found[several[0]]!r}: a request has one answer; leave it out")
    return bool(found)


def _decoding(normal: dict[str, Any], own: GenerationConfig, seed: int) -> Decoding:
    if not normal["do_sample"]:
        neutral = {"top_k": (0, 1, 50), "top_p": (1,)}
        if unused := [name for name, values in neutral.items() if normal.get(name, values[0]) not in values]:
            warning_once(logger, f"answers are greedy, so {' and '.join(unused)} changes nothing: set a temperature to sample")
        return Decoding()
    top_k = next(value for value in (normal.get("top_k"), own.top_k, 50) if value is not None)
    top_p = next(value for value in (normal.get("top_p"), own.top_p, 1.0) if value is not None)
    if not normal["temperature"] > 0:
        raise RefineError(f"do_sample=True needs a temperature above 0, got {normal['temperature']}; set one, or do_sample=False")
    if not 0 < float(top_p) <= 1:
        raise RefineError(f"top_p must be above 0 and at most 1, got {top_p}")
    decoding = Decoding(False, normal["temperature"], top_k, seed, float(top_p))
    try:
        decoding.warpers()
    except ValueError as error:
        raise RefineError(f"generation settings {normal}: {first_line(error)}") from error
    return decoding


def stop_check(tokenizer: PreTrainedTokenizerBase, until: list[str]) -> Callable[[list[int]], bool]:
    """Make a function that tells whether the tokens of an answer end with a stop string; like HFLM it sees special tokens too."""
    stops = [stop for stop in until if stop]
    # A stop string may be spelled by other tokens than its own encoding. Like lm-eval, this looks at two tokens more.
    window = 2 + max((len(encode_text(tokenizer, stop)) for stop in stops), default=0)

    def stopped(tokens: list[int]) -> bool:
        text = str(tokenizer.decode(tokens[-window:]))
        return any(stop in text for stop in stops)

    return stopped
