"""Measure wall time and peak memory of a ReFINE step, by each schedule and in closed form, relative to an NTP step, in one run.

With `--model FOLDER` it measures the presets on a model of yours instead, and says in which part of a step the time goes.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from _timing import alternate, model_of, ratio
from refine_nsp.config import NSPConfig
from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.models.load import load_model
from refine_nsp.models.protocols import CausalModel
from refine_nsp.nsp.forward import run
from refine_nsp.nsp.module import ReFINEStep
from refine_nsp.nsp.next_token import next_token_loss
from refine_nsp.nsp.records import Batch, Work
from refine_nsp.ops.memory import inside

SCHEDULES = ("fused", "snapshot", "reprefill")
CLOSED_FORM = ("closed form", "closed form, cached scores")
PRESETS = ("mid_training", "context", "likelihood", "likelihood, cached scores")


def ntp_step(model: FastWeightForCausalLM, ids: torch.Tensor) -> None:
    batch = Batch.of(ids)
    hidden = model.model(ids, use_cache=False).last_hidden_state
    next_token_loss(model, hidden, batch, batch.num_targets)[0].backward()
    model.zero_grad()


def refine_step(model: FastWeightForCausalLM, ids: torch.Tensor, schedule: str, N: int, selection: str) -> None:
    config = NSPConfig(num_generations=N, schedule=schedule, reward_funcs="hybrid", selection=selection)
    ReFINEStep(model, config)(ids, generator=torch.Generator().manual_seed(0)).loss.backward()
    model.zero_grad()


def closed_form_step(model: FastWeightForCausalLM, ids: torch.Tensor, K: int, cached: bool) -> None:
    """Make a step in closed form over all tokens, with K tokens each; context scores come from the step's own local pass or are given."""
    config = NSPConfig.preset("expected", rollout_length=K)
    scores = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) if cached else None
    ReFINEStep(model, config)(ids, scores=scores).loss.backward()
    model.zero_grad()


def run_of(model: FastWeightForCausalLM, ids: torch.Tensor, schedule: str, N: int, selection: str) -> Callable[[], None]:
    """Return a function that makes one step on ids [B, T] long."""
    if schedule == "ntp":
        return lambda: ntp_step(model, ids)
    if schedule in CLOSED_FORM:
        return lambda: closed_form_step(model, ids, N, schedule != "closed form")
    return lambda: refine_step(model, ids, schedule, N, selection)


def peak_megabytes(family: str, T: int, schedule: str, N: int, selection: str) -> float:
    """Measure the peak resident memory of a fresh process that makes two steps, less that of one that only builds the model."""
    command = [sys.executable, __file__, "--child", family, str(T), schedule, str(N), selection]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def high_water_kilobytes() -> int:
    """Return the peak resident memory of this process. `ru_maxrss` would not do: on Linux a child inherits its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)


def child(family: str, T: int, schedule: str, N: int, selection: str) -> None:
    torch.set_num_threads(1)
    model, ids = model_of(family), torch.randint(0, 4096, (1, T), generator=torch.Generator().manual_seed(1))
    before = high_water_kilobytes()
    for _ in range(2):
        run_of(model, ids, schedule, N, selection)()
    print((high_water_kilobytes() - before) / 1024)


def measure(
    family: str, T: int, generations: list[int], rounds: int, selection: str, schedules: list[str], closed_form: bool
) -> None:
    model, ids = model_of(family), torch.randint(0, 4096, (1, T), generator=torch.Generator().manual_seed(1))
    wanted = [(s, n) for s in schedules for n in generations if s != "reprefill" or n == 1]
    candidates = {"ntp": run_of(model, ids, "ntp", 1, selection)}
    candidates |= {f"{s} N={n}": run_of(model, ids, s, n, selection) for s, n in wanted}
    closed = [(name, K) for name in CLOSED_FORM for K in (1, 5)] if closed_form else []
    candidates |= {f"{name} K={K}": run_of(model, ids, name, K, selection) for name, K in closed}
    seconds = alternate(candidates, rounds)
    base = peak_megabytes(family, T, "ntp", 1, selection)
    print(f"{family}  T {T}  NTP step {min(seconds['ntp']):.2f} s, {base:.0f} MB")
    for s, n in wanted:
        memory = peak_megabytes(family, T, s, n, selection) / base
        print(f"    {s:9s} N={n}  time {ratio(seconds[f'{s} N={n}'], seconds['ntp'])}  peak memory {memory:.2f}")
    for name, K in closed:
        memory = peak_megabytes(family, T, name, K, selection) / base
        print(f"    {name:21s} K={K}  time {ratio(seconds[f'{name} K={K}'], seconds['ntp'])}  peak memory {memory:.2f}")


def parts_of_snapshot(family: str, T: int, rounds: int, selection: str) -> None:
    """Time the parts of the snapshot schedule (N=1): its first pass is what it costs more than `fused`."""
    model, ids = model_of(family), torch.randint(0, 4096, (1, T), generator=torch.Generator().manual_seed(1))
    step = ReFINEStep(model, NSPConfig(schedule="snapshot", reward_funcs="hybrid", selection=selection))
    batch = Batch.of(ids)
    rollouts = step.sample(ids, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def trunk() -> None:
        model.model(ids, output_states=True, use_cache=False)

    @torch.no_grad()
    def first_pass() -> None:
        run(Work(model, batch, step.config))

    def learn() -> None:
        step.learn(ids, rollouts).loss.backward()
        model.zero_grad()

    candidates = {
        "NTP step": lambda: ntp_step(model, ids),
        "first pass: layers": trunk,
        "first pass: layers, head and statistics": first_pass,
        "first pass and rollouts": lambda: step.sample(ids, generator=torch.Generator().manual_seed(0)),
        "gradient pass with the policy loss": learn,
    }
    seconds = alternate(candidates, rounds)
    print(f"{family}  T {T}  snapshot N=1, its parts relative to an NTP step")
    for name in list(candidates)[1:]:
        print(f"    {name:40s} {ratio(seconds[name], seconds['NTP step'])}")


class TimeByPart(TorchDispatchMode):
    """Add up the time of operations, in seconds of this thread, by the part of the step (`ops/memory.py`) that they run in."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = time.thread_time()
        out = func(*args, **(kwargs or {}))
        self.seconds[inside[-1] if inside else "backward"] += time.thread_time() - start
        return out


def preset_step(model: CausalModel, ids: torch.Tensor, preset: str) -> None:
    name, _, cached = preset.partition(", ")
    scores = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) if cached else None
    step = ReFINEStep(model, NSPConfig.preset(name))
    step(ids, generator=torch.Generator().manual_seed(0), scores=scores).loss.backward()
    model.zero_grad()


def measure_model(folder: str, T: int, rounds: int, presets: list[str]) -> None:
    """Measure the presets on a model of the user's: their time in NTP steps, and where it goes."""
    model = load_model(folder, dtype="float32").train()
    ids = torch.randint(0, model.config.vocab_size, (1, T), generator=torch.Generator().manual_seed(1))
    candidates: dict[str, Callable[[], None]] = {"ntp": lambda: ntp_step(model, ids)}
    candidates |= {preset: lambda preset=preset: preset_step(model, ids, preset) for preset in presets}
    seconds = alternate(candidates, rounds)
    print(f"{folder}  T {T}  NTP step {min(seconds['ntp']):.2f} s; parts in NTP steps of processor time")
    base = 0.0
    for name, run_once in candidates.items():
        with TimeByPart() as timed:
            run_once()
        base = base or sum(timed.seconds.values())
        parts = "  ".join(f"{part} {s / base:.2f}" for part, s in sorted(timed.seconds.items(), key=lambda pair: -pair[1]))
        print(f"    {name:26s} time {ratio(seconds[name], seconds['ntp']):18s}  {parts}")


def main() -> None:
    if "--child" in sys.argv:
        family, T, schedule, N, selection = sys.argv[sys.argv.index("--child") + 1 :]
        child(family, int(T), schedule, int(N), selection)
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["delta_net", "gated_deltanet", "lact"])
    parser.add_argument("--model", help="a folder or hub name: the presets on this model, and where the time of a step goes")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS), help="with --model")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096])
    parser.add_argument("--generations", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES))
    parser.add_argument("--no_closed_form", action="store_true")
    parser.add_argument("--selection", default="entropy")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", action="store_true", help="instead: where the snapshot schedule's time goes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.model:
        for T in args.lengths:
            measure_model(args.model, T, args.rounds, args.presets)
        return
    if args.parts:
        for family in args.models:
            parts_of_snapshot(family, max(args.lengths), args.rounds, args.selection)
        return
    print(f"P=8, K=5, {args.threads} thread(s), float32; time and memory relative to NTP: median (min-max) of pairs")
    for family in args.models:
        for T in args.lengths:
            measure(family, T, args.generations, args.rounds, args.selection, args.schedules, not args.no_closed_form)


if __name__ == "__main__":
    main()
