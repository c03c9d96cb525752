"""Post-training, nested (paper, section 3.5): for every batch an inner update on the prompts, then one SFT step on the answers.

`inner="none"` is plain SFT, "ntp" the paper's Nested SFT, "refine" its Nested ReFINE; one optimizer serves both. One optimizer step of
the Trainer is one batch: the inner update is made when the batch is drawn, so accumulation, resuming, logging and callbacks stay
the Trainer's.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refine_nsp.errors import RefineError, closest
from refine_nsp.evaluation.text_metrics import MATCHES
from refine_nsp.models.generation import Decoding, Request, answer_all, end_tokens
from refine_nsp.nsp.prefix import Batch, next_token_loss
from refine_nsp.nsp.selection import count_positions
from refine_nsp.nsp.step import ReFINEStep
from refine_nsp.ops.linear_cross_entropy import linear_cross_entropy
from refine_nsp.training.answers import collate_answers, pad
from refine_nsp.training.arguments import ReFINEConfig
from refine_nsp.training.trainer import ReFINETrainer

INNER = ("none", "ntp", "refine")
REFERENCES = ("first", "random")


@dataclass
class PostTrainingConfig(ReFINEConfig):
    """`ReFINEConfig` with the nested phase; its preset is `post_training` (hybrid reward, lambda_rl 0.2).

    Attributes:
        inner: what a batch's prompts are trained on before its answers: `none`, `ntp` or `refine`.
        inner_steps: optimizer steps of the inner update; the batch's micro-batches are dealt out to them (the paper: 4 of 16).
        reference: which of several answers is learned: the `first`, or a `random` one.
        answer_metric: of validation by generation: `any_match`, `fraction_match`, `f1` or `exact_match`.
        max_new_tokens: budget of those answers.
    """

    inner: str = "refine"
    inner_steps: int = 1
    reference: str = "first"
    answer_metric: str = "any_match"
    max_new_tokens: int = 32
    preset: str | None = "post_training"
    schedule: str | None = "fused"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, options in (("inner", INNER), ("reference", REFERENCES), ("answer_metric", tuple(MATCHES))):
            if (value := getattr(self, name)) not in options:
                raise RefineError(f"{name}={value!r} is not one of {', '.join(options)}{closest(str(value), options)}")
        if self.inner_steps < 1 or self.inner_steps > self.gradient_accumulation_steps:
            raise RefineError(
                f"inner_steps={self.inner_steps} deals {self.gradient_accumulation_steps} micro-batches out; it must be between 1 and "
                "gradient_accumulation_steps"
            )
        if self.steps_per_generation > 1:
            raise RefineError("steps_per_generation belongs to mid-training; several inner steps on a batch are inner_steps")


class PostTrainer(ReFINETrainer):
    """Nested post-training. Datasets are rows of `prepare_answers`.

    Raises:
        RefineError: settings that do not fit together, or a vocabulary larger than the model's.
    """

    args: PostTrainingConfig

    def __init__(self, model: Any = None, args: PostTrainingConfig | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("data_collator", collate_answers)
        super().__init__(
            model=model, args=args if args is not None else PostTrainingConfig(output_dir="runs/posttrain"), **kwargs
        )

    # --- one batch ----------------------------------------------------------------------------------------------------
    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one step: their inner update is made here, their answers are left for the SFT step."""
        drawn = self._draw(epoch_iterator, num_batches, device)
        generator = self._generator()
        choice = random.Random(generator.initial_seed())
        batches = [self._with_answers(b, choice, device) for b in drawn]
        if self.args.inner != "none" and batches:
            start = time.perf_counter()
            size = -(-len(batches) // self.args.inner_steps)
            for at in range(0, len(batches), size):
                self._inner_update(batches[at : at + size], generator, device)
            self._metrics["seconds_inner"].append(time.perf_counter() - start)
        count = torch.tensor(float(sum(int(b["answer_lengths"].sum()) for b in batches)), device=device)
        self._targets = max(self._per_process(count), 1.0)
        return batches, None

    def _with_answers(self, batch: dict[str, Any], choice: random.Random, device: torch.device) -> dict[str, Any]:
        """input_ids [B, T] of prompt and answer, lengths [B], answer_lengths [B]; prompts stay beside them."""
        first = self.args.reference == "first"
        answers = [options[0] if first else choice.choice(options) for options in batch["answers"]]
        ids, lengths = pad([torch.cat(pair) for pair in zip(batch["prompts"], answers, strict=True)], device)
        return {
            "input_ids": ids,
            "lengths": lengths,
            "answer_lengths": torch.tensor([len(a) for a in answers], device=device),
            "prompts": batch["prompts"],
        }

    def _per_process(self, count: Tensor) -> float:
        """A count over all processes, divided by their number: DDP averages gradients."""
        if self.args.world_size > 1:
            count = self.accelerator.reduce(count, reduction="sum") / self.args.world_size
        return float(count)

    # --- the inner update ---------------------------------------------------------------------------------------------
    def _inner_update(self, batches: Sequence[dict[str, Any]], generator: torch.Generator, device: torch.device) -> None:
        """One optimizer step on the prompts, the answers unseen."""
        model = self.model_wrapped
        model.train()
        prompts = [pad(b["prompts"], device) for b in batches]
        targets, tokens = self._inner_counts(prompts, device)
        for i, (ids, lengths) in enumerate(prompts):
            last = i == len(prompts) - 1
            with nullcontext() if last else self.accelerator.no_sync(model):
                loss, metrics = self._inner_loss(model, ids, lengths, targets, tokens, generator)
                self.accelerator.backward(loss)
            for name, value in metrics.items():
                self._metrics[f"inner_{name}"].append(value)
        if self.args.max_grad_norm:
            self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        self.guard.on_pre_optimizer_step(self.args, self.state, self.control, model=model)
        assert self.optimizer is not None
        self.optimizer.step()
        model.zero_grad()

    def _inner_counts(self, prompts: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> tuple[float, float]:
        c = self.nsp
        targets = sum(int((lengths - 1).clamp(min=0).sum()) for _, lengths in prompts)
        places = sum(int(count_positions(lengths, ids.shape[1], c).sum()) for ids, lengths in prompts)
        tokens = places * c.num_generations * c.rollout_length
        counts = (self._per_process(torch.tensor(float(n), device=device)) for n in (targets, tokens))
        a, b = (max(n, 1.0) for n in counts)
        return a, b

    def _inner_loss(
        self, model: nn.Module, ids: Tensor, lengths: Tensor, targets: float, tokens: float, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        if self.args.inner == "refine":
            result = ReFINEStep(model, self.nsp, self.reference_model)(ids, lengths, generator, targets, tokens)
            return result.loss, {"loss_ntp": float(result.loss_ntp.detach()), **result.metrics}
        batch = Batch(ids, lengths)

        def run(causal_lm: Any) -> Tensor:
            hidden = causal_lm.model(ids, lengths=lengths, use_cache=False).last_hidden_state
            return next_token_loss(causal_lm, hidden, batch, targets)[0]

        loss = model(step=run)
        return loss, {"loss_ntp": float(loss.detach())}

    # --- the SFT step -------------------------------------------------------------------------------------------------
    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's share of the cross-entropy over answer tokens (EOS included)."""
        tokens = int(inputs["lengths"].sum())
        self.bar.tokens_this_step += tokens
        self._tokens_seen += tokens
        loss = model(
            step=lambda m: answer_loss(m, inputs["input_ids"], inputs["lengths"], inputs["answer_lengths"], self._targets)
        )
        self._metrics["loss_answer"].append(float(loss.detach()) * self._scale())
        return (loss, None) if return_outputs else loss

    # --- validation ---------------------------------------------------------------------------------------------------
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Cross-entropy of the first answer, and the task's metric of greedily generated ones. Every process answers its share."""
        start = time.perf_counter()
        data: Any = eval_dataset if eval_dataset is not None else self.eval_dataset
        rows = list(data)
        rows = rows[self.args.process_index :: self.args.world_size]
        model = self._wrap_model(self.model, training=False)
        model.eval()
        sums = model(step=lambda m: self._validate(m, rows))
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), reduction="sum")
        nll, targets, matched, count = sums.tolist()
        metrics = {
            "loss": nll / max(targets, 1.0),
            self.args.answer_metric: matched / max(count, 1.0),
            "runtime": time.perf_counter() - start,
        }
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _validate(self, model: Any, rows: Sequence[dict[str, Any]]) -> Tensor:
        tokenizer: Any = self.processing_class
        device = model.device
        score = MATCHES[self.args.answer_metric]
        size = self.args.per_device_eval_batch_size
        nll = targets = matched = 0.0
        for at in range(0, len(rows), size):
            batch = collate_answers(rows[at : at + size])
            answers = [options[0] for options in batch["answers"]]
            ids, lengths = pad([torch.cat(pair) for pair in zip(batch["prompts"], answers, strict=True)], device)
            answer_lengths = torch.tensor([len(a) for a in answers], device=device)
            nll += float(answer_loss(model, ids, lengths, answer_lengths, 1.0))
            targets += float(answer_lengths.sum())
        requests = [Request(i, list(r["prompt_ids"]), self.args.max_new_tokens) for i, r in enumerate(rows)]
        batch_tokens = size * self.args.max_length
        for answered in answer_all(model, requests, end_tokens(model, tokenizer), Decoding(), batch_tokens):
            for request, tokens in answered:
                matched += score(tokenizer.decode(tokens, skip_special_tokens=True), rows[request.key]["references"])
        return torch.tensor([nll, targets, matched, float(len(rows))], dtype=torch.float64)


def answer_loss(model: Any, ids: Tensor, lengths: Tensor, answer_lengths: Tensor, normalizer: float) -> Tensor:
    """Sum of cross-entropies of the last `answer_lengths` [B] tokens of each row / normalizer; ids [B, T], lengths [B]."""
    hidden = model.model(ids, lengths=lengths, use_cache=False).last_hidden_state
    at = torch.arange(ids.shape[1], device=ids.device)
    mask = (at < lengths[:, None] - 1) & (at >= (lengths - answer_lengths)[:, None] - 1)
    targets = nn.functional.pad(ids[:, 1:], (0, 1)).flatten()
    weights = mask.to(torch.promote_types(hidden.dtype, torch.float32)).flatten() / normalizer
    return linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, targets, weights)[0]
