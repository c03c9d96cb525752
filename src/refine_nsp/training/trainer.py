"""ReFINE in transformers' Trainer (paper, section 3.5: mid-training), with everything else left to the Trainer.

The trainer draws, counts, normalises and logs; what is learned is a `Phase`. One optimizer step is one or more micro-batches; losses are
normalised by what the whole accumulation holds, and every sequence has randomness of its own, seeded by (seed, step, its index in the
step): so 1 x 8 equals 8 x 1, on any number of processes, and a resumed run is the uninterrupted one. `update` makes further optimizer
steps between the Trainer's own, by the same calls.
"""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import DistributedType, gather_object, parse_flag_from_env
from datasets import IterableDataset
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer
from transformers import ProgressCallback as TqdmCallback
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

from refine_nsp.config import NSPConfig, RewardSpec
from refine_nsp.errors import RefineError
from refine_nsp.models.load import check_vocabulary
from refine_nsp.models.protocols import CausalModel
from refine_nsp.nsp.records import Batch
from refine_nsp.nsp.seeds import generator_of
from refine_nsp.ops.memory import part
from refine_nsp.processes import to_device
from refine_nsp.training.arguments import ReFINEConfig
from refine_nsp.training.callbacks import NonFiniteGuard, ProgressCallback, StopCallback
from refine_nsp.training.cards import Origin, write_run_card
from refine_nsp.training.checkpoints import (
    Dealing,
    check_dealing,
    check_shards,
    checkpoint_problem,
    checkpoints_of,
    last_complete_checkpoint,
    load_pending,
    save_pending,
    seal,
    step_of,
)
from refine_nsp.training.completions import show_completions
from refine_nsp.training.data import collate
from refine_nsp.training.folders import check_settings, model_of, save_settings, set_aside, settings_of
from refine_nsp.training.given import model_given, tokenized, with_rewards
from refine_nsp.training.phases import PHASES, MicroBatch, Phase
from refine_nsp.training.problems import check_best_figure, for_shards, rounding_problem
from refine_nsp.training.sampling import ByLength, lengths_of
from refine_nsp.training.scores import with_context_scores
from refine_nsp.training.settings import check_arguments, check_machine
from refine_nsp.training.stream import Stream, check_streaming

P = TypeVar("P", bound=Phase)
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ReFINETrainer(Trainer):
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
    model: nn.Module
    args: ReFINEConfig
    processing_class: PreTrainedTokenizerBase | None

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
        with part("loading"):
            super().__init__(model=model, args=args, **kwargs)
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
            self.train_dataset = self._with_context_scores(self.train_dataset)
        if isinstance(self.train_dataset, IterableDataset):
            # As far as steps and data loaders read ahead.
            self.train_dataset = Stream(self.train_dataset, self.dealing.examples, keep=args.steps_per_generation + 3)
        check_best_figure(args.metric_for_best_model, self.phase, self.eval_dataset)
        self._replace_callbacks()
        self._metrics: dict[str, list[float | Tensor]] = defaultdict(list)
        self._pending: list[MicroBatch] = []  # drawn and prepared, for later steps
        self._restored: list[MicroBatch] | None = None
        self._begun_at = 0  # the step of the checkpoint that was resumed from
        self._last_log = (time.monotonic(), 0)
        self._tokens_seen = 0
        self._shown_at = -1
        self._model_in_words = model_of(self.model)
        self._origin = Origin(self.accelerator.unwrap_model(self.model).config.name_or_path)
        self._trained_before = False
        self._settings: dict[str, Any] = {}

    def _with_context_scores(self, data: Any) -> Any:
        """The data with context scores by the model as it is, each process scoring a share on its device.

        Raises:
            RefineError: a process that has not all of the weights yet.
        """
        if is_fsdp_enabled() or is_deepspeed_zero3_enabled():
            raise RefineError(
                "context_scores='cached' has every process score a share of the data, for which it needs all of the weights; "
                "fsdp_cpu_ram_efficient_loading and DeepSpeed's stage 3 do not give them to each: turn them off, or use "
                "context_scores='online'"
            )
        home, quiet = next(self.model.parameters()).device, bool(self.args.disable_tqdm) or not self.is_world_process_zero()
        # What FSDP is to share out is whole still, and on the host.
        to_device(self.model, self.args.device)
        scored = with_context_scores(
            data, self.model, self.nsp, quiet, AUTOCAST.get(self.args.mixed_precision),
            self.args.process_index, self.args.world_size,
        )  # fmt: skip
        to_device(self.model, home)
        return scored

    def _replace_callbacks(self) -> None:
        """Our progress instead of transformers', the guard, and a clean end when asked to stop."""
        several = self.args.world_size > 1
        self.guard, self.bar = NonFiniteGuard(self.args.max_skipped_steps), ProgressCallback()
        self.stop = StopCallback(self.sum_over_processes if several else None)
        for replaced in (TqdmCallback, PrinterCallback):
            self.remove_callback(replaced)
        for callback in (self.guard, self.stop, self.bar):
            self.add_callback(callback)

    def make_phase(self) -> Phase:
        """What `args.objective` names."""
        return PHASES[self.args.objective](self.nsp, self.reference_model)

    @property
    def method(self) -> dict[str, Any]:
        """Return the settings of `NSPConfig` that this run's weights depend on, by name."""
        return self.phase.settings

    def shared(self, phase: P) -> P:
        """A phase that knows how to add up over the processes of this run."""
        phase.sum_over = self.sum_over_processes if self.args.world_size > 1 else None
        return phase

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
                self._metrics["seconds_generation"].append(time.perf_counter() - start)
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
        return self._of_one_width(batches) if self._is_sharded and batches else batches

    def _of_one_width(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Micro-batches as wide as the widest that any process has in their place: processes that hold parts of a model must make the same
        passes, and how many there are follows from widths."""
        own = torch.tensor([b.widths for b in batches], device=self.args.device)
        widest = self.accelerator.gather(own[None]).amax(0).tolist()
        return [b.widened(widths) for b, widths in zip(batches, widest, strict=True)]

    def micro_batch(self, inputs: Mapping[str, Any], generators: Sequence[torch.Generator], device: torch.device) -> MicroBatch:
        """What a phase gets of a collated batch."""
        return MicroBatch(to_batch(inputs, device), generators)

    @property
    def dealing(self) -> Dealing:
        """How this run deals the examples of an optimizer step out."""
        w, b, loading = self.args.world_size, self._train_batch_size, vars(self.args.accelerator_config)
        return Dealing(w, self.args.gradient_accumulation_steps, b // w if loading["split_batches"] else b)

    def generators(self, step: int, drawn: int, places: Sequence[tuple[int, int]]) -> list[torch.Generator]:
        """All randomness of the rows of a micro-batch, the process' `drawn`-th (from 0) drawn as optimizer step `step` begins: for each
        one seeded by seed, step, index of its example among all that are drawn then, and its document in that example.

        Batches of b examples are dealt to processes in turn, so that index follows from the place in the batch, and is the same
        whatever processes and micro-batches share the examples out.
        """
        dealing = self.dealing
        first = (drawn * dealing.processes + self.args.process_index) * dealing.batch
        return [generator_of(self.args.seed, step, first + example, document) for example, document in places]

    @torch.no_grad()
    def prepare(self, phase: Phase, batches: Sequence[MicroBatch]) -> None:
        """What a phase does before the steps on `batches`, by the model as it is: in eval mode, whatever the last step left."""
        if batches:
            self.model.eval()
            with part("rollouts"):
                phase.prepare(self.model_wrapped, batches)

    def set_totals(self, phase: Phase, batches: Sequence[MicroBatch]) -> None:
        """What this optimizer step's sums are divided by, over all processes."""
        totals: dict[str, float] = defaultdict(float)
        for counts in map(phase.count, batches):
            for name, count in counts.items():
                totals[name] += count
        if self.args.world_size > 1 and totals:
            names = sorted(totals)
            counted = torch.tensor([totals[n] for n in names], device=self.args.device, dtype=torch.float64)
            counted = self.sum_over_processes(counted) / self.args.world_size  # DDP averages gradients
            totals = dict(zip(names, counted.tolist(), strict=True))
        for batch in batches:
            batch.totals = {name: float(count) or 1.0 for name, count in totals.items()}

    # --- the loss -----------------------------------------------------------------------------------------------------
    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's share of the loss of its optimizer step: the Trainer's own, or one of `update`."""
        batch: MicroBatch = inputs["batch"]
        if "phase" in inputs:
            return self.phase_loss(inputs["phase"], model, batch, inputs["shares"], inputs["prefix"])
        self.bar.tokens_this_step += batch.num_tokens
        self._tokens_seen += batch.num_tokens
        loss = self.phase_loss(self.phase, model, batch, self.current_gradient_accumulation_steps)
        self._show(batch)
        return (loss, batch.result) if return_outputs else loss

    def phase_loss(self, phase: Phase, model: nn.Module, batch: MicroBatch, shares: int, prefix: str = "") -> Tensor:
        """The loss as one forward call, so that wrappers see it; its figures are kept for the next log."""
        with part("forward"):
            loss, metrics = model(step=lambda m: phase.loss(m, batch))
        for name, value in metrics.items():
            # A share of the step's mean; logged values are averaged over micro-batches, so undo the sharing.
            self._metrics[prefix + name].append(value * shares if name.startswith("loss") else value)
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
        self._metrics["seconds_step"].append(time.perf_counter() - start)
        return loss

    # --- logs and validation ------------------------------------------------------------------------------------------
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_runtime" in logs:
            means = {name: mean_of(values) for name, values in self._metrics.items() if values}
            self._metrics.clear()
            now, (then, seen) = time.monotonic(), self._last_log
            if self._tokens_seen > seen:
                means["tokens_per_second"] = (self._tokens_seen - seen) / max(now - then, 1e-9)
            self._last_log = (now, self._tokens_seen)
            if "seconds_step" in means:
                inside = (
                    0.0 if self.phase.prepares_steps else means.get("seconds_select", 0.0) + means.get("seconds_rollout", 0.0)
                )
                means["seconds_backward_and_forward"] = means.pop("seconds_step") - inside
            means = mean_over_processes(means)
            if "tokens_per_second" in means:
                means["tokens_per_second"] *= self.args.world_size
            logs = {**logs, **means, "skipped_steps": self.guard.skipped}
            if self.state.global_step == self._begun_at:
                logs.pop("train_loss", None)  # a mean over no step
        super().log(logs, start_time)

    def _show(self, batch: MicroBatch) -> None:
        due = self.args.log_completions and self.state.global_step % max(1, int(self.args.logging_steps)) == 0
        if due and batch.result is not None and self.state.global_step != self._shown_at and self.is_world_process_zero():
            self._shown_at = self.state.global_step
            show_completions(
                self.processing_class, batch.input_ids, batch.result, Path(str(self.args.output_dir)), self.state.global_step,
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

    def validation_batches(self, eval_dataset: Any) -> Iterator[dict[str, Any]]:
        """This process' share of the validation rows, collated; all of them where the model is sharded, whose processes must run
        together. Each row is there once, with its index in the set in `_places`: figures are the same on any number of processes."""
        sets: Any = self.eval_dataset
        data: Any = sets[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        of, among = (0, 1) if self._is_sharded else (self.args.process_index, self.args.world_size)
        indices, size = range(of, len(data), among), self.args.per_device_eval_batch_size
        for at in range(0, len(indices), size):
            chosen = indices[at : at + size]
            batch = self.data_collator([data[i] for i in chosen])
            yield {**batch, "_places": [(chosen[example], document) for example, document in places_of(batch)]}

    # --- saving and resuming ------------------------------------------------------------------------------------------
    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.train; `resume_from_checkpoint=True` takes the last complete checkpoint, and None what `args` say. Ctrl-C and
        SIGTERM save, then raise KeyboardInterrupt and SystemExit (143). What an earlier run left in `output_dir` is set aside, in a
        folder inside it.

        Raises:
            RefineError: nothing to resume from, a checkpoint that is cut off or changed, or one made with other settings.
        """
        checkpoint = self._checkpoint_of(resume_from_checkpoint)
        self._begin(checkpoint)
        self._last_log = (time.monotonic(), 0)
        skips = self.args.ignore_data_skip
        if checkpoint is not None and isinstance(self.train_dataset, Stream) and self.train_dataset.load(checkpoint):
            self.args.ignore_data_skip = True  # it is there already
        try:
            with part("optimizer"):  # what else there is in a step; all of the rest names itself
                output = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RefineError(
                f"{str(error).strip().rstrip('.')}: a process that reads data has ended, perhaps for want of memory; resume from the last "
                "checkpoint, with a smaller dataloader_num_workers (0: no process of its own)"
            ) from error
        finally:
            self.args.ignore_data_skip = skips
            self.bar.on_train_end(self.args, self.state, self.control)
            self.stop.restore()
        self.stop.request.end()
        return output

    def _checkpoint_of(self, given: Any) -> Path | None:
        """The checkpoint that `train` is to resume from, whole and made by a run like this one."""
        given = self.args.resume_from_checkpoint if given is None else given
        if not given:
            return None
        if given is True or given in ("last", "True", "true"):
            given = last_complete_checkpoint(Path(str(self.args.output_dir)))
            if given is None:
                raise RefineError(f"nothing to resume: {self.args.output_dir} has no complete checkpoint")
        elif (problem := checkpoint_problem(Path(given))) is not None:
            raise RefineError(f"cannot resume from {given}: {problem}; resume_from_checkpoint=last takes the newest complete one")
        return Path(given)

    def _begin(self, checkpoint: Path | None) -> None:
        """Have this run's folder hold this run alone, and what waits in its checkpoint at hand."""
        folder, early = Path(str(self.args.output_dir)), [] if self._trained_before else self.state.log_history
        self._settings, self._trained_before = settings_of(self.args, self.method, self._model_in_words, self.train_dataset), True
        self._begun_at, self._pending = 0 if checkpoint is None else step_of(checkpoint), []
        if checkpoint is not None:
            check_dealing(checkpoint, self.dealing)
            check_shards(checkpoint, bool(self.is_fsdp_enabled))
            check_settings(checkpoint, self._settings)
            self._restored = load_pending(checkpoint, self.args.process_index, self.dealing, self.args.device)
        inside = checkpoint is not None and checkpoint.resolve().parent == folder.resolve()
        if not inside and self.is_world_process_zero() and (aside := set_aside(folder, early)) is not None:
            last = next(iter(checkpoints_of(aside)), None)
            how = f"; to go on with it, resume_from_checkpoint={last}" if last is not None else ""
            warnings.warn(f"{folder} had an earlier run in it, which is in {aside} now{how}", stacklevel=3)
        self.accelerator.wait_for_everyone()

    def describe(self, base: str, data: Sequence[str], settings: Mapping[str, Any]) -> None:
        """What model cards are to say of this run: the model it is trained from, its data, and settings by the names of flags, beside those
        that the trainer has itself."""
        self._origin = Origin(base, data, settings)

    def write_card(self, folder: Path, plotted: bool = True) -> None:
        """The model card of what is saved in a folder: how it came about, and what was logged so far."""
        model = self.accelerator.unwrap_model(self.model)
        write_run_card(folder, self.args, self.method, model, self._origin, self._trained_before, plotted)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """That same card where Trainer would write its own over it: on a push to the hub."""
        if self.is_world_process_zero():
            self.write_card(Path(str(self.args.output_dir)))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer.save_model, with a model card. A model in shards is gathered and written as a plain folder too; a checkpoint keeps its
        shards, and has with them what `export_checkpoint` makes a plain folder of."""
        folder = output_dir if output_dir is not None else str(self.args.output_dir)
        in_checkpoint = _internal_call and output_dir is not None
        if not self.is_fsdp_enabled or "SHARDED" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            super().save_model(output_dir, _internal_call)
        elif not in_checkpoint:
            self._save(folder, state_dict=self.accelerator.get_state_dict(self.model))
        elif self.args.should_save:
            for part in (self.accelerator.unwrap_model(self.model).config, self.processing_class):
                if part is not None:
                    part.save_pretrained(folder)
        if self.args.should_save:
            self.write_card(Path(folder), plotted=not in_checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._pending and self._pending[0].rollouts is not None:
                save_pending(folder, self.args.process_index, self._pending)
            if self.args.should_save:
                self.dealing.save(folder)
                save_settings(folder, self._settings)
                if isinstance(self.train_dataset, Stream):
                    self.train_dataset.save(folder, self.state.global_step * self.dealing.examples)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every process has files of its own in it
            if self.args.should_save:
                seal(folder)
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError | RuntimeError | SafetensorError):  # each library's own kind for a full disk
                raise RefineError(f"could not save {folder}: {error}; nothing half-written was left") from error
            raise


def to_batch(inputs: Mapping[str, Any], device: torch.device) -> Batch:
    """A collated batch, sent to the device without waiting for it. Lengths are read where they are: on the host, if nobody moved them."""
    scores = inputs.get("context_scores")
    columns = {k: v for k, v in inputs.items() if k not in ("input_ids", "lengths", "context_scores", "_places")}
    ids = inputs["input_ids"].to(device, non_blocking=True)
    return Batch.of(ids, inputs["lengths"], columns, None if scores is None else scores.to(device, non_blocking=True))


def places_of(inputs: Mapping[str, Any]) -> Sequence[tuple[int, int]]:
    """(example, document) of each row of a collated batch; where a collator does not say, a row is an example."""
    rows = inputs["input_ids"] if "input_ids" in inputs else inputs["prompts"]
    return inputs.get("_places", [(i, 0) for i in range(len(rows))])


def mean_over_processes(figures: Mapping[str, float]) -> dict[str, float]:
    """Each figure's mean over the processes that have it; every process must ask for it."""
    everywhere = gather_object([figures])
    names = dict.fromkeys(name for own in everywhere for name in own)
    return {name: mean_of([own[name] for own in everywhere if name in own]) for name in names}


def mean_of(values: Sequence[float | Tensor]) -> float:
    """Mean of numbers and 0-dimensional tensors; the tensors of a log interval are read here, once."""
    tensors = [v.detach().double() for v in values if isinstance(v, Tensor)]
    numbers = [float(v) for v in values if not isinstance(v, Tensor)]
    return (sum(torch.stack(tensors).tolist() if tensors else []) + sum(numbers)) / len(values)
