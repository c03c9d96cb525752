"""The jobs of the study: each trains or loads one model, measures it, and leaves one json file, so that nothing is done twice."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from refine_nsp import ReFINEConfig, ReFINETrainer, TestTimeConfig, TestTimeTrainer, load
from refine_nsp.config import NSPConfig
from refine_nsp.files import write_atomically
from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.models.load import load_model, load_tokenizer
from refine_nsp.nsp.passes import run as run_pass
from refine_nsp.nsp.records import Draws, Metrics, gather_positions
from refine_nsp.nsp.selection import select
from refine_nsp.ops.linear_cross_entropy import linear_cross_entropy
from refine_nsp.training.nested import PostTrainer, PostTrainingConfig
from refine_nsp.training.phases import MicroBatch, NextSequence

from . import material as m
from . import measuring
from .settings import ABLATIONS, BASES, EXTRA, MID, POST, SAME_TIME, Scale

Figures = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """Where results go, and what everything depends on."""

    out: str
    scale: Scale
    squad: str | None
    hotpotqa: str | None

    def folder(self, *names: Any) -> Path:
        return Path(self.out).joinpath(*(str(n).replace(" ", "_").replace(",", "") for n in names))

    def result(self, job: Job) -> Figures:
        """Figures of a finished job."""
        return json.loads(self.folder("jobs", f"{job.name}.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Job:
    """kind: a function of `KINDS`; arguments: its own, all strings or ints, which also name the job."""

    kind: str
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        return "-".join(str(a).replace(" ", "_").replace(",", "") for a in (self.kind, *self.arguments))


def run(study: Study, job: Job) -> Figures:
    """Run a job, or read what it left before."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    path = study.folder("jobs", f"{job.name}.json")
    if not path.exists():
        figures = KINDS[job.kind](study, *job.arguments)
        write_atomically(path, json.dumps(figures, indent=1) + "\n")
    return study.result(job)


@lru_cache(maxsize=2)
def material_of(study: Study) -> m.Material:
    """Both bases have one tokenizer: it is trained on the same text."""
    return m.prepare(study.scale, load_tokenizer(BASES["DeltaNet"]), study.squad, study.hotpotqa)


def keep(model: FastWeightForCausalLM, folder: Path) -> None:
    """Save the weights, all or none of them."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


# --- mid-training -----------------------------------------------------------------------------------------------------


class ExtraCrossEntropy(NextSequence):
    """The control: cross-entropy once more on the K tokens after each position ReFINE would choose, instead of rollouts."""

    def loss(self, model: FastWeightForCausalLM, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        # As many draws as the ReFINE arm makes, so that the first of them are the same.
        c, draws = self.config, Draws.of(batch.sequences, self.config, batch.generator)
        forward = run_pass(model, batch.sequences, c, batch.totals["targets"])
        positions = select(forward, c, draws.positions)
        ahead = (positions[..., None] + torch.arange(c.rollout_length)).flatten(1)  # [B, P*K]
        targets = batch.input_ids.gather(1, ahead + 1).flatten()
        hidden = gather_positions(forward.hidden, ahead).flatten(0, 1)
        extra, _ = linear_cross_entropy(hidden, model.lm_head.weight, targets, torch.full((len(targets),), 1.0 / len(targets)))
        return c.lambda_ntp * forward.loss_ntp + c.lambda_rl * extra, {"loss_ntp": forward.loss_ntp.detach()}


def measure_mid(study: Study, model: FastWeightForCausalLM, seed: int, generates: bool) -> Figures:
    """Figures of a mid-trained model; `generates`: also of what it answers, needles and questions."""
    s, material = study.scale, material_of(study)
    model.eval()
    figures: Figures = {
        "text": measuring.text_figures(model, material),
        "recall": measuring.recall_figures(model, material, s),
        "choose_entropy": measuring.text_figures(model, material, "choose")["entropy"],
    }
    if generates:
        figures["needles"] = measuring.needle_figures(model, material, s, seed)
        figures["qa"] = measuring.qa_figures(model, material, s, seed)
    return figures


def base(study: Study, family: str) -> Figures:
    return measure_mid(study, load(BASES[family])[0], 0, generates=True)


def mid(study: Study, family: str, arm: str, seed: int) -> Figures:
    """Mid-train one arm with one seed."""
    s, material = study.scale, material_of(study)
    steps = s.mid_steps
    if arm == SAME_TIME:
        known = [study.result(Job("mid", (family, other, seed)))["seconds"] for other in ("NTP", "ReFINE, context_kl")]
        steps = max(1, round(steps * known[1] / known[0]))
    chosen = MID["NTP"] if arm == SAME_TIME else {**MID, **ABLATIONS}[arm]
    folder = study.folder("models", "mid", family, arm, seed)
    args = ReFINEConfig(
        output_dir=str(folder.parent / f"run{seed}"), max_steps=steps, max_length=s.mid_length,
        per_device_train_batch_size=s.mid_rows, per_device_eval_batch_size=8, learning_rate=s.mid_learning_rate, seed=seed,
        logging_steps=s.curve_every, eval_strategy="no" if arm in ABLATIONS else "steps", eval_steps=s.curve_every,
        save_strategy="no", report_to="none", train_sampling_strategy="sequential", disable_tqdm=True, **chosen,
    )  # fmt: skip
    validation = Dataset.from_list([{"input_ids": row.tolist()} for row in material.windows["report"]])
    trainer = ReFINETrainer(
        model=load(BASES[family])[0], args=args, phase=ExtraCrossEntropy(args.nsp) if arm == EXTRA else None,
        train_dataset=m.mid_rows(s, material, seed, steps), eval_dataset=validation,
        processing_class=material.tokenizer,
    )  # fmt: skip
    if arm not in ABLATIONS:
        trainer.evaluate()
    trainer.train()
    history = trainer.state.log_history
    curve = [
        {"step": h["step"], **{k: h[f"eval_{k}"] for k in ("loss", "accuracy", "sampled_accuracy", "entropy")}}
        for h in history
        if "eval_accuracy" in h
    ]
    seconds = next(h["train_runtime"] for h in history if "train_runtime" in h) - sum(
        h.get("eval_runtime", 0) for h in history[1:]
    )
    figures = {
        "steps": steps,
        "seconds": seconds,
        "curve": curve,
        **measure_mid(study, trainer.model, seed, arm not in ABLATIONS),
    }
    if arm not in ABLATIONS:
        keep(trainer.model, folder)
    shutil.rmtree(args.output_dir, ignore_errors=True)
    return figures


# --- post-training ----------------------------------------------------------------------------------------------------


def post_rows(study: Study, seed: int) -> Dataset:
    """Prompts and answers of one seed, the same for all arms."""
    s, material = study.scale, material_of(study)
    per_source = -(-s.post_steps * s.post_prompts // len(material.paragraphs))
    asked = [q for name in material.paragraphs for q in m.questions(material, "train", name, s.post_length, per_source, seed + 1)]
    random.Random(seed).shuffle(asked)
    end = [material.tokenizer.eos_token_id]
    return Dataset.from_list(
        [{"prompt_ids": q.prompt, "answers_ids": [q.answer + end], "references": [q.reference]} for q in asked]
    )


def choosing_questions(study: Study) -> list[m.Asked]:
    """Questions that settings may be chosen by."""
    s, material = study.scale, material_of(study)
    return [
        q
        for source in material.paragraphs
        for length in s.qa_lengths
        for q in m.questions(material, "choose", source, length, s.qa_prompts // 2)
    ]


def post(study: Study, family: str, start: str, seed: int, variant: str) -> Figures:
    """Post-train a mid-trained model, and measure it on questions."""
    s, material = study.scale, material_of(study)
    folder = study.folder("models", "post", family, start, variant, seed)
    args = PostTrainingConfig(
        output_dir=str(folder.parent / f"run{seed}"), max_steps=s.post_steps, per_device_train_batch_size=s.post_prompts,
        learning_rate=s.post_learning_rate, max_length=s.post_length + 8, objective=POST[variant], seed=seed, logging_steps=s.curve_every,
        save_strategy="no", report_to="none", train_sampling_strategy="sequential", disable_tqdm=True,
    )  # fmt: skip
    model = load_model(study.folder("models", "mid", family, start, seed))
    trainer = PostTrainer(model=model, args=args, train_dataset=post_rows(study, seed), processing_class=material.tokenizer)
    seconds = trainer.train().metrics["train_runtime"]
    model = trainer.model.eval()
    figures = {
        "seconds": seconds,
        "qa": measuring.qa_figures(model, material, s, seed),
        "text": measuring.text_figures(model, material),
        "choose_answer_entropy": measuring.answer_entropy(model, choosing_questions(study))(1.0),
    }
    keep(model, folder)
    shutil.rmtree(args.output_dir, ignore_errors=True)
    return figures


# --- test time --------------------------------------------------------------------------------------------------------


def weights_of(study: Study, family: str, start: str, variant: str, seed: int) -> Path:
    """Folder of a model before test time; variant "none": as mid-training left it."""
    if variant == "none":
        return study.folder("models", "mid", family, start, seed)
    return study.folder("models", "post", family, start, variant, seed)


def adapted(study: Study, model: FastWeightForCausalLM, method: str, learning_rate: float, part: str, seed: int) -> Figures:
    s, material = study.scale, material_of(study)
    config = TestTimeConfig(objective=method, learning_rate=learning_rate, nsp=NSPConfig.preset("test_time"))
    return measuring.adapted_figures(model, material, s, part, seed, TestTimeTrainer(model, config))


def rate(study: Study, family: str, method: str) -> Figures:
    """The test-time learning rate, by log p of answers of the choosing set, from one model (NTP, then SFT, seed 0)."""
    folder = weights_of(study, family, "NTP", "SFT", 0)
    rates = study.scale.test_time_learning_rates
    by_rate = {str(lr): mean(adapted(study, load_model(folder), method, lr, "choose", 0)["log_p"]) for lr in rates}
    return {"log_p": by_rate, "chosen": max(rates, key=lambda lr: by_rate[str(lr)])}


def ttt(study: Study, family: str, start: str, seed: int, variant: str, method: str) -> Figures:
    """Answer the first questions, each from weights adapted to it."""
    chosen = study.result(Job("rate", (family, method)))["chosen"]
    model = load_model(weights_of(study, family, start, variant, seed))
    return adapted(study, model, method, chosen, "report", seed)


# --- controls ---------------------------------------------------------------------------------------------------------


def sharpen_text(study: Study, family: str, seed: int) -> Figures:
    """The NTP arm with its temperature lowered until its entropy on held-out text is the ReFINE arm's."""
    s, material = study.scale, material_of(study)
    wanted = study.result(Job("mid", (family, "ReFINE, context_kl", seed)))["choose_entropy"]
    model = load_model(study.folder("models", "mid", family, "NTP", seed))
    at = measuring.matching_temperature(lambda t: measuring.text_figures(model, material, "choose", t)["entropy"], wanted)
    return {
        "temperature": at,
        "text": measuring.text_figures(model, material, "report", at),
        "recall": measuring.recall_figures(model, material, s, temperature=at),
        "needles": measuring.needle_figures(model, material, s, seed, at),
    }


def sharpen_answers(study: Study, family: str, seed: int) -> Figures:
    """NTP, then SFT, with the temperature at which the entropy of its answers is that of ReFINE, then Nested ReFINE."""
    s, material = study.scale, material_of(study)
    wanted = study.result(Job("post", (family, "ReFINE, context_kl", seed, "Nested ReFINE")))["choose_answer_entropy"]
    model = load_model(weights_of(study, family, "NTP", "SFT", seed))
    at = measuring.matching_temperature(measuring.answer_entropy(model, choosing_questions(study)), wanted)
    return {"temperature": at, "qa": measuring.qa_figures(model, material, s, seed, at)}


KINDS: dict[str, Callable[..., Figures]] = {
    "base": base, "mid": mid, "post": post, "rate": rate, "ttt": ttt,
    "sharpen_text": sharpen_text, "sharpen_answers": sharpen_answers,
}  # fmt: skip


def settings_of(study: Study) -> dict[str, Any]:
    """What results depend on; data files by name only."""
    names = {k: Path(v).name if v is not None else None for k, v in (("squad", study.squad), ("hotpotqa", study.hotpotqa))}
    return {"scale": asdict(study.scale), **names}
