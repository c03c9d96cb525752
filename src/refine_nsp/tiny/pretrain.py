"""Pretrain a tiny base model, from nothing, on the text every Python installation has and on generated documents.

The run is a `ReFINETrainer`'s, as any other: `PreTrainer` learns the tokens by weight, and measures recall with each validation. Recall
does not appear by itself in minutes of training; the model card (`tiny/card.py`) states what brings it about.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, TrainerCallback

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.files import make_folder, read_json_lines, write_atomically
from refine_nsp.models.adapters import head_weight
from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.models.load import load_model, load_tokenizer
from refine_nsp.models.protocols import CausalModel
from refine_nsp.nsp.forward import run_hidden
from refine_nsp.nsp.next_token import next_tokens
from refine_nsp.nsp.records import Metrics
from refine_nsp.ops.linear_cross_entropy import linear_cross_entropy
from refine_nsp.report.card import is_ours
from refine_nsp.tiny.card import model_card
from refine_nsp.tiny.corpus import standard_library
from refine_nsp.tiny.documents import NAMES, VALUES, Writer
from refine_nsp.tiny.measures import RECALL, ProbeSet, family_probes, score_all, write_curves
from refine_nsp.tiny.models import NEW_MODELS
from refine_nsp.tiny.pretrain_settings import PretrainConfig
from refine_nsp.tiny.rows import PhaseRows, Sources, encode_texts
from refine_nsp.training.data import Collated
from refine_nsp.training.phases import Counts, MicroBatch, NextToken
from refine_nsp.training.trainer import ReFINETrainer

END_OF_TEXT = "<|endoftext|>"
WORD_REPEATS = 20_000  # the text that a tokenizer learns from has the words of facts so many times
WINDOWS, WINDOW_TOKENS = 16, 512  # held-out text that every validation measures


def pretrain(args: PretrainConfig, resume: str | bool = False, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Train a base, measure it as it is stored, and return the run's folder, which holds the model.

    Args:
        resume: a checkpoint to resume from, or True for the last one; False begins anew.

    Raises:
        RefineError: settings that `start_from` does not fit, a checkpoint of another run, or no room to save.
    """
    trainer = trainer_of(args, callbacks)
    trainer.train(resume_from_checkpoint=resume)
    round_to(trainer.accelerator.unwrap_model(trainer.model), args.store_dtype)
    trainer.evaluate()
    out = Path(str(args.output_dir))
    try:
        trainer.save_model()
        trainer.save_state()
    except (OSError, RuntimeError, SafetensorError) as error:  # each library's own kind for a full disk
        raise RefineError(f"could not save the model in {out}: {error}; the last checkpoint there is whole") from error
    return out


def trainer_of(args: PretrainConfig, callbacks: Sequence[TrainerCallback]) -> PreTrainer:
    """Make the tokenizer, the model at its start, the rows to train on, and from held-out modules what is measured, for one trainer."""
    torch.manual_seed(args.seed)
    make_folder(Path(str(args.output_dir)))  # known before any work whether results can be kept
    texts, held_out = standard_library(held_out=False), standard_library(held_out=True)
    tokenizer = train_tokenizer(texts, args.vocab_size) if args.start_from is None else load_tokenizer(args.start_from)
    stream, writer = encode_texts(tokenizer, held_out), Writer.of(tokenizer, held_out)
    probes = family_probes(writer, args.families, stream.tolist(), args.probe_lengths, args.probes_per_kind, seed=1)
    rows = min(WINDOWS, len(stream) // WINDOW_TOKENS)
    windows = stream[: rows * WINDOW_TOKENS].view(rows, WINDOW_TOKENS).tolist()
    return PreTrainer(
        model=starting_model(args, len(tokenizer)), args=args, phase=WeightedTokens(args.nsp, probes),
        train_dataset=PhaseRows(args, Sources.of(tokenizer, texts)), eval_dataset=Dataset.from_dict({"input_ids": windows}),
        processing_class=tokenizer, callbacks=list(callbacks),
    )  # fmt: skip


class WeightedTokens(NextToken):
    """Learn by the cross-entropy in which a target weighs what the rows' column `target_weights` says.

    A validation scores held-out text and, under `probes`, sets of recall probes by name.
    """

    reads = frozenset({"segment_tokens"})
    reads_scores = False

    def __init__(self, config: NSPConfig, probes: Mapping[str, ProbeSet]) -> None:
        super().__init__(config)
        self.probes = probes

    def count(self, batch: MicroBatch) -> Counts:
        """Count the targets, each as often as it weighs."""
        return {"targets": float(weights_of_targets(batch).sum())}

    def loss(self, model: CausalModel, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """Return this micro-batch's share of the mean over the weighted targets of the step."""
        hidden = run_hidden(model, batch.sequences, self.config)
        weights = weights_of_targets(batch).to(hidden.device) / batch.totals["targets"]
        loss, _ = linear_cross_entropy(hidden.flatten(0, 1), head_weight(model), next_tokens(batch.sequences), weights.flatten())
        return loss, {"loss_ntp": loss.detach()}

    def validate(self, model: CausalModel, batches: Iterable[Collated]) -> Counts:
        """Score text and probes in float32, as the stored model will be used."""
        with torch.autocast(model.device.type, enabled=False):
            # Every process scores all probes, so `probed` counts the processes that the figures are summed over.
            return {**super().validate(model, batches), **score_all(model, self.probes), "probed": 1.0}

    def summarise(self, sums: Counts) -> dict[str, float]:
        """Return the figures of held-out text, and those of each set of probes as `recall_SET_FIGURE`."""
        probed = {name: total / sums["probed"] for name, total in sums.items() if name.startswith(RECALL)}
        return {**super().summarise(sums), **probed}


def weights_of_targets(batch: MicroBatch) -> Tensor:
    """Return what the token after each weighs in the loss, [B, T]; 0 after the last."""
    weights = pad_sequence(list(batch.sequences.columns["target_weights"]), batch_first=True)
    return F.pad(weights[:, 1:], (0, 1))


class PreTrainer(ReFINETrainer):
    """Train as `ReFINETrainer` does, but let matrices alone decay, and give the base a card and curves of its own."""

    args: PretrainConfig

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Let matrices decay; by its names the Trainer would let vectors decay too, such as the rates that memories fade by (`A_log`)."""
        return [name for name, p in model.named_parameters() if p.ndim >= 2]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate, and draw the curves so far."""
        figures = super().evaluate(*args, **kwargs)
        if self.is_world_process_zero():
            write_curves(Path(str(self.args.output_dir)))
        return figures

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as every trainer does; the weights of the run's result, whose values `round_to` has rounded, in `store_dtype`."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.args.store_dtype != "float32" and self.args.should_save:
            # The configuration keeps naming float32, which `load` widens the weights to.
            model, dtype = self.accelerator.unwrap_model(self.model), getattr(torch, self.args.store_dtype)
            narrow = {name: w.to(dtype) for name, w in model.state_dict().items() if name != "lm_head.weight"}
            model.save_pretrained(output_dir or self.args.output_dir, state_dict=narrow)

    def write_card(self, folder: Path, plotted: bool = True) -> None:
        """Write a base's card, unless somebody else's README.md is there."""
        path, out = folder / "README.md", Path(str(self.args.output_dir))
        if not path.exists() or is_ours(path):
            model = self.accelerator.unwrap_model(self.model)
            write_atomically(path, model_card(model, self.args, self.state.global_step, read_json_lines(out / "metrics.jsonl")))


def starting_model(args: PretrainConfig, vocab_size: int) -> FastWeightForCausalLM:
    """Make a new model, or one with the weights of `start_from`; a RefineError says that these are of other sizes."""
    model = NEW_MODELS[args.model_type](args, vocab_size)
    if args.start_from is not None:
        base = load_model(args.start_from)
        try:
            model.load_state_dict(base.state_dict())
        except RuntimeError as error:
            raise RefineError(
                f"start_from={args.start_from} is a {base.config.model_type} of other sizes than these settings' {args.model_type}; "
                "its own are in its config.json"
            ) from error
    return model


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Learn byte-level BPE from the texts, with every word of the facts frequent enough to become one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([*texts, *([" " + " ".join(NAMES + VALUES)] * WORD_REPEATS)], trainer)
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=1_000_000, **ends)


@torch.no_grad()
def round_to(model: nn.Module, dtype: str) -> None:
    """Give the weights values that `dtype` holds exactly; they stay float32."""
    for weight in model.parameters():
        weight.copy_(weight.to(getattr(torch, dtype)))
