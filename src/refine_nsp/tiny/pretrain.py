"""Pretrain a tiny base model, from nothing, on the text every Python installation has and on generated documents.

Recall does not appear by itself in minutes of training. What is done about it is stated in the model card: what is recalled is dense
and short range first (the sequence length grows by phases), answers weigh more early, and q and k projections start equal with k's
convolution shifted by one token, so that a key already stands for "what came before this value".
"""

from __future__ import annotations

import json
import random
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from refine_nsp.errors import RefineError
from refine_nsp.files import append_json_lines, made_whole, read_json_lines
from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.models.load import load_model, load_tokenizer
from refine_nsp.ops.linear_cross_entropy import linear_cross_entropy
from refine_nsp.processes import to_device
from refine_nsp.progress import step_progress
from refine_nsp.stopping import StopRequest
from refine_nsp.tiny.card import model_card
from refine_nsp.tiny.corpus import standard_library
from refine_nsp.tiny.documents import Writer
from refine_nsp.tiny.measures import Measures, write_curves
from refine_nsp.tiny.models import NEW_MODELS
from refine_nsp.tiny.pretrain_settings import FACTS, SHARED, PretrainConfig, PretrainPhase
from refine_nsp.tiny.recall import NAMES, VALUES, RecallTokens, recall_document

END_OF_TEXT = "<|endoftext|>"
WORD_REPEATS = 20_000  # of the words of recall documents, in the text a tokenizer learns from
TOKENS_AT_ONCE = 4096  # of a processor, whose cache they should fit; a device takes a step's rows together


def pretrain(config: PretrainConfig, resume: bool = True, stop_after: int | None = None) -> Path:
    """Train on a CUDA device where there is one, or go on from the last checkpoint in `output_dir`; returns the folder of the model.

    Args:
        stop_after: steps after which the model is measured and saved as it is; the same command without it goes on from there.

    Raises:
        RefineError: no step to make, or rows longer than a step's tokens.
    """
    if config.total_steps < 1 or any(p.length > config.tokens_per_step for p in config.phases):
        raise RefineError("pretrain needs phases with at least one step, each row no longer than tokens_per_step")
    if stop_after is not None and stop_after < 1:
        raise RefineError(f"stop_after={stop_after}: a model is saved after at least one step")
    if config.model_type == "lact_swiglu" and config.num_heads != 2:
        raise RefineError(f"num_heads={config.num_heads}: this LaCT starts with two heads that look one and two tokens back")
    if config.model_type not in NEW_MODELS:
        raise RefineError(f"model_type={config.model_type!r} is not one of {', '.join(NEW_MODELS)}")
    torch.manual_seed(config.seed)
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    texts, held_out = standard_library(held_out=False), standard_library(held_out=True)
    tokenizer = train_tokenizer(texts, config.vocab_size) if config.start_from is None else load_tokenizer(config.start_from)
    sources = Sources.of(config, tokenizer, texts)
    measures = Measures.of(config, tokenizer, held_out, encode_texts(tokenizer, held_out))
    model = to_device(starting_model(config, len(tokenizer)))
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.95))
    start = load_checkpoint(out, model, optimizer, config) if resume else 0
    if start == 0:
        (out / "metrics.jsonl").unlink(missing_ok=True)
    model.train()
    last = config.total_steps if stop_after is None else max(start, min(stop_after, config.total_steps))
    with StopRequest() as stop, step_progress(last, start, "pretrain") as progress:
        for step in range(start, last):
            ids, weights = training_batch(config, phase_of(config, step), step, sources)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * schedule(config, step)
            loss = train_step(model, optimizer, ids.to(model.device), weights.to(model.device), config)
            progress.advance(ids.numel(), 1, {"loss": loss})
            done = step + 1
            probed = done % config.probe_steps == 0 and done < last
            if probed or done % config.log_steps == 0 or done == last:
                measured = measures.take(model) if probed else {}
                append_json_lines(out / "metrics.jsonl", [{"step": done, "time": time.time(), "loss": loss, **measured}])
            if done % config.save_steps == 0 or done == last or stop.asked is not None:
                save_checkpoint(out, model, optimizer, done, config)
                write_curves(out)
            stop.end()
    # What is stored is what is measured at the end.
    round_to(model.eval(), config.store_dtype)
    append_json_lines(out / "metrics.jsonl", [{"step": last, "time": time.time(), **measures.take(model)}])
    write_curves(out)
    return save_model(out, model, tokenizer, config, model_card(model, config, read_json_lines(out / "metrics.jsonl")))


# --- model, tokenizer, optimizer --------------------------------------------------------------------------------------


def starting_model(config: PretrainConfig, vocab_size: int) -> FastWeightForCausalLM:
    """A new model, or a new one with the weights of `start_from`. RefineError where that one has other sizes."""
    model = NEW_MODELS[config.model_type](config, vocab_size)
    if config.start_from is not None:
        base = load_model(config.start_from)
        try:
            model.load_state_dict(base.state_dict())
        except RuntimeError as error:
            raise RefineError(
                f"start_from={config.start_from} is a {base.config.model_type} of other sizes than these settings' "
                f"{config.model_type}; its own are in its pretrain_config.json"
            ) from error
    return model


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE on the text, with every word of the recall documents frequent enough to become one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = " " + " ".join(NAMES + VALUES)
    bpe.train_from_iterator([*texts, *([words] * WORD_REPEATS)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT,
        model_max_length=1_000_000,
    )  # fmt: skip


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """All texts as one stream of ids, END_OF_TEXT after each."""
    ids: list[int] = []
    for encoded in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        ids += [*encoded, tokenizer.eos_token_id]
    return torch.tensor(ids)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; vectors (norms) do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


# --- data and steps ---------------------------------------------------------------------------------------------------


def phase_of(config: PretrainConfig, step: int) -> PretrainPhase:
    for phase in config.phases:
        if step < phase.steps:
            return phase
        step -= phase.steps
    return config.phases[-1]


def schedule(config: PretrainConfig, step: int) -> float:
    """Linear warm-up, then linear decay to a tenth."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    return 1.0 - 0.9 * (step - config.warmup_steps) / max(1, config.total_steps - config.warmup_steps)


@dataclass(frozen=True)
class Sources:
    """What rows are made of. stream: all texts, encoded. writer: of the families that are no facts; None where none is trained on."""

    stream: Tensor
    facts: RecallTokens
    writer: Writer | None

    @classmethod
    def of(cls, config: PretrainConfig, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Sources:
        writer = Writer.of(tokenizer, texts) if set(config.families) - {FACTS} else None
        return cls(encode_texts(tokenizer, texts), RecallTokens.of(tokenizer), writer)


def training_batch(config: PretrainConfig, phase: PretrainPhase, step: int, sources: Sources) -> tuple[Tensor, Tensor]:
    """ids [B, T] and target weights [B, T]; seeded by the step, so a resumed run sees what an uninterrupted one would."""
    rng = random.Random(f"{config.seed}-{step}")
    rows, weights = [], []
    for _ in range(config.tokens_per_step // phase.length):
        start = rng.randrange(len(sources.stream) - phase.length)
        window = sources.stream[start : start + phase.length]
        weight = torch.ones(phase.length)
        family = family_at(phase, rng.random())
        if family is not None:
            ids, asked = generated_row(rng, family, phase, sources, start)
            window, weight = torch.tensor(ids), torch.where(torch.tensor(asked), phase.answer_weight, 1.0)
        rows.append(window)
        weights.append(weight)
    return torch.stack(rows), torch.stack(weights)


def family_at(phase: PretrainPhase, u: float) -> str | None:
    """The family of a row, for a uniform draw 0 <= u < 1: the families' shares lie side by side from 0 on; None is plain text."""
    for family in SHARED:
        share = phase.shares.get(family, 0.0)
        if u < share:
            return family
        u -= share
    return None


def generated_row(
    rng: random.Random, family: str, phase: PretrainPhase, sources: Sources, start: int
) -> tuple[list[int], list[bool]]:
    """A document of the family in text from `start` on, and which of its tokens are answers."""
    filler = sources.stream[start : start + (4 if family == FACTS else 1) * phase.length].tolist()
    dense = phase.dense * (0.5 + 0.5 * rng.random())
    if family == FACTS:
        return recall_document(rng, sources.facts, filler, phase.length, dense)
    assert sources.writer is not None
    return sources.writer.write(rng, family, filler, phase.length, dense)


def train_step(model: FastWeightForCausalLM, optimizer: Optimizer, ids: Tensor, weights: Tensor, config: PretrainConfig) -> float:
    """One update on ids [B, T] long with target weights [B, T]; the loss."""
    target_weights = F.pad(weights[:, 1:], (0, 1))
    target_weights = target_weights / target_weights.sum()
    targets = F.pad(ids[:, 1:], (0, 1))
    rows = len(ids) if ids.is_cuda else max(1, TOKENS_AT_ONCE // ids.shape[1])
    total = torch.zeros((), device=ids.device)
    optimizer.zero_grad()
    for part in zip(ids.split(rows), targets.split(rows), target_weights.split(rows), strict=True):
        loss = rows_loss(model, *part, config.bf16)
        loss.backward()
        total = total + loss.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()
    return float(total)


def rows_loss(model: FastWeightForCausalLM, ids: Tensor, targets: Tensor, target_weights: Tensor, bf16: bool) -> Tensor:
    """Weighted cross-entropy of some rows, all [B, T]; with `bf16` matrix products run in bfloat16."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        hidden = model.model(ids, use_cache=False).last_hidden_state
        loss, _ = linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, targets.flatten(), target_weights.flatten())
    return loss


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save_checkpoint(
    out: Path, model: FastWeightForCausalLM, optimizer: Optimizer, step: int, config: PretrainConfig
) -> None:  # fmt: skip
    """Weights and optimizer moments as safetensors, under a temporary name until they are complete."""
    from safetensors.torch import save_file

    tensors = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in moments.items()}
    with made_whole(out / "checkpoint.safetensors.tmp", out / "checkpoint.safetensors") as file:
        save_file(tensors, file, metadata={"step": str(step), "settings": json.dumps(decisive(config))})


def decisive(config: PretrainConfig) -> dict[str, Any]:
    """The settings that training depends on."""
    others = ("output_dir", "store_dtype", "save_steps", "log_steps", "probe_steps", "probe_lengths", "probes_per_kind")
    return {name: value for name, value in asdict(config).items() if name not in others}


def load_checkpoint(out: Path, model: FastWeightForCausalLM, optimizer: Optimizer, config: PretrainConfig) -> int:
    """Steps done, 0 without a checkpoint. RefineError for a checkpoint of a training with other settings."""
    from safetensors import safe_open

    path = out / "checkpoint.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        step, settings = int(file.metadata()["step"]), json.loads(file.metadata().get("settings", "{}"))
    now = json.loads(json.dumps(decisive(config)))
    if changed := [name for name, value in settings.items() if now.get(name) != value]:
        raise RefineError(f"{path} was made with other settings ({', '.join(changed)}); name another output_dir, or --restart")
    model.load_state_dict({k[len("model.") :]: v for k, v in tensors.items() if k.startswith("model.")}, strict=False)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    saved = optimizer.state_dict()
    optimizer.load_state_dict({**saved, "state": state})
    return step


@torch.no_grad()
def round_to(model: FastWeightForCausalLM, dtype: str) -> None:
    """Give the weights values that `dtype` holds exactly; they stay float32."""
    for weight in model.parameters():
        weight.copy_(weight.to(getattr(torch, dtype)))


def save_model(
    out: Path, model: FastWeightForCausalLM, tokenizer: PreTrainedTokenizerBase, config: PretrainConfig, card: str
) -> Path:
    """Model, tokenizer, settings and card in `out/model`, complete or not at all.

    The weights are stored as `config.store_dtype`, while the model's own configuration names the dtype it was trained in, which is
    what `load` widens them to.
    """
    shutil.rmtree(out / "model.tmp", ignore_errors=True)
    stored = {name: weight.to(getattr(torch, config.store_dtype)) for name, weight in model.state_dict().items()}
    with made_whole(out / "model.tmp", out / "model") as folder:
        model.save_pretrained(folder, state_dict={k: v for k, v in stored.items() if k != "lm_head.weight"})
        tokenizer.save_pretrained(folder)
        (folder / "pretrain_config.json").write_text(json.dumps(asdict(config), indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")
    return out / "model"
