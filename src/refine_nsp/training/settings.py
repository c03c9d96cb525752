"""Settings of transformers' Trainer are honoured, or refused by name before anything is loaded: those that nothing here could read, and
those that do not go together. Where it is plain which value is meant, that is taken: `1e-4` in YAML is text."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
import warnings
from collections.abc import Callable, Mapping
from typing import cast, get_type_hints

import torch
from torch import nn
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.debug_utils import DebugOption
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames

from refine_nsp.errors import RefineError, closest, first_line
from refine_nsp.values import accepted

_PREDICTIONS = "validation here sums figures up and keeps no predictions, labels or metrics of your own"
# Settings that nothing here could read, and why; each is refused at any value but its default.
NO_PLACE = {
    "label_smoothing_factor": "the losses are of the true tokens, whose cross-entropy is taken by blocks without their logits being kept",
    "average_tokens_across_devices": "a token weighs the same on every process, so that results do not depend on their number",
    "use_liger_kernel": "its kernels are not for these models, whose own are chosen when they are loaded (`refine-nsp env`)",
    "liger_kernel_config": "Liger's kernels are not for these models",
    "bf16_full_eval": "validation is by the model as it trains; bf16 makes its matrix products in bfloat16",
    "fp16_full_eval": "validation is by the model as it trains; fp16 makes its matrix products in float16",
    "eval_accumulation_steps": _PREDICTIONS,
    "eval_do_concat_batches": _PREDICTIONS,
    "eval_use_gather_object": _PREDICTIONS,
    "include_for_metrics": _PREDICTIONS,
    "batch_eval_metrics": _PREDICTIONS,
    "label_names": _PREDICTIONS,
    "do_predict": f"{_PREDICTIONS}; `refine-nsp evaluate` and `refine-nsp generate` answer",
    "enable_jit_checkpoint": "a run that gets SIGTERM saves a checkpoint after its step anyway",
    "parallelism_config": "tensor, context and sequence parallelism would cut what a state is carried through; use DDP, FSDP or DeepSpeed",
}
# Arguments of the Trainer itself are refused likewise.
NO_ARGUMENT = {
    "compute_loss_func": "the loss is a phase's: give phase=, a subclass of refine_nsp.training.phases.Phase",
    "compute_metrics": f"{_PREDICTIONS}: give phase=, whose validate and summarise make the figures",
    "preprocess_logits_for_metrics": f"{_PREDICTIONS}: give phase=, whose validate and summarise make the figures",
}
BY_MODEL = ("galore", "apollo", "lomo", "adalomo")  # optimizers whose settings are known with a model only
ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
DEFAULTS = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
ON_A_FIGURE = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)  # schedules that follow a figure of validation
OURS = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}  # arguments of a schedule that the Trainer gives it


def take_as_meant(args: TrainingArguments) -> None:
    """Set the fields of arguments to what is meant by them, before transformers looks at them."""
    hints = get_type_hints(type(args))
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        accepts = accepted(hints[field.name])
        if isinstance(value, str) and value.startswith("{") and "mapping" in accepts.kinds:
            try:
                value = json.loads(value)  # other text is a file's name
            except ValueError as error:
                raise RefineError(f"{field.name} is {value[:80]!r}, which is no JSON: {first_line(error)}") from error
        setattr(args, field.name, accepts.meant(field.name, value))
    if args.report_to is None or args.report_to == [None]:
        args.report_to = "none"
    if args.warmup_steps and args.lr_scheduler_type == SchedulerType.CONSTANT:
        args.lr_scheduler_type = SchedulerType.CONSTANT_WITH_WARMUP.value  # the other would leave it out
    if args.bf16 and not torch.accelerator.is_available():
        args.use_cpu = True  # there is nothing else, and transformers wants it said


def check_places(args: TrainingArguments) -> None:
    """Refuse settings that nothing here could read, at another value than their default (RefineError)."""
    for name, why in NO_PLACE.items():
        if (value := getattr(args, name)) != DEFAULTS[name] and value not in ([], {}, None):
            raise RefineError(f"{name}={value!r} has no place here: {why}; leave it out")


def check(args: TrainingArguments, rate: float) -> None:
    """Refuse settings that would not be honoured, by name (RefineError): one that another leaves without effect, or that a schedule or an
    optimizer cannot be made of. `rate` is the learning rate that a schedule begins with."""
    if DebugOption.TPU_METRICS_DEBUG in args.debug:
        raise RefineError("debug='tpu_metrics_debug' has no place here: validation does not print TPU metrics; leave it out")
    _check_loading(args)
    _check_schedule(args, rate)
    _check_optimizer(args)


def check_machine(args: TrainingArguments) -> None:
    """Refuse what this machine cannot do, before anything is loaded (RefineError): loss scaling on a CPU, or an optimizer whose package is
    not installed. Settings may also be for another machine (`refine-nsp estimate`)."""
    if args.fp16 and args.device.type == "cpu":
        raise RefineError("fp16=True needs a GPU, and this run is on the CPU; use bf16=True, or neither")
    optim = OptimizerNames(args.optim).value
    try:
        _made(args)
    except Exception as error:  # each optimizer has its own kinds
        if not optim.startswith(BY_MODEL) or isinstance(error, ImportError):  # otherwise only the model is missing
            raise RefineError(f"optim={optim!r} cannot be made: {first_line(error)}") from error


def check_arguments(given: Mapping[str, object]) -> None:
    """Refuse arguments of transformers' Trainer that a phase takes the place of (RefineError)."""
    for name, why in NO_ARGUMENT.items():
        if given.get(name) is not None:
            raise RefineError(f"{name} has no place here: {why}")


def _check_loading(args: TrainingArguments) -> None:
    """Refuse settings of data loading that would have no effect, or leave processes with steps of their own (RefineError)."""
    if args.dataloader_num_workers == 0:
        for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
            if value := getattr(args, name):
                raise RefineError(f"{name}={value!r} needs processes that read data: set dataloader_num_workers, or leave it out")
    if args.train_sampling_strategy not in (known := ("random", "sequential", "group_by_length")):
        raise RefineError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} is not one of {', '.join(known)}"
            f"{closest(args.train_sampling_strategy, known)}; batch_rebalance makes batches of different sizes, and examples here are "
            "drawn by their place in a batch"
        )
    if args.length_column_name != "length" and args.train_sampling_strategy != "group_by_length":
        raise RefineError(
            f"length_column_name={args.length_column_name!r} is read by train_sampling_strategy='group_by_length' alone; leave it out"
        )
    config = args.accelerator_config
    if isinstance(config, AcceleratorConfig):
        if not config.even_batches:
            raise RefineError(
                "accelerator_config: even_batches=False would leave processes with steps of their own; leave it out"
            )
        for name in set(config.gradient_accumulation_kwargs or {}) - {"sync_each_batch"}:
            raise RefineError(
                f"accelerator_config: gradient_accumulation_kwargs has {name!r}, which nothing here reads; expected sync_each_batch (the "
                "number of steps is gradient_accumulation_steps)"
            )


def _check_schedule(args: TrainingArguments, rate: float) -> None:
    """Refuse a schedule that cannot be made of `lr_scheduler_kwargs`, or would not read some of them or the warm-up (RefineError)."""
    kind, given = SchedulerType(args.lr_scheduler_type), args.lr_scheduler_kwargs or {}
    how = "; in YAML lr_scheduler_kwargs: {NAME: VALUE}, as a flag --lr_scheduler_kwargs '{\"NAME\": VALUE}'"
    if not isinstance(given, dict):
        raise RefineError(f"lr_scheduler_kwargs is {given!r}; expected a mapping{how}")
    takes = _arguments_of(kind)
    for name in given:
        if name not in takes:
            known = f"; it takes {', '.join(takes)}" if takes else "; it takes none"
            raise RefineError(
                f"lr_scheduler_type={kind.value} does not take {name!r} in lr_scheduler_kwargs{closest(name, takes)}{known}"
            )
    if args.warmup_steps and kind in ON_A_FIGURE:
        raise RefineError(
            f"warmup_steps={args.warmup_steps:g}: lr_scheduler_type={kind.value} has no warm-up by steps; leave it out"
        )
    if missing := [name for name, p in takes.items() if p.default is inspect.Parameter.empty and name not in given]:
        raise RefineError(f"lr_scheduler_type={kind.value} needs {', '.join(missing)}{how.replace('NAME', missing[0])}")
    try:
        _try_schedule(args, kind, given, rate)
    except Exception as error:  # each kind refuses its arguments in its own words
        said = " ".join(str(error).split())
        named = next((name for name in takes if re.search(rf"\b{name}\b", said)), "NAME")
        raise RefineError(f"lr_scheduler_type={kind.value} cannot be made: {said}{how.replace('NAME', named)}") from error


def _arguments_of(kind: SchedulerType) -> dict[str, inspect.Parameter]:
    """Return the parameters that a schedule takes in `lr_scheduler_kwargs`."""
    by_figure = {SchedulerType.GREEDY: GreedyLR, SchedulerType.REDUCE_ON_PLATEAU: torch.optim.lr_scheduler.ReduceLROnPlateau}
    made = cast(Callable[..., object], by_figure.get(kind, TYPE_TO_SCHEDULER_FUNCTION[kind]))
    parameters = inspect.signature(made).parameters
    return {name: p for name, p in parameters.items() if name not in OURS}


def _try_schedule(args: TrainingArguments, kind: SchedulerType, given: Mapping[str, object], rate: float) -> None:
    """Make the schedule on an optimizer of no use, and take one step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    steps = args.max_steps if args.max_steps > 0 else 1000
    warmup = args.get_warmup_steps(steps)
    schedule = get_scheduler(kind, optimizer, warmup, steps, dict(given))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would say that the optimizer made no step before
        schedule.step(*([1.0] if kind in ON_A_FIGURE else []))


def _check_optimizer(args: TrainingArguments) -> None:
    """Refuse an optimizer that updates weights before a step is whole, or that would not read a setting (RefineError)."""
    optim = OptimizerNames(args.optim).value
    if "layerwise" in optim or "lomo" in optim:
        raise RefineError(
            f"optim={optim!r} changes weights while gradients are still computed, where neither max_grad_norm nor the skipping of updates "
            "that are not finite can act; use another"
        )
    by_model = optim.startswith(BY_MODEL)
    if args.optim_target_modules is not None and not by_model:
        raise RefineError(f"optim_target_modules={args.optim_target_modules!r} is not read by optim={optim!r}; leave it out")
    pairs = [pair.partition("=") for pair in (args.optim_args or "").replace(" ", "").split(",") if pair]
    if not all(name and value for name, _, value in pairs):
        raise RefineError(f"optim_args is {args.optim_args!r}; expected name=value, several with commas between them")
    try:
        _made(args)
    except Exception:  # its package or its model is not here yet; `check_machine` says so
        return
    for name, _, value in pairs:
        if not _reads(args, "optim_args", (f"{name}=0", f"{name}=1")):
            raise RefineError(f"optim_args: {name}={value} is not read by optim={optim!r}; leave it out")
    for name in ADAM:
        if getattr(args, name) != DEFAULTS[name] and not _reads(args, name, (0.25, 0.5)):
            raise RefineError(f"{name}={getattr(args, name)} is not read by optim={optim!r}; leave it out")


def _made(args: TrainingArguments, **changed: object) -> tuple[object, Mapping[str, object]]:
    """Return the optimizer's class and its arguments as they would be with some settings changed."""
    altered = copy.copy(args)
    vars(altered).update(changed)
    return Trainer.get_optimizer_cls_and_kwargs(altered, None)


def _reads(args: TrainingArguments, name: str, values: tuple[object, object]) -> bool:
    """Tell whether it matters to the optimizer which of two values a setting has."""
    try:
        first, second = (_made(args, **{name: value}) for value in values)
        return bool(first != second)
    except Exception:  # then it reads the setting, and refuses a value
        return True
