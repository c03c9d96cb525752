"""A run's teacher is loaded as any model is, checked against the student, and otherwise left alone: frozen, whole on every process, never
saved."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from refine_nsp.errors import RefineError
from refine_nsp.models import attends_only, sees_tokens, window_problem
from refine_nsp.models.adapters import without_adapters
from refine_nsp.models.load import Configured, check_vocabulary, load_config, load_model, load_tokenizer
from refine_nsp.models.protocols import CausalModel
from refine_nsp.models.room import PARTIAL_LOADING
from refine_nsp.nsp.teacher import Teacher
from refine_nsp.processes import to_device


def load_teacher(name: str, tokenizer: PreTrainedTokenizerBase | None, student: nn.Module, device: torch.device) -> Teacher:
    """Load a teacher by its name or folder, in the dtype of its checkpoint, in eval mode and frozen. RefineError where it cannot be loaded,
    or has another vocabulary than the student."""
    check_tokens(name, tokenizer, student)
    if is_deepspeed_zero3_enabled():
        raise RefineError(
            f"teacher={name!r}: DeepSpeed's stage 3 would share out its weights too, which every process needs whole; use stage 2, FSDP or "
            "DDP"
        )
    with _whole():
        model = cast(CausalModel, load_model(name))
    return teacher_of(to_device(model, device))


def teacher_of(model: CausalModel) -> Teacher:
    """Make a teacher of a loaded model, which is frozen; how it is read in a window depends on its layers."""
    model.eval().requires_grad_(False)
    masked = attends_only(model.model)
    if masked and (problem := window_problem(model.model)) is not None:
        masked = False
        warnings.warn(
            f"teacher {model.model.label}: its attention cannot be given a window by masks ({problem}); what it predicts without far "
            "context is read in local windows instead",
            stacklevel=2,
        )
    return Teacher(model, masked)


@contextmanager
def _whole() -> Iterator[None]:
    """Have every process read all weights, whatever holds for the model that FSDP is to share out."""
    before = os.environ.get(PARTIAL_LOADING)
    os.environ[PARTIAL_LOADING] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARTIAL_LOADING]
        else:
            os.environ[PARTIAL_LOADING] = before


def check_tokens(name: str, tokenizer: PreTrainedTokenizerBase | None, student: nn.Module) -> None:
    """Refuse a teacher whose ids mean other tokens than the student's (RefineError). Tokens and their ids are compared, not files; without
    a tokenizer, the sizes of the vocabularies."""
    config = load_config(name).get_text_config(decoder=True)
    own = cast(Configured, student).config
    called = own.name_or_path or "the student"
    if tokenizer is None:
        if config.vocab_size != own.vocab_size:
            raise RefineError(
                f"the teacher {name} has a vocabulary of {config.vocab_size} tokens and {called} one of {own.vocab_size}; expected a "
                "teacher with the student's tokenizer"
            )
        return
    theirs = load_tokenizer(name)
    check_vocabulary(_Holder(config), theirs)
    ids, other_ids = tokenizer.get_vocab(), theirs.get_vocab()
    if ids == other_ids:
        return
    token = min((t for t in ids.keys() | other_ids.keys() if ids.get(t) != other_ids.get(t)), key=lambda t: ids.get(t, len(ids)))
    raise RefineError(
        f"the teacher {name} has another tokenizer ({len(other_ids):,} tokens) than {tokenizer.name_or_path or called} ({len(ids):,}): "
        f"{token!r} is {other_ids.get(token, 'no token')} there and {ids.get(token, 'no token')} here; expected a teacher with the "
        "student's tokenizer"
    )


class _Holder:
    """Holds a configuration where a model is asked for it."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config


def window_of_student(student: nn.Module, given: int | None) -> int:
    """Return how many tokens the student's attention sees: as given, or as its configuration says (`window_size` of LaCT); RefineError
    where neither says."""
    if given is not None:
        return given
    model = cast(CausalModel, without_adapters(student))
    own = model.config.to_dict().get("window_size")
    if own is None and attends_only(model.model):
        own = sees_tokens(model.config)
    if isinstance(own, int):
        return own
    raise RefineError(
        f"teacher_window: {model.model.label} has no window of its own; give the tokens that a prediction may need without counting as far "
        "context"
    )


def check_window(window: int, max_length: int, teacher: Teacher, name: str) -> None:
    """Refuse a window beyond which there is nothing to learn (RefineError)."""
    if max_length <= window:
        raise RefineError(
            f"max_length={max_length} is not longer than the window of {window} tokens, so nothing lies beyond it; raise max_length, or "
            "lower teacher_window"
        )
    sees = sees_tokens(teacher.model.config) if teacher.masked else None
    if sees is not None and sees <= window:
        raise RefineError(
            f"the teacher {name} itself sees no more than {sees} tokens, and the window is {window}; expected a teacher that sees farther"
        )
