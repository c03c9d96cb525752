"""Nested post-training (paper, section 3.5) makes an inner update on the prompts of every batch, then one SFT step on the answers.

`objective="none"` is plain SFT, "ntp" the paper's Nested SFT, "refine" its Nested ReFINE; one optimizer serves both. One optimizer step of
the Trainer is one batch: the inner update is made as that step begins, by the phase that mid-training uses, so accumulation, resuming,
logging and callbacks stay the Trainer's.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from refine_nsp.config import NSPConfig, check_choice
from refine_nsp.errors import RefineError
from refine_nsp.evaluation.text_metrics import MATCHES
from refine_nsp.fields import setting
from refine_nsp.models.adapters import head_weight
from refine_nsp.models.generation import Decoding, Request, answer_all, end_tokens
from refine_nsp.models.protocols import CausalModel
from refine_nsp.nsp.forward import run_hidden
from refine_nsp.nsp.next_token import next_tokens
from refine_nsp.nsp.records import Batch, Metrics
from refine_nsp.nsp.schedule import Needs
from refine_nsp.ops.linear_cross_entropy import linear_cross_entropy
from refine_nsp.training.answers import collate_answers, pad
from refine_nsp.training.arguments import ReFINEConfig, with_nsp
from refine_nsp.training.data import Collated
from refine_nsp.training.micro_batches import deal
from refine_nsp.training.phases import PHASES, Counts, MicroBatch, Phase
from refine_nsp.training.trainer import ReFINETrainer, StepInputs


@with_nsp
@dataclass
class PostTrainingConfig(ReFINEConfig):
    """Extend `ReFINEConfig` by the nested phase; its preset is `post_training` (hybrid reward, lambda_rl 0.2).

    The objectives `ntp` and `none` take the settings of the inner update too, read or not: they are controls, the same run with one switch.

    Attributes:
        objective: what a batch's prompts are trained on before its answers: `refine`, `ntp` or `none`.
        inner_steps: optimizer steps of that inner update; the batch's micro-batches are dealt out to them (the paper: 4 of 16). One
            whose gradient is not finite is skipped; the others, and the step on the answers, are made.
        reference: which of several answers is learned: the `first`, or a `random` one.
        answer_metric: metric of validation by generation: `any_match`, `fraction_match`, `f1` or `exact_match`.
        max_new_tokens: tokens that a generated answer may have.
    """

    default_preset: ClassVar[str | None] = "post_training"

    objective: Literal["refine", "ntp", "none"] = setting(  # type: ignore[assignment]
        "refine", common=True, card=True, resume=True
    )
    inner_steps: int = setting(1, common=True, resume=True)
    reference: Literal["first", "random"] = setting("first", common=True, resume=True)
    answer_metric: str = setting("any_match", common=True)
    max_new_tokens: int = setting(32, common=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("answer_metric", self.answer_metric, MATCHES)
        if self.inner_steps < 1 or self.inner_steps > self.gradient_accumulation_steps:
            most = self.gradient_accumulation_steps
            raise RefineError(
                f"inner_steps={self.inner_steps} deals {most} micro-batches out; expected 1 to gradient_accumulation_steps"
            )
        if self.steps_per_generation > 1:
            raise RefineError("steps_per_generation belongs to mid-training; several inner steps on a batch are inner_steps")
        if self.context_scores != "online":
            raise RefineError(f"context_scores={self.context_scores!r} belongs to mid-training; prompts are scored online")
        if self.carry_states:
            raise RefineError("carry_states belongs to mid-training on documents; a prompt with its answer is one row")

    @property
    def phase(self) -> Phase:
        return Answers(self, None) if self.objective == "none" else super().phase

    @property
    def needs(self) -> Needs:
        return replace(super().needs, beforehand=self.nsp.published and self.inner_steps > 1)


@dataclass
class AnswerBatch(MicroBatch):
    """Hold prompts with their answers behind them."""

    answer_lengths: tuple[int, ...] = ()  # tokens of each answer
    prompts: MicroBatch = field(kw_only=True)  # the prompts alone

    @property
    def widths(self) -> tuple[int, ...]:
        return (*super().widths, *self.prompts.widths)

    def widened(self, widths: Sequence[int]) -> AnswerBatch:
        return replace(self, sequences=self.sequences.widened(widths[0]), prompts=self.prompts.widened(widths[1:]))


class Answers(Phase):
    """Learn answers by supervised fine-tuning: the cross-entropy of their tokens, EOS included."""

    reads_once = True

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"segment_tokens", "published"})

    @property
    def shortest(self) -> int:
        return 1  # what a prompt needs, with an answer behind it

    def __init__(self, args: PostTrainingConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
        super().__init__(args.nsp)
        self.args, self.tokenizer = args, tokenizer

    def count(self, batch: MicroBatch) -> Counts:
        assert isinstance(batch, AnswerBatch)
        return {"answers": sum(batch.answer_lengths)}

    def loss(self, model: CausalModel, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        assert isinstance(batch, AnswerBatch)
        loss = answer_loss(model, batch.sequences, torch.tensor(batch.answer_lengths), batch.totals["answers"], self.config)
        return loss, {"loss_answer": loss.detach()}

    @torch.no_grad()
    def validate(self, model: CausalModel, batches: Iterable[Collated]) -> Counts:
        """Sum up the cross-entropy of the first answer, and matches of greedily generated ones."""
        sums = dict.fromkeys(("nll", "targets"), 0.0)
        prompts: list[Tensor] = []
        references: list[list[str]] = []
        for batch in batches:
            answers = [options[0] for options in batch["answers"]]
            answer_lengths = torch.tensor([len(a) for a in answers])
            joined = join(batch["prompts"], answers, model.device)
            sums["nll"] += float(answer_loss(model, joined, answer_lengths, 1.0, self.config))
            sums["targets"] += float(answer_lengths.sum())
            prompts += batch["prompts"]
            references += batch["references"]
        return {**sums, "matched": self._generated_matches(model, prompts, references), "examples": float(len(prompts))}

    def _generated_matches(self, model: CausalModel, prompts: Sequence[Tensor], references: Sequence[Sequence[str]]) -> float:
        """Add up the scores of generated answers against any of their references."""
        if self.tokenizer is None:
            raise RefineError("validation reads answers as text: give the trainer its tokenizer as processing_class")
        score, total = MATCHES[self.args.answer_metric], 0.0
        requests = [Request(i, p.tolist(), self.args.max_new_tokens) for i, p in enumerate(prompts)]
        batch_tokens = self.args.per_device_eval_batch_size * self.args.max_length
        for answered in answer_all(model, requests, end_tokens(model, self.tokenizer), Decoding(), batch_tokens):
            for request, tokens in answered:
                total += score(str(self.tokenizer.decode(tokens, skip_special_tokens=True)), references[request.key])
        return total

    def summarise(self, sums: Counts) -> dict[str, float]:
        matched = sums["matched"] / max(sums["examples"], 1.0)
        return {"loss": sums["nll"] / max(sums["targets"], 1.0), self.args.answer_metric: matched}


class InnerUpdate(TrainerCallback):
    """Train on a batch's prompts as the step on its answers begins."""

    def __init__(self, trainer: PostTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.inner_update()


class PostTrainer(ReFINETrainer):
    """Train on prompts and their answers, nested. Datasets are rows as `prepare_answers` makes them; all else is as in `ReFINETrainer`."""

    args: PostTrainingConfig

    def __init__(
        self, model: nn.Module | str | Path | None = None, args: PostTrainingConfig | None = None, **kwargs: Any
    ) -> None:
        own_collator = kwargs.setdefault("data_collator", collate_answers) is not collate_answers
        args = args if args is not None else PostTrainingConfig(output_dir="runs/posttrain")
        super().__init__(model=model, args=args, **kwargs)
        if self.nsp.published and not own_collator:
            if self.processing_class is None:
                raise RefineError("published=True learns answers without EOS: give the trainer its tokenizer as processing_class")
            self.data_collator = partial(collate_answers, unlearned=self.processing_class.eos_token_id)
        objective = self.args.objective
        self.inner = self.shared(PHASES[objective](self.nsp, self.reference_model)) if objective != "none" else None
        self.add_callback(InnerUpdate(self))
        self._current: list[AnswerBatch] = []

    def make_phase(self) -> Phase:
        return Answers(self.args, self.processing_class)

    @property
    def method(self) -> dict[str, object]:
        return self.phase.settings | (self.inner.settings if self.inner is not None else {})

    def get_batch_samples(
        self, epoch_iterator: Iterator[Collated], num_batches: int, device: torch.device
    ) -> tuple[list[StepInputs], None]:
        samples, counted = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._current = [s["batch"] for s in samples]
        return samples, counted

    def micro_batch(self, inputs: Collated, generators: Sequence[torch.Generator], device: torch.device) -> AnswerBatch:
        """Make sequences of prompt and answer [B, T], and of the prompts alone."""
        answers = [options[0] for options in inputs["answers"]]
        if self.args.reference == "random":  # by the seeds of the positions, whose draws stay as they are
            pairs = zip(inputs["answers"], generators, strict=True)
            answers = [random.Random(g.initial_seed()).choice(options) for options, g in pairs]
        prompts = MicroBatch(Batch.of(*pad(inputs["prompts"], device), inputs.get("columns")), generators)
        joined = join(inputs["prompts"], answers, device)
        return AnswerBatch(joined, generators, answer_lengths=tuple(map(len, answers)), prompts=prompts)

    def inner_update(self) -> None:
        """Make the optimizer steps on this batch's prompts, the answers unseen."""
        if self.inner is None or not self._current:
            return
        start = time.perf_counter()
        hands = deal([b.prompts for b in self._current], self.args.inner_steps)
        # The published code makes all rollouts of the batch before the first of these steps.
        for together in [hands] if self.nsp.published else [[hand] for hand in hands]:
            self.prepare(self.inner, [prompts for hand in together for prompts in hand])
            for hand in together:
                self.update(self.inner, hand, "inner_")
        self.figures.add("seconds_inner", time.perf_counter() - start)


def join(prompts: Sequence[Tensor], answers: Sequence[Tensor], device: torch.device) -> Batch:
    """Put answers behind their prompts, as one batch on the device."""
    return Batch.of(*pad([torch.cat(pair) for pair in zip(prompts, answers, strict=True)], device))


def answer_loss(
    model: CausalModel, batch: Batch, answer_lengths: Tensor, normalizer: float | Tensor, config: NSPConfig
) -> Tensor:
    """Add up the cross-entropies of the last `answer_lengths` [B] tokens of each row, over `normalizer`; lengths are on the host."""
    hidden = run_hidden(model, batch, config)
    mask = batch.target_mask & ~batch.before(batch.lengths - answer_lengths - 1)
    weights = mask.to(torch.promote_types(hidden.dtype, torch.float32)).flatten() / normalizer
    return linear_cross_entropy(hidden.flatten(0, 1), head_weight(model), next_tokens(batch), weights)[0]
