"""Callbacks act around the steps of a run: they show progress, skip broken gradients, and stop cleanly when asked to."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from refine_nsp.errors import RefineError
from refine_nsp.files import append_json_lines
from refine_nsp.progress import StepProgress, step_progress
from refine_nsp.stopping import StopRequest
from refine_nsp.training.run_folder import METRICS_FILE


class ProgressCallback(TrainerCallback):
    """Show a bar with tokens per second and time left, and write one line a log into metrics.jsonl."""

    def __init__(self) -> None:
        self.tokens_this_step = 0
        self.open = ExitStack()
        self.progress: StepProgress | None = None
        self.latest: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and not args.disable_tqdm:
            self.progress = self.open.enter_context(step_progress(state.max_steps, state.global_step, args.run_name or "train"))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress.advance(self.tokens_this_step * args.world_size, 1, self.latest)
        self.tokens_this_step = 0

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs: Any
    ) -> None:
        if logs is None or not state.is_world_process_zero:
            return
        self.latest = {k: float(logs[k]) for k in ("loss", "loss_ntp", "eval_loss") if k in logs} or self.latest
        append_json_lines(Path(str(args.output_dir)) / METRICS_FILE, [{"step": state.global_step, **logs}])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.open.close()
        self.progress = None


class NonFiniteGuard(TrainerCallback):
    """Skip an update whose gradient is not finite; stop after too many steps in a row that had one.

    A step of nested post-training has several updates. Counted one by one, an inner update that fails every time would hide behind the
    outer one's success, and a run where both fail would stop sooner than `max_skipped_steps` says.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = 0  # updates so far
        self.in_a_row = self.latest_step = 0  # steps up to the latest that each had a skipped update

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.in_a_row = self.latest_step = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        assert model is not None
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        if not norms or bool(torch.stack(norms).isfinite().all()):
            return
        model.zero_grad(set_to_none=True)  # the optimizer leaves parameters without a gradient alone
        self.skipped += 1
        step = state.global_step + 1
        self.in_a_row += step != self.latest_step
        self.latest_step = step
        if self.in_a_row >= self.limit:
            raise RefineError(
                f"loss or gradient was not finite in {self.in_a_row} steps in a row (last: step {step}); "
                "lower the learning rate, or look at the data there"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.latest_step != state.global_step:
            self.in_a_row = 0


class StopCallback(TrainerCallback):
    """Finish the step on Ctrl-C or SIGTERM, save a checkpoint to resume from, and stop; a second signal stops at once. All processes stop
    after the same step: `sum_over` adds a number up over them; None where there is one process."""

    def __init__(self, sum_over: Callable[[Tensor], Tensor] | None) -> None:
        self.request, self.sum_over = StopRequest(), sum_over

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.request.__enter__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.sum_over is not None:
            asked = self.sum_over(torch.tensor(self.request.asked or 0, device=args.device))
            if int(asked) and self.request.asked is None:
                self.request.asked = signal.SIGTERM
        if self.request.asked is not None:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.request.__exit__()  # signals are handled as before
