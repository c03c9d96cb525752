"""ReFINE in transformers' Trainer (paper, section 3.5: mid-training), with everything else left to the Trainer.

One optimizer step is one or more micro-batches; losses are normalised by the real targets and rollout tokens of the whole
accumulation, so 1 x 8 equals 8 x 1. Rollouts are made for `steps_per_generation` optimizer steps at once, from a generator seeded by
(seed, step, rank): a resumed run is the uninterrupted one.
"""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer
from transformers import ProgressCallback as TqdmCallback

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.models.load import check_vocabulary
from refine_nsp.nsp.advantage import compute_advantages
from refine_nsp.nsp.prefix import Batch, next_token_loss
from refine_nsp.nsp.records import Rollouts
from refine_nsp.nsp.selection import count_positions
from refine_nsp.nsp.step import ReFINEStep
from refine_nsp.training.arguments import ReFINEConfig
from refine_nsp.training.callbacks import InterruptCallback, NonFiniteGuard, ProgressCallback
from refine_nsp.training.completions import show_completions
from refine_nsp.training.data import collate
from refine_nsp.training.validation import validate

ROLLOUTS_FILE = "rollouts.process{}.safetensors"  # every process has its own


class ReFINETrainer(Trainer):
    """Mid-training with ReFINE, or with the cross-entropy alone (`objective="ntp"`): the same run, one setting apart.

    Args:
        model: a causal model of this package (PEFT-wrapped is fine).
        args: a `ReFINEConfig`.
        train_dataset: rows of `input_ids` (and `lengths` when packed). eval_dataset: the same.
        processing_class: the tokenizer, for tables of completions and the vocabulary check.
        reference_model: frozen model, needed when `kl_coef` > 0.

    Raises:
        RefineError: a tokenizer with more tokens than the model, or settings that do not fit together.
    """

    loss_is_scaled_for_ga = True
    model: Any

    def __init__(self, model: Any = None, args: ReFINEConfig | None = None, reference_model: Any = None, **kwargs: Any) -> None:
        if args is None:
            args = ReFINEConfig(output_dir="runs/refine")
        if model is not None and kwargs.get("processing_class") is not None:
            check_vocabulary(model, kwargs["processing_class"])
        args.remove_unused_columns = False
        kwargs.setdefault("data_collator", collate)
        super().__init__(model=model, args=args, **kwargs)
        self.args: ReFINEConfig = args
        self.nsp: NSPConfig = args.nsp()
        self.reference_model = reference_model.to(args.device).eval() if reference_model is not None else None
        self.guard, self.interrupt, self.bar = NonFiniteGuard(args.max_skipped_steps), InterruptCallback(), ProgressCallback()
        for replaced in (TqdmCallback, PrinterCallback):
            self.remove_callback(replaced)
        for callback in (self.guard, self.interrupt, self.bar):
            self.add_callback(callback)
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._pending: list[dict[str, Any]] = []  # micro-batches whose rollouts are made already
        self._restored: list[dict[str, Any]] | None = None
        self._targets = self._rollout_tokens = 1.0
        self._last_log = (time.monotonic(), 0)
        self._tokens_seen = 0
        self._shown_at = -1
        self._fused_stream: tuple[int, torch.Generator] | None = None

    # --- batches and rollouts -----------------------------------------------------------------------------------------
    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one optimizer step, with rollouts; sets what their losses are divided by."""
        if self._restored is not None:
            # The interrupted run had drawn these from the data loader already.
            self._pending, drawn = self._restored, len(self._restored)
            self._restored = None
            for _ in range(drawn):
                next(epoch_iterator, None)
        if not self._pending:
            steps = self.args.steps_per_generation if self.args.objective == "refine" else 1
            drawn_batches = self._draw(epoch_iterator, num_batches * steps, device)
            if self.args.objective == "refine" and self.nsp.schedule != "fused" and drawn_batches:
                self._roll_out(drawn_batches)
            self._pending = drawn_batches
        batches, self._pending = self._pending[:num_batches], self._pending[num_batches:]
        self._count(batches, device)
        return batches, None

    def _draw(self, epoch_iterator: Iterator, count: int, device: torch.device) -> list[dict[str, Any]]:
        batches = []
        for _ in range(count):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append({k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
        return batches

    def _generator(self) -> torch.Generator:
        return self._generator_of(self.state.global_step)

    def _generator_of(self, step: int) -> torch.Generator:
        """All randomness of an optimizer step, so that a resumed run goes on alike."""
        return torch.Generator().manual_seed(hash((self.args.seed, step, self.args.process_index)) % 2**63)

    def _roll_out(self, batches: list[dict[str, Any]]) -> None:
        """Make rollouts for all batches with the current policy; advantages are formed over all of them together."""
        self.model.eval()
        step, generator = self._step(self.model_wrapped), self._generator()
        start = time.perf_counter()
        made = [step.rollout(b["input_ids"], b["lengths"], generator) for b in batches]
        scored = compute_advantages(torch.cat([r.rewards for r in made]), torch.cat([r.positions >= 0 for r in made]), self.nsp)
        parts = scored.values.split([len(r.rewards) for r in made])
        for batch, rollouts, advantages in zip(batches, made, parts, strict=True):
            batch["rollouts"] = _with_advantages(rollouts, advantages)
        self._metrics["seconds_generation"].append(time.perf_counter() - start)

    def _count(self, batches: list[dict[str, Any]], device: torch.device) -> None:
        """Real targets and rollout tokens of this optimizer step, over all processes."""
        c = self.nsp
        targets = sum(int((b["lengths"] - 1).clamp(min=0).sum()) for b in batches)
        tokens = sum(int(count_positions(b["lengths"], b["input_ids"].shape[1], c).sum()) for b in batches)
        counts = torch.tensor([targets, tokens * c.num_generations * c.rollout_length], device=device, dtype=torch.float64)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum") / self.args.world_size  # DDP averages gradients
        self._targets, self._rollout_tokens = (max(float(x), 1.0) for x in counts)

    # --- the loss -----------------------------------------------------------------------------------------------------
    def _step(self, model: nn.Module) -> ReFINEStep:
        return ReFINEStep(model, self.nsp, self.reference_model)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's share of the optimizer step's loss."""
        tokens = int(inputs["lengths"].sum())
        self.bar.tokens_this_step += tokens
        self._tokens_seen += tokens
        if self.args.objective == "ntp":
            loss, loss_ntp = self._ntp_loss(model, inputs)
            self._metrics["loss_ntp"].append(float(loss_ntp) * self._scale())
            return (loss, None) if return_outputs else loss
        step = self._step(model)
        normalizers = {"ntp_normalizer": self._targets, "policy_normalizer": self._rollout_tokens}
        if (rollouts := inputs.get("rollouts")) is not None:
            result = step.learn(inputs["input_ids"], rollouts, inputs["lengths"], **normalizers)
        else:
            result = step(inputs["input_ids"], inputs["lengths"], self._micro_generator(), **normalizers)
        self._metrics["loss_ntp"].append(float(result.loss_ntp.detach()) * self._scale())
        self._metrics["loss_policy"].append(float(result.loss_policy.detach()) * self._scale())
        for name, value in result.metrics.items():
            self._metrics[name].append(value)
        self._show(inputs, result)
        return (result.loss, result) if return_outputs else result.loss

    def _scale(self) -> int:
        # A share of the step's mean; logged values are averaged over micro-batches, so undo the sharing.
        return self.current_gradient_accumulation_steps

    def _micro_generator(self) -> torch.Generator:
        """Of the fused schedule: one stream per optimizer step, going on from micro-batch to micro-batch."""
        if self._fused_stream is None or self._fused_stream[0] != self.state.global_step:
            self._fused_stream = (self.state.global_step, self._generator())
        return self._fused_stream[1]

    def _ntp_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        batch, normalizer = Batch(inputs["input_ids"], inputs["lengths"]), self._targets

        def run(causal_lm: Any) -> Tensor:
            hidden = causal_lm.model(batch.input_ids, lengths=batch.lengths, use_cache=False).last_hidden_state
            return next_token_loss(causal_lm, hidden, batch, normalizer)[0]

        loss = model(step=run)
        return self.nsp.lambda_ntp * loss, loss.detach()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        start = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._metrics["seconds_step"].append(time.perf_counter() - start)
        return loss

    # --- logs and validation ------------------------------------------------------------------------------------------
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_runtime" in logs:
            means = {name: sum(values) / len(values) for name, values in self._metrics.items() if values}
            self._metrics.clear()
            now, (then, seen) = time.monotonic(), self._last_log
            if self._tokens_seen > seen:
                means["tokens_per_second"] = (self._tokens_seen - seen) * self.args.world_size / max(now - then, 1e-9)
            self._last_log = (now, self._tokens_seen)
            if "seconds_step" in means:
                forward = means.get("seconds_select", 0.0) + means.get("seconds_rollout", 0.0)
                inside = forward if self.nsp.schedule == "fused" else 0.0
                means["seconds_backward_and_forward"] = means.pop("seconds_step") - inside
            logs = {**logs, **means, "skipped_steps": self.guard.skipped}
        super().log(logs, start_time)

    def _show(self, inputs: dict[str, Any], result: Any) -> None:
        due = self.args.log_completions and self.state.global_step % max(1, int(self.args.logging_steps)) == 0
        if due and self.state.global_step != self._shown_at and self.is_world_process_zero():
            self._shown_at = self.state.global_step
            show_completions(
                self.processing_class, inputs["input_ids"], result, Path(str(self.args.output_dir)), self.state.global_step,
                self.args.num_completions_to_print, quiet=bool(self.args.disable_tqdm),
            )  # fmt: skip

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """NTP loss, accuracy of the argmax and (expected) of a sampled token, entropy, greedy K-token match, mean cosine."""
        start = time.perf_counter()
        loader = self.get_eval_dataloader(eval_dataset)
        model = self._wrap_model(self.model, training=False)
        model.eval()
        sums = model(step=lambda m: validate(m, loader, self.nsp, self.args.device))
        keys = sorted(sums)
        total = torch.tensor([sums[k] for k in keys], dtype=torch.float64, device=self.args.device)
        if self.args.world_size > 1:
            total = self.accelerator.reduce(total, reduction="sum")
        found = dict(zip(keys, total.tolist(), strict=True))
        targets, places = max(found["targets"], 1.0), max(found["places"], 1.0)
        metrics = {
            "loss": found["nll"] / targets,
            "accuracy": found["correct"] / targets,
            "sampled_accuracy": found["sampled"] / targets,
            "entropy": found["entropy"] / targets,
            "greedy_match": found["match"] / places,
            "cosine": found["cosine"] / places,
            "runtime": time.perf_counter() - start,
        }
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # --- saving and resuming ------------------------------------------------------------------------------------------
    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.train; `resume_from_checkpoint=True` takes the last complete checkpoint. Ctrl-C saves and raises."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(Path(str(self.args.output_dir)))
            if resume_from_checkpoint is None:
                raise RefineError(f"nothing to resume: {self.args.output_dir} has no complete checkpoint")
        if resume_from_checkpoint:
            self._restored = load_pending(Path(resume_from_checkpoint) / ROLLOUTS_FILE.format(self.args.process_index))
        self._last_log = (time.monotonic(), 0)
        try:
            output = super().train(resume_from_checkpoint or None, *args, **kwargs)
        finally:
            self.bar.on_train_end(self.args, self.state, self.control)
            self.interrupt.restore()
        if self.interrupt.interrupted:
            raise KeyboardInterrupt
        return output

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            if self._pending and "rollouts" in self._pending[0]:
                folder.mkdir(parents=True, exist_ok=True)
                save_pending(folder / ROLLOUTS_FILE.format(self.args.process_index), self._pending)
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:  # safetensors reports a full disk as its own kind of RuntimeError
            shutil.rmtree(folder, ignore_errors=True)
            raise RefineError(f"could not save {folder}: {error}; nothing half-written was left") from error


def _with_advantages(rollouts: Rollouts, advantages: Tensor) -> Rollouts:
    kept = rollouts.rows(slice(None))
    metrics = {**kept.metrics, "advantage_min": float(advantages.min()), "advantage_max": float(advantages.max())}
    return Rollouts(kept.positions, kept.tokens, kept.log_probs, None, kept.rewards, advantages, kept.entropy, metrics)


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end (the trainer state is written last)."""
    found = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").exists()]
    return str(max(found, key=lambda p: int(p.name.rsplit("-", 1)[1]))) if found else None


_TENSORS = ("positions", "tokens", "log_probs", "rewards", "advantages", "entropy")


def save_pending(path: Path, batches: list[dict[str, Any]]) -> None:
    """Micro-batches that wait with their rollouts, as safetensors."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        tensors |= {f"{i}.input_ids": batch["input_ids"], f"{i}.lengths": batch["lengths"]}
        tensors |= {f"{i}.{name}": getattr(batch["rollouts"], name).contiguous() for name in _TENSORS}
    save_file(tensors, path, metadata={"count": str(len(batches))})


def load_pending(path: Path) -> list[dict[str, Any]] | None:
    """What `save_pending` wrote; None when there is nothing."""
    from safetensors import safe_open

    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        count = int(file.metadata()["count"])
        get = file.get_tensor
        return [
            {
                "input_ids": get(f"{i}.input_ids"),
                "lengths": get(f"{i}.lengths"),
                "rollouts": Rollouts(**{name: get(f"{i}.{name}") for name in _TENSORS}, hidden=None),
            }
            for i in range(count)
        ]
