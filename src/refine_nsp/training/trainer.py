"""ReFINE in transformers' Trainer (paper, section 3.5: mid-training), with everything else left to the Trainer.

The trainer draws, counts, normalises and logs; what is learned is a `Phase`. One optimizer step is one or more micro-batches; losses are
normalised by what the whole accumulation holds, and every sequence has randomness of its own, seeded by (seed, step, its index in the
step): so 1 x 8 equals 8 x 1, on any number of processes, and a resumed run is the uninterrupted one. `update` makes further optimizer
steps between the Trainer's own, by the same calls.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import DistributedType, parse_flag_from_env
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback
from transformers import ProgressCallback as TqdmCallback

from refine_nsp.config import NSPConfig, RewardSpec
from refine_nsp.errors import RefineError
from refine_nsp.models.load import check_vocabulary
from refine_nsp.models.protocols import CausalModel
from refine_nsp.ops.memory import part
from refine_nsp.processes import to_device
from refine_nsp.training.arguments import ReFINEConfig
from refine_nsp.training.callbacks import NonFiniteGuard, ProgressCallback, StopCallback
from refine_nsp.training.completions import show_completions
from refine_nsp.training.data import collate
from refine_nsp.training.given import model_given, tokenized, with_rewards
from refine_nsp.training.micro_batches import Places, of_one_width, places_of, set_totals, share_of_batches, to_batch
from refine_nsp.training.phases import PHASES, MicroBatch, Phase
from refine_nsp.training.problems import check_best_figure, for_shards, rounding_problem
from refine_nsp.training.resuming import ResumingTrainer
from refine_nsp.training.sampling import ByLength, lengths_of
from refine_nsp.training.scores import scored_by_processes
from refine_nsp.training.settings import check_arguments, check_machine
from refine_nsp.training.stream import Stream, check_streaming

P = TypeVar("P", bound=Phase)


class ReFINETrainer(ResumingTrainer):
    """Mid-training with ReFINE, or with the cross-entropy alone (`objective="ntp"`): the same run, one setting apart.

    Args:
        model: a causal model of this package (PEFT-wrapped is fine), or what `refine_nsp.load` takes: a name or a folder.
        args: a `ReFINEConfig`.
        train_dataset: rows of `input_ids` (and `lengths` when packed; other columns are handed to rewards), or of `text`, which is cut into
            windows of `max_length` tokens. eval_dataset: the same.
        processing_class: the tokenizer, for text, tables of completions and the vocabulary check; of a model by name its own.
        reference_model: frozen model, needed when `kl_coef` > 0.
        phase: an objective of your own instead of `args.objective`.
        reward_funcs: instead of those in `args`. peft_config: PEFT's, of adapters that alone are trained.

    Raises:
        RefineError: a tokenizer with more tokens than the model, or settings that do not fit together.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module | str | Path | None = None,
        args: ReFINEConfig | None = None,
        reference_model: CausalModel | None = None,
        phase: Phase | None = None,
        reward_funcs: RewardSpec | Sequence[RewardSpec] | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(kwargs)
        args = with_rewards(args if args is not None else ReFINEConfig(output_dir="runs/refine"), reward_funcs)
        check_machine(args)
        model, kwargs["processing_class"] = model_given(model, kwargs.get("processing_class"), peft_config, args)
        if kwargs.setdefault("data_collator", collate) is collate:
            for name in ("train_dataset", "eval_dataset"):
                kwargs[name] = tokenized(kwargs.get(name), kwargs["processing_class"], args)
        if model is not None and kwargs["processing_class"] is not None:
            check_vocabulary(model, kwargs["processing_class"])
        args.remove_unused_columns = False
        if isinstance(kwargs.get("train_dataset"), IterableDataset):
            check_streaming(args)
        super().__init__(model, args, **kwargs)
        if (args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")) and not self.is_fsdp_enabled:
            warnings.warn(
                "FSDP was asked for, but accelerate shards models only over several processes that have an accelerator each: every process "
                "holds the whole model",
                stacklevel=2,
            )
        if self._is_sharded and args.objective == "refine":
            asked, args.nsp = args.nsp.schedule, for_shards(self.model, args.nsp)
            if args.nsp.schedule != asked and self.is_world_process_zero():
                warnings.warn(f"schedule='snapshot' in the place of {asked!r}, since weights lie in shards", stacklevel=2)
        self.nsp: NSPConfig = args.nsp
        # FSDP widens weights where products are narrower.
        widened = self.is_fsdp_enabled and args.mixed_precision != "no"
        if (
            not widened
            and self.is_world_process_zero()
            and (problem := rounding_problem(self.model, args.learning_rate)) is not None
        ):
            warnings.warn(problem, stacklevel=2)
        self.reference_model = reference_model
        if reference_model is not None:
            to_device(reference_model, args.device).eval()
        self.phase = self.shared(phase if phase is not None else self.make_phase())
        if args.context_scores == "cached" and self.phase.reads_scores and self.train_dataset is not None:
            quiet = bool(args.disable_tqdm) or not self.is_world_process_zero()
            self.train_dataset = scored_by_processes(self.train_dataset, self.model, self.nsp, args, quiet)
        if isinstance(self.train_dataset, IterableDataset):
            # As far as steps and data loaders read ahead.
            self.train_dataset = Stream(self.train_dataset, self.dealing.examples, keep=args.steps_per_generation + 3)
        check_best_figure(args.metric_for_best_model, self.phase, self.eval_dataset)
        self._replace_callbacks()
        self._shown_at = -1

    def _replace_callbacks(self) -> None:
        """Our progress instead of transformers', the guard, and a clean end when asked to stop."""
        self.guard, self.bar = NonFiniteGuard(self.args.max_skipped_steps), ProgressCallback()
        self.stop = StopCallback(self._sum_over)
        for replaced in (TqdmCallback, PrinterCallback):
            self.remove_callback(replaced)
        for callback in (self.guard, self.stop, self.bar):
            self.add_callback(callback)

    def make_phase(self) -> Phase:
        """What `args.objective` names."""
        return PHASES[self.args.objective](self.nsp, self.reference_model)

    def shared(self, phase: P) -> P:
        """A phase that knows how to add up over the processes of this run."""
        phase.sum_over = self._sum_over
        return phase

    @property
    def _sum_over(self) -> Callable[[Tensor], Tensor] | None:
        """Return `sum_over_processes`; None where there is one process."""
        return self.sum_over_processes if self.args.world_size > 1 else None

    def sum_over_processes(self, x: Tensor) -> Tensor:
        """The sum of all processes' x; every process must ask for it."""
        return self.accelerator.reduce(x, reduction="sum")

    def get_train_dataloader(self) -> DataLoader:
        """As the Trainer's, but batches come as they are collated: accelerate would send lengths to the device with them, only to be
        asked for them again, and wait for each tensor. What is sent, `to_batch` sends."""
        placing = self.accelerator.device_placement
        self.accelerator.device_placement = placing and bool(vars(self.args.accelerator_config)["dispatch_batches"])  # needs it
        try:
            return super().get_train_dataloader()
        finally:
            self.accelerator.device_placement = placing

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As the Trainer's, but for rows of like lengths together: then the epoch alone decides the order, so that a resumed run has it."""
        data = train_dataset if train_dataset is not None else self.train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ByLength(lengths_of(data, self.args.length_column_name), self.dealing.examples, seed)

    # --- an optimizer step: draw, prepare, count ----------------------------------------------------------------------
    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        """The micro-batches of one optimizer step, prepared and counted; none where a resumed run had made all of its steps."""
        if self.state.global_step >= self.state.max_steps:
            # The Trainer would make one step more: it asks after a step whether it was the last.
            self._restored = None
            self.control.should_training_stop = True
            return [], None
        if self._restored is not None:
            # The interrupted run had drawn these from the data loader already.
            self._pending, drawn = self._restored, len(self._restored)
            self._restored = None
            for _ in range(drawn):
                next(epoch_iterator, None)
        if not self._pending:
            steps = self.args.steps_per_generation if self.phase.prepares_steps else 1
            self._pending = self._draw(epoch_iterator, num_batches * steps, device)
            start = time.perf_counter()
            self.prepare(self.phase, self._pending)
            if self.phase.prepares_steps:
                self.figures.add("seconds_generation", time.perf_counter() - start)
        batches, self._pending = self._pending[:num_batches], self._pending[num_batches:]
        self.set_totals(self.phase, batches)
        # The Trainer counts tokens by these, where it is asked to.
        masks = [
            {"attention_mask": b.sequences.real} if self.args.include_num_input_tokens_seen == "non_padding" else {}
            for b in batches
        ]
        return [{"batch": b, "input_ids": b.input_ids, **mask} for b, mask in zip(batches, masks, strict=True)], None

    def _draw(self, epoch_iterator: Iterator[dict[str, Any]], count: int, device: torch.device) -> list[MicroBatch]:
        batches: list[MicroBatch] = []
        for _ in range(count):
            inputs = next(epoch_iterator, None)
            if inputs is None:
                break
            generators = self.generators(self.state.global_step, len(batches), places_of(inputs))
            batches.append(self.micro_batch(inputs, generators, device))
        if not self._is_sharded or not batches:
            return batches
        return of_one_width(batches, self.accelerator.gather, self.args.device)

    def micro_batch(self, inputs: Mapping[str, Any], generators: Sequence[torch.Generator], device: torch.device) -> MicroBatch:
        """What a phase gets of a collated batch."""
        return MicroBatch(to_batch(inputs, device), generators)

    def generators(self, step: int, drawn: int, places: Places) -> list[torch.Generator]:
        """Make the generators of a micro-batch's rows, as `Dealing.generators` does, for this process."""
        return self.dealing.generators(self.args.seed, step, self.args.process_index, drawn, places)

    @torch.no_grad()
    def prepare(self, phase: Phase, batches: Sequence[MicroBatch]) -> None:
        """What a phase does before the steps on `batches`, by the model as it is: in eval mode, whatever the last step left."""
        if batches:
            self.model.eval()
            with part("rollouts"):
                phase.prepare(self.model_wrapped, batches)

    def set_totals(self, phase: Phase, batches: Sequence[MicroBatch]) -> None:
        """Tell the micro-batches what the sums of their optimizer step are divided by, over all processes."""
        set_totals(phase, batches, self._sum_over, self.args.world_size, self.args.device)

    # --- the loss -----------------------------------------------------------------------------------------------------
    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's share of the loss of its optimizer step: the Trainer's own, or one of `update`."""
        batch: MicroBatch = inputs["batch"]
        if "phase" in inputs:
            return self.phase_loss(inputs["phase"], model, batch, inputs["shares"], inputs["prefix"])
        self.bar.tokens_this_step += batch.num_tokens
        self.figures.tokens += batch.num_tokens
        loss = self.phase_loss(self.phase, model, batch, self.current_gradient_accumulation_steps)
        self._show(batch)
        return (loss, batch.result) if return_outputs else loss

    def phase_loss(self, phase: Phase, model: nn.Module, batch: MicroBatch, shares: int, prefix: str = "") -> Tensor:
        """The loss as one forward call, so that wrappers see it; its figures are kept for the next log."""
        with part("forward"):
            loss, metrics = model(step=lambda m: phase.loss(m, batch))
        for name, value in metrics.items():
            # A share of the step's mean; logged values are averaged over micro-batches, so undo the sharing.
            self.figures.add(prefix + name, value * shares if name.startswith("loss") else value)
        return loss

    def update(self, phase: Phase, batches: Sequence[MicroBatch], prefix: str) -> None:
        """An optimizer step of another phase between the Trainer's own, by the calls that make those: accumulated without
        synchronising, scaled, clipped, skipped where the gradient is not finite. `prefix`: of its figures' names."""
        model, accelerator = self.model_wrapped, self.accelerator
        assert self.optimizer is not None
        self.set_totals(phase, batches)
        outer = accelerator.sync_gradients  # of the micro-batch that the Trainer is about to run
        try:
            for i, batch in enumerate(batches):
                last = i == len(batches) - 1
                accelerator.sync_gradients = last
                with nullcontext() if last or self._always_synchronises() else accelerator.no_sync(model), part("backward"):
                    super().training_step(model, {"batch": batch, "phase": phase, "shares": len(batches), "prefix": prefix})
            # Without a limit too: this is what takes the loss scale out of the gradients, before the guard judges them.
            accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm or math.inf)
            self.guard.on_pre_optimizer_step(self.args, self.state, self.control, model=model)
            self.optimizer.step()
            model.zero_grad()
        finally:
            accelerator.sync_gradients = outer

    def _always_synchronises(self) -> bool:
        """Whether every micro-batch is synchronised, for the reasons that the Trainer has."""
        each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        return bool(each) or self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        start = time.perf_counter()
        with part("backward"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.figures.add("seconds_step", time.perf_counter() - start)
        return loss

    # --- logs and validation ------------------------------------------------------------------------------------------
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does, with the means of what the steps since the last log gave."""
        if "loss" in logs or "train_runtime" in logs:
            means = self.figures.means(self.phase.prepares_steps, self.args.world_size)
            logs = {**logs, **means, "skipped_steps": self.guard.skipped}
            if self.state.global_step == self._begun_at:
                logs.pop("train_loss", None)  # a mean over no step
        super().log(logs, start_time)

    def _show(self, batch: MicroBatch) -> None:
        due = self.args.log_completions and self.state.global_step % max(1, int(self.args.logging_steps)) == 0
        if due and batch.result is not None and self.state.global_step != self._shown_at and self.is_world_process_zero():
            self._shown_at = self.state.global_step
            show_completions(
                self.processing_class, batch.input_ids, batch.result, self.run_folder, self.state.global_step,
                self.args.num_completions_to_print, quiet=bool(self.args.disable_tqdm),
            )  # fmt: skip

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The phase's figures on the validation set; of the usual phases: NTP loss, accuracy of the argmax and (expected) of a sampled
        token, entropy, greedy K-token match, mean cosine."""
        given = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(given, Mapping):
            named = [self.evaluate(data, ignore_keys, f"{metric_key_prefix}_{name}") for name, data in given.items()]
            return {name: value for figures in named for name, value in figures.items()}
        self._memory_tracker.start()
        start = time.perf_counter()
        batches = self.validation_batches(given)
        model = self._wrap_model(self.model, training=False)
        model.eval()
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "eval", None)):
            optimizer.eval()  # a schedule-free one then shows the weights that it would end with
        with part("validation"):
            sums = model(step=lambda m: self.phase.validate(m, batches))
        keys = sorted(sums)
        total = torch.tensor([sums[k] for k in keys], dtype=torch.float64, device=self.args.device)
        if self.args.world_size > 1 and not self._is_sharded:
            total = self.sum_over_processes(total)
        figures = self.phase.summarise(dict(zip(keys, total.tolist(), strict=True)))
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in figures.items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: validation keeps no predictions."""
        raise RefineError("predict has no place here: use evaluate, generate(), or `refine-nsp evaluate`")

    @property
    def _is_sharded(self) -> bool:
        """Whether a forward pass needs the other processes, which hold parts of the weights."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def validation_batches(self, data: Dataset | str) -> Iterator[dict[str, Any]]:
        """Collate this process' share of the validation rows; all of them where the model is sharded, whose processes must run together."""
        if isinstance(data, str):
            assert isinstance(self.eval_dataset, Mapping)
            data = self.eval_dataset[data]
        process, processes = (0, 1) if self._is_sharded else (self.args.process_index, self.args.world_size)
        return share_of_batches(data, self.data_collator, self.args.per_device_eval_batch_size, process, processes)
