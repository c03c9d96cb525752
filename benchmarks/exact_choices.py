"""The closed form's settings, compared on a choosing set: what weights are divided by, lambda, K, and how the context is scored.

    python benchmarks/exact_choices.py --output_dir runs/exact_choices

The job is the quickstart's (48 steps of 2,048 tokens from a shipped base, half of the rows recall documents), with other training rows,
probes and held-out windows, so that the quickstart's own figures stay unseen. A token's weight is its context score d over the number of
targets of the optimizer step ("targets"), or over the sum of d of the optimizer step ("sum of d"): both are additive, the second makes
every step weigh the same. First all lambdas; then, at the best of each divisor, K = 3 and cross-entropy at the same weights; at the best
of all, local windows half as long and the gain instead of the KL; and the two divisors at about equal total weight. Best: the greatest
mean of greedy and sampled recall over bases and seeds, among arms that cost no more than `TEXT_LIMIT` nats of text loss.

Resumable: every job leaves a file; run it again and only what is missing is done. `--print` shows what is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from refine_nsp import load
from refine_nsp.config import NSPConfig
from refine_nsp.evaluation.statistics import t_interval
from refine_nsp.files import write_atomically
from refine_nsp.nsp.context import context_divergence
from refine_nsp.report.tables import Cell, Table
from refine_nsp.tiny.corpus import standard_library
from refine_nsp.tiny.pretrain import encode_texts
from refine_nsp.tiny.probes import make_probes
from refine_nsp.tiny.quickstart import Material, Settings, measure, prepare, training_rows
from refine_nsp.training import ReFINEConfig, ReFINETrainer
from refine_nsp.training.phases import MicroBatch, NextSequence, NextToken, Phase

BASES = ("refine-nsp/tiny-delta-net", "refine-nsp/tiny-lact")
SEEDS = (100, 101, 102)
PROBE_SEED = 54321
SETTINGS = Settings(probes=((512, 16), (1024, 16), (1024, 32)), probes_per_kind=32)
LAMBDAS = {"targets": (3.0, 10.0, 30.0), "sum of d": (0.3, 1.0, 3.0)}
TEXT_LIMIT = 0.01
FIGURES = {
    "recall_greedy": "greedy recall",
    "recall_log_p": "log p",
    "recall_sampled": "sampled recall",
    "text_loss": "text loss",
    "text_accuracy": "text accuracy",
}
Figures = dict[str, float]


@dataclass(frozen=True)
class Arm:
    """What an arm trains by. divisor: of the weights, `targets` or `sum of d`. The rest: as in `NSPConfig`."""

    estimator: str
    divisor: str
    lambda_rl: float
    K: int = 1
    span: int = 4
    weights: str = "context"

    @property
    def name(self) -> str:
        return f"{self.estimator}, {self.divisor}, lambda {self.lambda_rl:g}, K {self.K}, span {self.span}, {self.weights}"

    @property
    def config(self) -> NSPConfig:
        settings: dict[str, Any] = {"rollout_length": self.K, "local_span": self.span, "weights": self.weights}
        return NSPConfig.preset(self.estimator, lambda_rl=self.lambda_rl, **settings)


NTP = None  # the arm that learns by next-token prediction alone
FIRST = [Arm("exact", divisor, value) for divisor, lambdas in LAMBDAS.items() for value in lambdas]
# Divided by targets, but with about the total weight of the other: is the divisor itself of any consequence?
MATCHED = (Arm("exact", "targets", 20.0), Arm("exact", "sum of d", 1.0))
CHOSEN = Arm("exact", "targets", 20.0, K=3)  # by what those before show; the preset


# --- what a step does -------------------------------------------------------------------------------------------------


class ByTargets(NextSequence):
    """The preset's divisor; keeps the total weight of every step."""

    def __init__(self, config: NSPConfig) -> None:
        super().__init__(config)
        self.total_weights: list[float] = []

    def loss(self, model: Any, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, Any]]:
        found = super().loss(model, batch)
        assert batch.result is not None and batch.result.weights is not None
        self.total_weights.append(float(batch.result.weights.sum()))
        return found


class BySumOfScores(ByTargets):
    """Weights divided by the sum of d over the optimizer step: d is needed before the step, so it costs a pass of its own."""

    @torch.no_grad()
    def prepare(self, model: Any, batches: Sequence[MicroBatch]) -> None:
        for batch in batches:
            scores = model(step=lambda m, b=batch.sequences: self.scores_of(m, b))
            batch.sequences = replace(batch.sequences, scores=scores)

    def scores_of(self, model: Any, sequences: Any) -> torch.Tensor:
        """d [B, T], 0 where a continuation is not whole."""
        hidden = model.model(sequences.input_ids, lengths=sequences.lengths, use_cache=False).last_hidden_state
        d = context_divergence(model, sequences, hidden, self.config, gain=self.config.weights == "context_gain")
        t = torch.arange(d.shape[1], device=d.device)
        return d * (t + self.config.rollout_length <= sequences.lengths[:, None] - 1)

    def count(self, batch: MicroBatch) -> dict[str, float]:
        assert batch.sequences.scores is not None
        return {**super().count(batch), "policy": float(batch.sequences.scores.sum())}


def phase_of(arm: Arm | None) -> Phase:
    if arm is NTP:
        return NextToken(NSPConfig())
    return (ByTargets if arm.divisor == "targets" else BySumOfScores)(arm.config)


# --- jobs -------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=len(BASES))
def material_of(base: str) -> tuple[Any, Material]:
    """Tokenizer, and training text with probes and windows that the quickstart does not use."""
    _, tokenizer = load(base)
    s, held = SETTINGS, encode_texts(tokenizer, standard_library(held_out=True))
    stride = len(held) // s.text_windows
    starts = [i * stride + stride // 2 for i in range(s.text_windows)]  # the quickstart's lie at i * stride
    windows = torch.stack([held[i : i + s.max_length] for i in starts if i + s.max_length <= len(held)])
    probes = make_probes(tokenizer, held.tolist(), s.probes, s.probes_per_kind, seed=PROBE_SEED)
    return tokenizer, replace(prepare(s, tokenizer, None, "text"), windows=windows, probes=probes)


def train(out: Path, base: str, arm: Arm | None, seed: int) -> Figures:
    """Train one arm with one seed from a base, and measure it."""
    (model, tokenizer), s, phase = load(base), SETTINGS, phase_of(arm)
    args = ReFINEConfig(
        output_dir=str(out / "training"), max_steps=s.steps, max_length=s.max_length, learning_rate=s.learning_rate, seed=seed,
        per_device_train_batch_size=s.sequences_per_step, save_strategy="no", report_to="none", disable_tqdm=True,
        train_sampling_strategy="sequential", nsp=phase.config,
    )  # fmt: skip
    _, material = material_of(base)
    rows = training_rows(s, seed, tokenizer, material.stream)
    trainer = ReFINETrainer(model=model, args=args, phase=phase, train_dataset=rows, processing_class=tokenizer)
    seconds = trainer.train().metrics["train_runtime"]
    shutil.rmtree(args.output_dir, ignore_errors=True)
    weight = mean(phase.total_weights) if isinstance(phase, ByTargets) else 0.0
    return {**measure(trainer.model.eval(), material), "seconds": seconds, "total_weight": weight}


def path_of(out: Path, base: str, arm: Arm | None, seed: int) -> Path:
    name = "NTP" if arm is NTP else arm.name.replace(", ", "-").replace(" ", "_")
    return out / base.split("/")[-1] / f"{name}-seed{seed}.json"


def result_of(path: Path) -> Figures | None:
    """Figures of a finished job with exactly these settings."""
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["figures"] if found["settings"] == json.loads(json.dumps(asdict(SETTINGS))) else None


def known(out: Path, base: str, arm: Arm | None) -> list[Figures] | None:
    """Figures of an arm, one record a seed; None until all seeds are done."""
    found = [f for seed in SEEDS if (f := result_of(path_of(out, base, arm, seed))) is not None]
    return found if len(found) == len(SEEDS) else None


def run_missing(out: Path, arms: Sequence[Arm | None]) -> None:
    """Every job without a result, a seed of all arms after the other, so that noise of the machine meets all alike."""
    for base, seed, arm in itertools.product(BASES, SEEDS, arms):
        path = path_of(out, base, arm, seed)
        if result_of(path) is None:
            found = {"settings": asdict(SETTINGS), "figures": train(out, base, arm, seed)}
            write_atomically(path, json.dumps(found, indent=1) + "\n")
            print(path, {k: round(v, 4) for k, v in found["figures"].items()}, flush=True)


# --- choosing ---------------------------------------------------------------------------------------------------------


def differences(out: Path, base: str, arm: Arm, other: Arm | None, key: str) -> list[float]:
    """Of two arms, one a seed; none until both are done."""
    found, reference = known(out, base, arm), known(out, base, other)
    return [] if found is None or reference is None else [a[key] - b[key] for a, b in zip(found, reference, strict=True)]


def best(out: Path, arms: Sequence[Arm]) -> Arm | None:
    """The arm that recalls best among those within the limit on text loss; None until all are done."""

    def over_bases(arm: Arm, key: str) -> float:
        return mean(mean(differences(out, base, arm, NTP, key)) for base in BASES)

    if not all(differences(out, base, arm, NTP, "text_loss") for base in BASES for arm in arms):
        return None
    within = [a for a in arms if over_bases(a, "text_loss") <= TEXT_LIMIT]
    fit = within or [min(arms, key=lambda a: over_bases(a, "text_loss"))]
    return max(fit, key=lambda a: over_bases(a, "recall_greedy") + over_bases(a, "recall_sampled"))


def winners(out: Path) -> list[Arm]:
    """The best of each divisor; none until all are done."""
    found = [best(out, [a for a in FIRST if a.divisor == divisor]) for divisor in LAMBDAS]
    return [a for a in found if a is not None] if None not in found else []


def later(out: Path) -> dict[Arm, Arm]:
    """The arms that follow from the best lambdas, and which arm each is a variation of."""
    chosen = winners(out)
    if not chosen:
        return {}
    top = best(out, chosen)
    assert top is not None
    found = {replace(a, K=3): a for a in chosen}
    for arm in chosen:
        for value in two_lambdas(arm):
            found[replace(arm, estimator="likelihood", lambda_rl=value)] = replace(arm, lambda_rl=value)
    return {
        **found,
        replace(top, span=2): top,
        replace(top, weights="context_gain"): top,
        MATCHED[0]: MATCHED[1],
        CHOSEN: MATCHED[0],
    }


def two_lambdas(arm: Arm) -> tuple[float, float]:
    """The arm's lambda and the next smaller, or, of the smallest, the next larger."""
    lambdas = LAMBDAS[arm.divisor]
    i = lambdas.index(arm.lambda_rl)
    return (lambdas[i], lambdas[i - 1]) if i > 0 else (lambdas[0], lambdas[1])


# --- tables -----------------------------------------------------------------------------------------------------------

HALF = f"mean ± half a 95 % t-interval over {len(SEEDS)} seeds; * where the mean exceeds it"


def cell(values: list[float]) -> str:
    d, half = t_interval(values)
    return f"{d:+.4f} ± {half:.4f}" + (" *" if abs(d) > half else "")


def arms_table(out: Path) -> Table:
    """NTP's figures, and the differences of the arms to it."""
    rows: list[list[Cell]] = []
    for base in BASES:
        if (ntp := known(out, base, NTP)) is None:
            continue
        figures = [f"{mean(f[key] for f in ntp):.4f}" for key in FIGURES]
        rows.append([base, "NTP (absolute)", *figures, "", "", f"{min(f['seconds'] for f in ntp):.0f}"])
        for arm in [*FIRST, *later(out)]:
            if (found := known(out, base, arm)) is not None:
                weight, seconds = mean(f["total_weight"] for f in found), min(f["seconds"] for f in found)
                cells = [cell(differences(out, base, arm, NTP, key)) for key in FIGURES]
                rows.append([base, arm.name, *cells, f"{weight:.3f}", f"{arm.lambda_rl * weight:.2f}", f"{seconds:.0f}"])
    notes = [
        f"Differences to NTP on the same rows: {HALF}. {len(SETTINGS.probes) * SETTINGS.probes_per_kind} probes.",
        "Total weight: sum of w_t a step, mean over the training. Seconds of training: the quickest seed's, one thread.",
        *(f"Best lambda of its divisor: {a.name}" for a in winners(out)),
    ]
    columns = ["base", "arm", *FIGURES.values(), "total weight", "lambda x it", "seconds"]
    return Table("Choices of the closed form", columns, rows, notes)


def variations_table(out: Path) -> Table:
    """Each later arm against the one it varies."""
    rows: list[list[Cell]] = [
        [base, arm.name, other.name, *(cell(differences(out, base, arm, other, key)) for key in FIGURES)]
        for base in BASES
        for arm, other in later(out).items()
        if differences(out, base, arm, other, "text_loss")
    ]
    return Table("One setting changed", ["base", "arm", "minus", *FIGURES.values()], rows, [f"Paired by seed: {HALF}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/exact_choices"), help="results of every job, table.md")
    parser.add_argument("--print", action="store_true", help="run nothing; show what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)  # of tiny models: jobs beside it lose more than a second thread gives
    torch.set_flush_denormal(True)
    if not args.print:
        run_missing(args.output_dir, [NTP, *FIRST])
        run_missing(args.output_dir, list(later(args.output_dir)))
    found = "\n".join(t.markdown() for t in (arms_table(args.output_dir), variations_table(args.output_dir)))
    write_atomically(args.output_dir / "table.md", found)
    print(found)


if __name__ == "__main__":
    main()
