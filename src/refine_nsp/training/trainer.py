"""The trainer takes ReFINE into transformers' Trainer (paper, section 3.5: mid-training), and leaves everything else to that.

It draws, counts, normalises and logs; what is learned is a `Phase`. One optimizer step is one or more micro-batches. Losses are divided by
what the whole accumulation holds, and every sequence has randomness of its own, seeded by (seed, step, its index in the step): so 1 x 8
equals 8 x 1 on any number of processes, and a resumed run is the uninterrupted one.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback
from transformers import ProgressCallback as TqdmCallback

from refine_nsp.config import NSPConfig, RewardSpec
from refine_nsp.errors import RefineError
from refine_nsp.files import append_json_lines
from refine_nsp.models.load import check_vocabulary
from refine_nsp.models.protocols import CausalModel
from refine_nsp.nsp.records import StepResult
from refine_nsp.nsp.schedule import Needs, with_schedule
from refine_nsp.nsp.seeds import generator_of
from refine_nsp.ops.memory import part
from refine_nsp.processes import to_device
from refine_nsp.training.arguments import ReFINEConfig
from refine_nsp.training.callbacks import NonFiniteGuard, ProgressCallback, StopCallback
from refine_nsp.training.data import BEGINS_COLUMN, Collated, collate
from refine_nsp.training.memory_rate import TwoRates, check_memory
from refine_nsp.training.micro_batches import documents_in_lanes, of_one_width, places_of, set_totals, share_of_batches, to_batch
from refine_nsp.training.mixture import SOURCE_COLUMN
from refine_nsp.training.phases import PHASES, MicroBatch, Phase
from refine_nsp.training.remedies import VALIDATION
from refine_nsp.training.resuming import ResumingTrainer
from refine_nsp.training.row_order import ByLength, LaneOrder, lengths_of
from refine_nsp.training.run_checks import check_best_figure, check_carrying, check_reference, weights_problems
from refine_nsp.training.run_folder import COMPLETIONS_FILE, completion_rows, print_completions
from refine_nsp.training.scores import scored_by_processes
from refine_nsp.training.settings import check_arguments, check_machine
from refine_nsp.training.stream import LaneStream, Stream, check_streaming
from refine_nsp.training.taught import taught
from refine_nsp.training.teacher import load_teacher
from refine_nsp.training.trl_arguments import model_given, tokenized, with_rewards

# The Trainer hands these from `get_batch_samples` to `compute_loss`: `batch`, a MicroBatch; `input_ids` and perhaps `attention_mask`, by
# which it counts tokens; and in a step of `update` `loss`, which makes the loss of a model and a micro-batch.
StepInputs = dict[str, Any]


class ReFINETrainer(TwoRates, ResumingTrainer):
    """Train on long text with ReFINE, or with the cross-entropy alone (`objective="ntp"`): the same run, one setting apart.

    Args:
        model: a causal model of this package (PEFT-wrapped is fine), or a name or folder, as `refine_nsp.load` takes it.
        args: a `ReFINEConfig`.
        train_dataset: rows of `input_ids` (and `lengths` when packed; other columns are handed to rewards), or of `text`, which is cut into
            windows of `max_length` tokens. eval_dataset: the same.
        processing_class: the tokenizer, for text, tables of completions and the vocabulary check. Default: the one that a model by name
            comes with.
        reference_model: a frozen model, needed when `kl_coef` > 0.
        phase: an objective of your own instead of `args.objective`.
        reward_funcs: rewards instead of those in `args`.
        peft_config: PEFT's settings of adapters, which alone are trained then.

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
        peft_config: object = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(kwargs)
        args = with_rewards(args if args is not None else ReFINEConfig(output_dir="runs/refine"), reward_funcs)
        check_machine(args)
        if phase is None:
            check_reference(args, reference_model)
        model, kwargs["processing_class"] = model_given(model, kwargs.get("processing_class"), peft_config, args)
        if kwargs.setdefault("data_collator", collate) is collate:
            for name in ("train_dataset", "eval_dataset"):
                kwargs[name] = tokenized(kwargs.get(name), kwargs["processing_class"], args)
        self.teacher = None
        if model is not None:
            if kwargs["processing_class"] is not None:
                check_vocabulary(model, kwargs["processing_class"])
            check_memory(model, args, own_optimizer=any(kwargs.get("optimizers") or ()))
            if args.teacher is not None:
                self.teacher = load_teacher(args.teacher, kwargs["processing_class"], model, args.device)
        args.remove_unused_columns = False
        if isinstance(kwargs.get("train_dataset"), IterableDataset):
            check_streaming(args)
        super().__init__(model, args, **kwargs)
        if self._is_sharded and args.phase.samples:
            asked, args.nsp = args.nsp.schedule, with_schedule(args.nsp, Needs(shards=self.model))
            if args.nsp.schedule != asked and self.is_world_process_zero():
                warnings.warn(f"schedule='snapshot' in the place of {asked!r}, since weights lie in shards", stacklevel=2)
        if args.carry_states:
            check_carrying(self.accelerator.unwrap_model(self.model), args.carried_keys)
        self.nsp: NSPConfig = args.nsp
        for problem in weights_problems(self.model, args, bool(self.is_fsdp_enabled)) if self.is_world_process_zero() else []:
            warnings.warn(problem, stacklevel=2)
        self.reference_model = reference_model
        if reference_model is not None:
            to_device(reference_model, args.device).eval()
        self.phase = self.shared(phase if phase is not None else self.make_phase())
        check_best_figure(args.metric_for_best_model, self.phase, self.eval_dataset)
        self._prepare_data()
        self._replace_callbacks()
        self._shown_at = -1

    def _prepare_data(self) -> None:
        """Compute the context scores that are to be cached, and have streamed text note its places."""
        if self.args.context_scores != "online" and self.phase.reads_scores and self.train_dataset is not None:
            quiet = bool(self.args.disable_tqdm) or not self.is_world_process_zero()
            teacher = self.teacher if self.args.context_scores == "teacher" else None
            self.train_dataset = scored_by_processes(
                self.train_dataset, self.model, self.phase.scoring, self.args, quiet, teacher
            )
        if self.args.objective != "distill":
            self.teacher = None  # its scores are all that such a run reads
        if isinstance(self.train_dataset, IterableDataset):
            # Data loaders and the steps of a batch of rollouts read ahead by so many steps.
            rows = self.train_dataset, self.dealing.examples, self.args.steps_per_generation + 3
            self.train_dataset = LaneStream(*rows, self.n_lanes) if self.args.carry_states else Stream(*rows)

    def _replace_callbacks(self) -> None:
        """Show our progress instead of transformers', guard the gradients, and end cleanly when asked to stop."""
        self.guard, self.bar = NonFiniteGuard(self.args.max_skipped_steps), ProgressCallback()
        self.stop = StopCallback(self._sum_over)
        for replaced in (TqdmCallback, PrinterCallback):
            self.remove_callback(replaced)
        for callback in (self.guard, self.stop, self.bar):
            self.add_callback(callback)

    def make_phase(self) -> Phase:
        """Make the phase that `args.objective` names."""
        if self.args.objective in ("distill", "transfer"):
            return taught(self.args, self.accelerator.unwrap_model(self.model), self.teacher)
        return PHASES[self.args.objective](self.nsp, self.reference_model)

    def shared(self, phase: Phase) -> Phase:
        """Tell a phase how to add up over the processes of this run, and return it."""
        phase.sum_over, phase.carried_keys = self._sum_over, self.args.carried_keys
        return phase

    @property
    def _sum_over(self) -> Callable[[Tensor], Tensor] | None:
        """Return what adds a tensor up over all processes, which must all ask for it; None where there is one process."""
        return partial(self.accelerator.reduce, reduction="sum") if self.args.world_size > 1 else None

    def get_train_dataloader(self) -> DataLoader:
        """Make the Trainer's loader, but leave batches as they are collated: accelerate would send lengths to the device, only to be asked
        for them again, and wait for each tensor. `to_batch` sends what is needed there."""
        placing = self.accelerator.device_placement
        self.accelerator.device_placement = placing and bool(vars(self.args.accelerator_config)["dispatch_batches"])  # needs it
        try:
            return super().get_train_dataloader()
        finally:
            self.accelerator.device_placement = placing

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        """Make the Trainer's sampler, but for `group_by_length` one whose order the epoch alone decides, so that a resumed run has it."""
        data = train_dataset if train_dataset is not None else self.train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if self.args.carry_states:
            return self._lane_order(data, seed)
        if self.args.train_sampling_strategy == "group_by_length":
            return ByLength(lengths_of(data, self.args.length_column_name), self.dealing.examples, seed)
        return super()._get_train_sampler(train_dataset)

    def _lane_order(self, data: Dataset, seed: int) -> LaneOrder:
        """Make the order in which lanes read the windows of a dataset. RefineError where its rows are no windows."""
        if BEGINS_COLUMN not in (getattr(data, "column_names", None) or []):
            raise RefineError(
                f"carry_states needs a column {BEGINS_COLUMN!r} (which windows begin a document), as prepare_data makes it of documents"
            )
        order = LaneOrder(data[BEGINS_COLUMN][:], self.n_lanes, seed, self.args.train_sampling_strategy == "random")
        if len(order.documents) < self.n_lanes and self.is_world_process_zero():
            warnings.warn(
                f"carry_states: {len(order.documents)} documents for {self.n_lanes} lanes (rows of a step), so several lanes read the same "
                "one at once; a smaller per_device_train_batch_size or gradient_accumulation_steps makes fewer lanes",
                stacklevel=2,
            )
        return order

    def get_batch_samples(
        self, epoch_iterator: Iterator[Collated], num_batches: int, device: torch.device
    ) -> tuple[list[StepInputs], None]:
        """Return the micro-batches of one optimizer step, prepared and counted; none where a resumed run had made all of its steps."""
        if self.state.global_step >= self.state.max_steps:
            # The Trainer would make one step more: it asks after a step whether it was the last.
            self._restored = None
            self.control.should_training_stop = True
            return [], None
        if self._restored is not None:
            # The interrupted run had drawn these from the data loader already.
            self._pending, self._restored = self._restored, None
            first = num_batches * self.args.steps_per_generation - len(self._pending)
            for i, batch in enumerate(self._pending):
                self._continue(batch, first + i)
                next(epoch_iterator, None)
        if not self._pending:
            steps = self.args.steps_per_generation if self.phase.prepares_steps else 1
            self._pending = self._draw(epoch_iterator, num_batches * steps, device)
            start = time.perf_counter()
            self.prepare(self.phase, self._pending)
            if self.phase.prepares_steps:
                self.figures.add("seconds_generation", time.perf_counter() - start)
        batches, self._pending = self._pending[:num_batches], self._pending[num_batches:]
        set_totals(self.phase, batches, self._sum_over, self.args.world_size, self.args.device)
        by_masks = self.args.include_num_input_tokens_seen == "non_padding"  # by which the Trainer then counts tokens
        masks: list[StepInputs] = [{"attention_mask": b.sequences.real} if by_masks else {} for b in batches]
        return [{"batch": b, "input_ids": b.input_ids, **mask} for b, mask in zip(batches, masks, strict=True)], None

    def _draw(self, epoch_iterator: Iterator[Collated], count: int, device: torch.device) -> list[MicroBatch]:
        """Draw so many micro-batches, or those that the epoch still has."""
        batches: list[MicroBatch] = []
        for inputs in islice(epoch_iterator, count):
            place = self.args.seed, self.state.global_step, self.args.process_index, len(batches)
            batch = self.micro_batch(inputs, self.dealing.generators(*place, places_of(inputs)), device)
            self._continue(batch, len(batches), inputs.get(BEGINS_COLUMN, ()))
            batches.append(batch)
        return of_one_width(batches, self.accelerator.gather, self.args.device) if self._is_sharded and batches else batches

    def _continue(self, batch: MicroBatch, drawn: int, begins: Sequence[bool] = ()) -> None:
        """Have the rows of a micro-batch start from the states of their lanes; `drawn` of them were drawn before. Rows that begin a
        document start from nothing, or by chance from the document before."""
        if self.lanes is None:
            return
        args, sequences = self.args, batch.sequences
        first = (drawn * self.dealing.processes + args.process_index) * self.dealing.batch
        batch.lanes = tuple(range(first, first + len(sequences.sizes)))
        for lane, begin in zip(batch.lanes, begins, strict=False):
            generator = generator_of(args.seed, self.state.global_step, lane, -1)
            if begin and float(torch.rand((), generator=generator)) >= args.carry_between_documents:
                self.lanes.forget([lane])
        batch.sequences = replace(sequences, starts=self.lanes.starts(batch.lanes, sequences.input_ids.device))

    def micro_batch(self, inputs: Collated, generators: Sequence[torch.Generator], device: torch.device) -> MicroBatch:
        """Make what a phase gets of a collated batch."""
        return MicroBatch(to_batch(inputs, device), generators)

    @torch.no_grad()
    def prepare(self, phase: Phase, batches: Sequence[MicroBatch]) -> None:
        """Have a phase prepare the steps on `batches` by the model as it is, in eval mode, whatever mode the last step left."""
        if batches:
            self.model.eval()
            with part("rollouts"):
                phase.prepare(self.model_wrapped, batches)

    def compute_loss(
        self, model: nn.Module, inputs: StepInputs, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor | tuple[Tensor, StepResult | None]:
        """Compute this micro-batch's share of the loss of its optimizer step, which is the Trainer's own or one of `update`."""
        batch: MicroBatch = inputs["batch"]
        if "loss" in inputs:
            return inputs["loss"](model, batch)
        self.bar.tokens_this_step += batch.num_tokens
        self.figures.tokens += batch.num_tokens
        self.figures.count_sources(batch.sequences.columns.get(SOURCE_COLUMN, ()), batch.sequences.sizes)
        loss = self.phase_loss(model, batch, self.phase, self.current_gradient_accumulation_steps)
        self._keep_states(batch)
        self._show(batch)
        return (loss, batch.result) if return_outputs else loss

    def phase_loss(self, model: nn.Module, batch: MicroBatch, phase: Phase, shares: int, prefix: str = "") -> Tensor:
        """Compute a phase's loss of one of `shares` micro-batches in one forward call, so that wrappers see it, and keep its figures."""
        with part("forward"):
            loss, metrics = model(step=lambda m: phase.loss(m, batch))
        for name, value in metrics.items():
            # A share of the step's mean; logged values are averaged over micro-batches, so undo the sharing.
            self.figures.add(prefix + name, value * shares if name.startswith("loss") else value)
        return loss

    def _keep_states(self, batch: MicroBatch) -> None:
        """Keep what a micro-batch left for the next windows of its lanes. RefineError where its phase left nothing."""
        if self.lanes is None:
            return
        if batch.left is None:
            raise RefineError(
                f"carry_states: {type(self.phase).__name__}.loss leaves no states for the next windows; have it set batch.left, as "
                "run_and_leave (refine_nsp.nsp.forward) returns them, or leave carry_states out"
            )
        self.lanes.keep(batch.lanes, batch.sequences, batch.left)
        batch.left = None

    def update(self, phase: Phase, batches: Sequence[MicroBatch], prefix: str) -> None:
        """Make an optimizer step of another phase between the Trainer's own, by the calls that make those: accumulated without
        synchronising, scaled, clipped, skipped where the gradient is not finite. The names of its figures begin with `prefix`."""
        model, accelerator = self.model_wrapped, self.accelerator
        assert self.optimizer is not None
        set_totals(phase, batches, self._sum_over, self.args.world_size, self.args.device)
        phase_loss = partial(self.phase_loss, phase=phase, shares=len(batches), prefix=prefix)
        outer = accelerator.sync_gradients  # the Trainer has set it for the micro-batch that it is about to run
        try:
            for i, batch in enumerate(batches):
                last = i == len(batches) - 1
                accelerator.sync_gradients = last
                with nullcontext() if last or self._always_synchronises() else accelerator.no_sync(model), part("backward"):
                    super().training_step(model, {"batch": batch, "loss": phase_loss})
            # Called without a limit too, since it takes the loss scale out of the gradients before the guard judges them.
            accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm or math.inf)
            self.guard.on_pre_optimizer_step(self.args, self.state, self.control, model=model)
            self.optimizer.step()
            model.zero_grad()
        finally:
            accelerator.sync_gradients = outer

    def _always_synchronises(self) -> bool:
        """Tell whether every micro-batch is synchronised, for the reasons that the Trainer has."""
        each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        return bool(each) or self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def training_step(self, model: nn.Module, inputs: StepInputs, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Run a micro-batch forward and backward, and keep the time that it took."""
        start = time.perf_counter()
        with part("backward"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.figures.add("seconds_step", time.perf_counter() - start)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does, with the means of what the steps since the last log gave."""
        if "loss" in logs or "train_runtime" in logs:
            means = self.figures.means(self.phase.prepares_steps, self.args.world_size)
            logs = {**logs, **means, "skipped_steps": self.guard.skipped}
            if self.state.global_step == self._begun_at:
                logs.pop("train_loss", None)  # a mean over no step
        super().log(logs, start_time)

    def _show(self, batch: MicroBatch) -> None:
        """Show the rollouts of the first micro-batch of a logging step, where that is asked for."""
        due = self.args.log_completions and self.state.global_step % max(1, int(self.args.logging_steps)) == 0
        if due and batch.result is not None and self.state.global_step != self._shown_at and self.is_world_process_zero():
            self._shown_at = self.state.global_step
            rows = completion_rows(self.processing_class, batch.input_ids, batch.result, self.args.num_completions_to_print)
            append_json_lines(self.run_folder.path / COMPLETIONS_FILE, [{"step": self._shown_at, **row} for row in rows])
            if not self.args.disable_tqdm:
                print_completions(rows, self._shown_at)

    def evaluate(
        self,
        eval_dataset: Dataset | Mapping[str, Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Compute the phase's figures on the validation set, or on each of several by name; of the phases here: NTP loss, accuracy of the
        argmax and (expected) of a sampled token, entropy, greedy K-token match, mean cosine."""
        given = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(given, Mapping):
            named = [self.evaluate(data, ignore_keys, f"{metric_key_prefix}_{name}") for name, data in given.items()]
            return {name: value for figures in named for name, value in figures.items()}
        self._memory_tracker.start()
        start = time.perf_counter()
        batches = self.validation_batches(given)
        model = self._wrap_model(self.model, training=False)
        model.eval()
        if callable(show_last := getattr(self.optimizer, "eval", None)):
            show_last()  # a schedule-free optimizer then shows the weights that it would end with
        with part("validation", VALIDATION):
            sums = model(step=lambda m: self.phase.validate(m, batches))
        keys = sorted(sums)
        total = torch.tensor([sums[k] for k in keys], dtype=torch.float64, device=self.args.device)
        if self._sum_over is not None and not self._is_sharded:
            total = self._sum_over(total)
        figures = self.phase.summarise(dict(zip(keys, total.tolist(), strict=True)))
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in figures.items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse, since validation keeps no predictions."""
        raise RefineError("predict has no place here: use evaluate, generate(), or `refine-nsp evaluate`")

    @property
    def _is_sharded(self) -> bool:
        """Tell whether a forward pass needs the other processes, which hold parts of the weights."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def validation_batches(self, data: Dataset | str) -> Iterator[Collated]:
        """Collate this process' share of the validation rows; all of them where the model is sharded, whose processes must run together."""
        if isinstance(data, str):
            assert isinstance(self.eval_dataset, Mapping)
            data = self.eval_dataset[data]
        process, processes = (0, 1) if self._is_sharded else (self.args.process_index, self.args.world_size)
        if self.args.carry_states:
            return documents_in_lanes(data, self.data_collator, self.args.per_device_eval_batch_size, process, processes)
        return share_of_batches(data, self.data_collator, self.args.per_device_eval_batch_size, process, processes)
