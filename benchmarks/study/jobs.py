"""Run the jobs of the study: each trains or loads one model, measures it, and leaves one json file, so that nothing is done twice."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean, median
from typing import Any

import datasets
import torch
from datasets import Dataset

from refine_nsp import NSPConfig, ReFINEConfig, ReFINETrainer, TestTimeConfig, TestTimeTrainer, load
from refine_nsp.environment import keep_freed_memory
from refine_nsp.evaluation.tasks import Task
from refine_nsp.files import write_atomically
from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.models.load import load_model, load_tokenizer
from refine_nsp.training.nested import PostTrainer, PostTrainingConfig

from . import material as m
from . import measuring
from .controls import CONTROLS
from .settings import ARMS, BASES, EXPECTED, MAIN, NTP, POST, POST_AFTER, SAME_TIME, TEMPERATURES, TEST_TIME, TEXT_LIMIT, Scale

Figures = dict[str, Any]
COST_STEPS, POST_COST_STEPS, COST_TURNS = 12, 4, 3
REPORT_SEED = 100  # of prompts and probes; a seed of training adds to it


@dataclass(frozen=True)
class Study:
    """Where results go, and what everything depends on. out: the jobs' figures, which `records.py` packs into one file worth keeping,
    and models and other things that are made again where they are missing; device: where mid-training runs (measuring and the rest:
    the CPU)."""

    out: str
    scale: Scale
    files: m.Files
    device: str = "cpu"

    def folder(self, *names: Any) -> Path:
        return Path(self.out).joinpath(*(plain(n) for n in names))

    def path(self, job: Job) -> Path:
        return Path(self.out, "jobs", f"{job.name}.json")

    def done(self, kind: str, *arguments: Any) -> bool:
        """Tell whether a job has left its figures."""
        return self.path(Job(kind, arguments)).exists()

    def result(self, job: Job) -> Figures:
        """Read the figures of a finished job."""
        return json.loads(self.path(job).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Job:
    """kind: a function of `KINDS`; arguments: its own, all strings or ints, which also name the job."""

    kind: str
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        return "-".join(plain(a) for a in (self.kind, *self.arguments))


def plain(name: Any) -> str:
    """Write a value as part of a file's name."""
    return str(name).replace(" ", "_").replace(",", "")


def run(study: Study, job: Job) -> Figures:
    """Run a job, or read the figures that it left before."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    keep_freed_memory()
    datasets.config.HF_DATASETS_CACHE = study.folder("datasets")  # context scores are shared by arms and kept with the study
    if not study.path(job).exists():
        figures = KINDS[job.kind](study, *job.arguments)
        write_atomically(study.path(job), json.dumps(figures, indent=1) + "\n")
    return study.result(job)


@lru_cache(maxsize=2)
def material_of(study: Study) -> m.Material:
    """Prepare the texts. One serves all bases, since they share a tokenizer, trained on the same text."""
    return m.prepare(study.scale, load_tokenizer(BASES[MAIN]), study.files)


@lru_cache(maxsize=2)
def ruler_of(study: Study, seed: int) -> list[Task]:
    """Build RULER's prompts: other ones for every seed of training, the same for all its arms."""
    return m.ruler_tasks(study.scale, load_tokenizer(BASES[MAIN]), study.files, seed)


def keep(model: FastWeightForCausalLM, folder: Path) -> None:
    """Save the weights, whole or not at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


# --- mid-training -----------------------------------------------------------------------------------------------------


def mid_train(
    study: Study, family: str, arm: str, chosen: dict[str, float], seed: int, steps: int, out: Path
) -> tuple[FastWeightForCausalLM, float]:
    """Train a base as an arm with chosen settings; return it and the seconds it took, context scores included."""
    s, material, settings = study.scale, material_of(study), dict(chosen)
    gamma = settings.pop("gamma", None)
    args = ReFINEConfig(
        output_dir=str(out), max_steps=steps, max_length=s.mid_length, per_device_train_batch_size=s.mid_rows, seed=seed,
        bf16=s.bf16, use_cpu=study.device == "cpu", save_strategy="no", report_to="none", train_sampling_strategy="sequential",
        disable_tqdm=True, **ARMS[arm].settings, **settings,
    )  # fmt: skip
    control = ARMS[arm].phase
    with measuring.Clock() as clock:
        trainer = ReFINETrainer(
            model=load(BASES[family])[0], args=args, phase=None if control is None else CONTROLS[control](args.nsp, gamma),
            train_dataset=m.mid_rows(s, material, seed, steps), processing_class=material.tokenizer,
        )  # fmt: skip
        trainer.train()
    shutil.rmtree(args.output_dir, ignore_errors=True)
    return trainer.model.cpu().eval(), clock.seconds


def trial(study: Study, arm: str, index: int) -> Figures:
    """Mid-train shortly with one combination of an arm's grid, and measure it on the choosing set."""
    s, material, settings = study.scale, material_of(study), ARMS[arm].trials[index]
    out = study.folder("training", "trial", arm, index)
    model, seconds = mid_train(study, MAIN, arm, settings, m.TRIAL_SEED, s.trial_steps, out)
    probed = measuring.probe_figures(model, m.probes(s, material, m.TRIAL_SEED))["1.0"]
    return {
        "settings": settings,
        "seconds": seconds,
        "text_loss": measuring.text_figures(model, material.windows["choose"])["loss"],
        "tokens": mean(p["tokens"] for p in probed.values()),
        "greedy": mean(p["greedy"] for p in probed.values()),
    }


def chosen(study: Study, arm: str) -> dict[str, float]:
    """Choose an arm's trial with the most right tokens of answers, among those within `TEXT_LIMIT` of NTP's best text loss.

    If there is none, choose the one with the least text loss.
    """

    def trials(name: str) -> list[Figures]:
        return [study.result(Job("trial", (name, i))) for i in range(len(ARMS[name].trials))]

    limit = min(t["text_loss"] for t in trials(NTP)) + TEXT_LIMIT
    within = [t for t in trials(arm) if t["text_loss"] <= limit]
    best = max(within, key=lambda t: t["tokens"]) if within else min(trials(arm), key=lambda t: t["text_loss"])
    return dict(best["settings"])


def far(study: Study, family: str) -> Figures:
    """Find the tokens whose prediction by the untouched base depends most on far context, so that no arm chooses its own exam."""
    model, windows = load(BASES[family])[0].eval(), material_of(study).windows
    W = NSPConfig().local_window
    return {name: measuring.far_tokens(model, windows[name], W) for name in ("report", "novels") if name in windows}


def measure(study: Study, family: str, model: FastWeightForCausalLM, seed: int) -> Figures:
    """Measure a base or a mid-trained model at temperature 1, and at the best of `TEMPERATURES`, found on the choosing set."""
    s, material = study.scale, material_of(study)
    windows, where = material.windows, study.result(Job("far", (family,)))
    text_t = measuring.best_text_temperature(model, windows["choose"])
    recall_t = measuring.best_temperature(measuring.probe_figures(model, m.probes(s, material, m.TRIAL_SEED), TEMPERATURES))
    probed = measuring.probe_figures(model, m.probes(s, material, REPORT_SEED + seed), sorted({1.0, recall_t}))
    return {
        "ruler": measuring.ruler_figures(model, material.tokenizer, ruler_of(study, REPORT_SEED + seed)),
        "probes": probed["1.0"],
        "probes_best": probed[str(recall_t)],
        "text": {name: measuring.text_figures(model, windows[name]) for name in where},
        "text_best": {name: measuring.text_figures(model, windows[name], text_t) for name in where},
        "far": {name: measuring.figures_at(model, windows[name], at) for name, at in where.items()},
        "far_best": {name: measuring.figures_at(model, windows[name], at, text_t) for name, at in where.items()},
        "temperatures": {"text": text_t, "recall": recall_t},
        "choose_entropy": measuring.text_figures(model, windows["choose"])["entropy"],
    }


def base(study: Study, family: str, seed: int) -> Figures:
    """Measure the untouched base on a seed's prompts."""
    figures = measure(study, family, load(BASES[family])[0].eval(), seed)
    return (
        figures
        if seed
        else {**figures, "qa": measuring.qa_figures(load(BASES[family])[0].eval(), material_of(study), study.scale, 0)}
    )


def cost(study: Study, family: str) -> Figures:
    """Measure processor seconds of a few steps of NTP and of `expected`, the scores of their rows included, by turns in one process.

    Jobs may run on different machines, whose times do not compare.
    """
    steps, seconds = min(COST_STEPS, study.scale.trial_steps), {NTP: [], EXPECTED: []}
    for turn in range(COST_TURNS):  # rows of their own in every turn: known scores would cost nothing
        for arm, times in seconds.items():
            out = study.folder("training", "cost", family, arm, turn)
            times.append(mid_train(study, family, arm, chosen(study, arm), m.TRIAL_SEED + 1 + turn, steps, out)[1])
    ratios = [expected / ntp for ntp, expected in zip(*seconds.values(), strict=True)]
    return {"steps": steps, "seconds": seconds, "ratio": median(ratios)}


def mid(study: Study, family: str, arm: str, seed: int) -> Figures:
    """Mid-train one arm with one seed."""
    steps, trained = study.scale.mid_steps, arm
    if arm == SAME_TIME:
        steps, trained = max(1, round(steps * study.result(Job("cost", (family,)))["ratio"])), NTP
    settings = chosen(study, trained)
    model, seconds = mid_train(study, family, trained, settings, seed, steps, study.folder("training", family, arm, seed))
    figures = {"settings": settings, "steps": steps, "seconds": seconds, **measure(study, family, model, seed)}
    if family == MAIN and seed < study.scale.post_seeds and arm in POST_AFTER:
        figures["qa"] = measuring.qa_figures(model, material_of(study), study.scale, seed)
    keep(model, study.folder("models", "mid", family, arm, seed))
    return figures


def mid_model(study: Study, family: str, arm: str, seed: int) -> FastWeightForCausalLM:
    """Load the model of a finished job, or train it again where only its figures were kept."""
    folder = study.folder("models", "mid", family, arm, seed)
    if not folder.exists():
        done = study.result(Job("mid", (family, arm, seed)))
        training = study.folder("training", family, arm, seed)
        keep(mid_train(study, family, arm, done["settings"], seed, done["steps"], training)[0], folder)
    return load_model(folder)


def sharpen(study: Study, family: str, arm: str, seed: int) -> Figures:
    """Measure an arm at the temperature at which its entropy on held-out text is that of the closed form."""
    s, material = study.scale, material_of(study)
    wanted = study.result(Job("mid", (family, EXPECTED, seed)))["choose_entropy"]
    model = mid_model(study, family, arm, seed).eval()
    choose, report = material.windows["choose"], material.windows["report"]
    at = measuring.matching_temperature(lambda t: measuring.text_figures(model, choose, t)["entropy"], wanted)
    probed = measuring.probe_figures(model, m.probes(s, material, REPORT_SEED + seed), (at,))
    return {"temperature": at, "text": {"report": measuring.text_figures(model, report, at)}, "probes": probed[str(at)]}


# --- post-training ----------------------------------------------------------------------------------------------------


def post_rows(study: Study, seed: int) -> Dataset:
    """Build the prompts and answers of one seed, the same for all arms."""
    s, material = study.scale, material_of(study)
    per_source = -(-s.post_steps * s.post_prompts // len(material.paragraphs))
    asked = [q for name in material.paragraphs for q in m.questions(material, "train", name, s.post_length, per_source, seed + 1)]
    random.Random(seed).shuffle(asked)
    end = [material.tokenizer.eos_token_id]
    return Dataset.from_list(
        [{"prompt_ids": q.prompt, "answers_ids": [q.answer + end], "references": [q.reference]} for q in asked]
    )


def post_train(
    study: Study, model: FastWeightForCausalLM, seed: int, variant: str, steps: int, out: Path
) -> tuple[FastWeightForCausalLM, float]:
    """Post-train a model; return it and the seconds that took."""
    s, material = study.scale, material_of(study)
    args = PostTrainingConfig(
        output_dir=str(out), max_steps=steps,
        per_device_train_batch_size=s.post_prompts, learning_rate=s.post_learning_rate, max_length=s.post_length + 8, seed=seed,
        bf16=s.bf16, use_cpu=True, save_strategy="no", report_to="none", train_sampling_strategy="sequential", disable_tqdm=True,
        **POST[variant],
    )  # fmt: skip
    trainer = PostTrainer(model=model, args=args, train_dataset=post_rows(study, seed), processing_class=material.tokenizer)
    with measuring.Clock() as clock:
        trainer.train()
    shutil.rmtree(args.output_dir, ignore_errors=True)
    return trainer.model.eval(), clock.seconds


def post_trained(study: Study, start: str, seed: int, variant: str) -> tuple[FastWeightForCausalLM, float]:
    """Post-train a mid-trained model and keep it; return it and the seconds that took."""
    out = study.folder("training", "post", start, variant, seed)
    model, seconds = post_train(study, mid_model(study, MAIN, start, seed), seed, variant, study.scale.post_steps, out)
    keep(model, study.folder("models", "post", start, variant, seed))
    return model, seconds


def post(study: Study, start: str, seed: int, variant: str) -> Figures:
    """Post-train a mid-trained model, and measure it on questions."""
    s, material = study.scale, material_of(study)
    model, seconds = post_trained(study, start, seed, variant)
    return {
        "seconds": seconds,
        "qa": measuring.qa_figures(model, material, s, seed),
        "text": measuring.text_figures(model, material.windows["report"]),
        "choose_answer_entropy": measuring.answer_entropy(model, choosing_questions(study))(1.0),
    }


def post_cost(study: Study) -> Figures:
    """Measure processor seconds of a step of each kind of post-training, by turns in one process, as `cost` does.

    All start from the base, since the time does not depend on the weights.
    """
    steps, seconds = min(POST_COST_STEPS, study.scale.post_steps), {variant: [] for variant in POST}
    for turn in range(COST_TURNS):
        for variant, times in seconds.items():
            out = study.folder("training", "post_cost", variant, turn)
            times.append(post_train(study, load(BASES[MAIN])[0], turn, variant, steps, out)[1] / steps)
    return {"steps": steps, "seconds": seconds}


def choosing_questions(study: Study) -> list[m.Asked]:
    """Build the questions by which settings may be chosen."""
    s, material = study.scale, material_of(study)
    return [
        q
        for source in material.paragraphs
        for length in s.qa_lengths
        for q in m.questions(material, "choose", source, length, s.qa_prompts // 2)
    ]


def sharpen_answers(study: Study, seed: int) -> Figures:
    """Measure NTP with SFT at the temperature at which the entropy of its answers is that of `expected` with nested `expected`."""
    s, material = study.scale, material_of(study)
    wanted = study.result(Job("post", (EXPECTED, seed, "Nested expected")))["choose_answer_entropy"]
    model = model_before(study, NTP, "SFT", seed).eval()
    at = measuring.matching_temperature(measuring.answer_entropy(model, choosing_questions(study)), wanted)
    return {"temperature": at, "qa": measuring.qa_figures(model, material, s, seed, at)}


# --- test time --------------------------------------------------------------------------------------------------------


def model_before(study: Study, start: str, variant: str, seed: int) -> FastWeightForCausalLM:
    """Load a model before test time, trained again where its weights are missing; the variant "none" is as mid-training left it."""
    if variant == "none":
        return mid_model(study, MAIN, start, seed)
    folder = study.folder("models", "post", start, variant, seed)
    if not folder.exists():
        post_trained(study, start, seed, variant)
    return load_model(folder)


def adapted(study: Study, model: FastWeightForCausalLM, method: str, learning_rate: float, part: str, seed: int) -> Figures:
    settings = dict(TEST_TIME[method])
    nsp = NSPConfig.preset(settings.pop("preset", "test_time"))
    config = TestTimeConfig(learning_rate=learning_rate, nsp=nsp, **settings)
    return measuring.adapted_figures(model, material_of(study), study.scale, part, seed, TestTimeTrainer(model, config))


def rate(study: Study, method: str) -> Figures:
    """Choose the test-time learning rate by log p of answers of the choosing set, from one model (NTP, then SFT, seed 0)."""
    rates = study.scale.test_time_learning_rates
    models = {lr: model_before(study, NTP, "SFT", 0).eval() for lr in rates}
    by_rate = {str(lr): mean(adapted(study, model, method, lr, "choose", 0)["log_p"]) for lr, model in models.items()}
    return {"log_p": by_rate, "chosen": max(rates, key=lambda lr: by_rate[str(lr)])}


def ttt(study: Study, start: str, seed: int, variant: str, method: str) -> Figures:
    """Answer the first questions, each from weights adapted to it."""
    best = study.result(Job("rate", (method,)))["chosen"]
    return adapted(study, model_before(study, start, variant, seed).eval(), method, best, "report", seed)


KINDS: dict[str, Callable[..., Figures]] = {
    "trial": trial, "far": far, "base": base, "cost": cost, "mid": mid, "sharpen": sharpen, "post": post,
    "post_cost": post_cost, "sharpen_answers": sharpen_answers, "rate": rate, "ttt": ttt,
}  # fmt: skip


def settings_of(study: Study) -> dict[str, Any]:
    """List the settings that results depend on, with data files by name only."""
    names = {k: Path(v).name if v is not None else None for k, v in asdict(study.files).items()}
    return {"scale": asdict(replace(study.scale, families=())), "arms": {k: asdict(a) for k, a in ARMS.items()}, **names}
