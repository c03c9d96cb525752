"""Measure steps of full-size models with random weights on a GPU.

For each step it prints tokens per second, the share of the matmul peak, the time relative to a next-token step of the same model and of
flash-linear-attention's own model, the peak memory, and how often the host waits for the device.

A step is forward, loss and backward in bfloat16, without an optimizer. Candidates take turns. At lengths of `CHECKPOINTED` tokens and
more, all candidates run with gradient checkpointing. Figures are written model by model and length by length, so that a run that is stopped
leaves those it had. `--device cpu --tiny` tries the script anywhere; `--profile` says which kernels take the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from _timing import alternate
from refine_nsp.config import NSPConfig
from refine_nsp.environment import devices, environment
from refine_nsp.models import DeltaNetConfig, DeltaNetForCausalLM, LaCTConfig, LaCTForCausalLM
from refine_nsp.nsp.forward import run_hidden
from refine_nsp.nsp.module import ReFINEStep
from refine_nsp.nsp.next_token import next_token_loss
from refine_nsp.nsp.records import Batch
from refine_nsp.ops.kernels import by_operation, chosen
from refine_nsp.report.tables import Cell, Table

SIZES: dict[str, dict[str, Any]] = {
    "delta_net": {"hidden_size": 2048, "num_heads": 16, "num_hidden_layers": 24, "vocab_size": 32000},
    "lact": {"hidden_size": 1536, "num_attn_heads": 24, "num_lact_heads": 4, "num_hidden_layers": 24, "w0_w2_low_rank": 32},
}
TINY: dict[str, dict[str, Any]] = {
    "delta_net": {"hidden_size": 64, "num_heads": 2, "num_hidden_layers": 2, "vocab_size": 256},
    "lact": {
        "hidden_size": 64, "num_attn_heads": 2, "num_lact_heads": 2, "num_hidden_layers": 2, "vocab_size": 256, "w0_w2_low_rank": 8,
        "lact_chunk_size": 64, "window_size": 64,
    },
}  # fmt: skip
CHECKPOINTED = 32768
NTP, FLA = "NTP", "NTP, flash-linear-attention"
# What a step of the method may cost, relative to an NTP step at 16,384 tokens; an NTP step itself in tokens/s relative to theirs.
GOALS = {
    NTP: ">= 0.95 of theirs",
    "closed form, cached scores": "<= 1.05",
    "closed form": "<= 1.35",
    "fused N=1": "<= 1.08",
    "fused N=8": "<= 1.20",
}
STEPS: dict[str, dict[str, Any]] = {
    "closed form, cached scores": {"name": "expected"},
    "closed form": {"name": "expected"},
    "fused N=1": {"name": "mid_training", "schedule": "fused"},
    "fused N=8": {
        "name": "mid_training",
        "schedule": "fused",
        "num_generations": 8,
        "baseline": "leave_one_out",
        "advantage_group": "position",
    },
    "snapshot N=1": {"name": "mid_training", "schedule": "snapshot"},
}
Step = Callable[[], None]


@dataclass(frozen=True)
class Figures:
    """Hold the figures of one candidate at one length: seconds of every round, and the rest from medians; None: not measured."""

    model: str
    tokens: int
    step: str
    seconds: list[float]
    tokens_per_second: float
    share_of_peak: float
    relative_to_ntp: float
    relative_to_fla: float | None
    peak_gib: float | None
    waits: int | None
    checkpointed: bool


def model_of(name: str, tiny: bool, device: torch.device) -> Any:
    config, model = {"delta_net": (DeltaNetConfig, DeltaNetForCausalLM), "lact": (LaCTConfig, LaCTForCausalLM)}[name]
    torch.manual_seed(0)
    with device:
        return model(config(**(TINY if tiny else SIZES)[name])).to(torch.bfloat16).train()


def theirs_of(name: str, tiny: bool, device: torch.device) -> Any:
    """Build flash-linear-attention's model of the same shape, with the head's loss in blocks; None where there is none."""
    if name != "delta_net" or chosen().name != "fla":
        return None
    from fla.models import DeltaNetConfig as Config
    from fla.models import DeltaNetForCausalLM as Model

    config = Config(**(TINY if tiny else SIZES)[name], fuse_cross_entropy=False, fuse_linear_cross_entropy=True)
    with device:
        return Model(config).to(torch.bfloat16).train()


def steps_of(model: Any, theirs: Any, ids: torch.Tensor) -> dict[str, Step]:
    """Make the candidates on ids [1, T] long, with P 8 and K 5."""
    batch = Batch.of(ids)
    scores = torch.rand(ids.shape, device=ids.device)

    def ntp() -> None:
        loss, _ = next_token_loss(model, run_hidden(model, batch, NSPConfig()), batch)
        loss.backward()
        model.zero_grad()

    def method(name: str) -> Step:
        step = ReFINEStep(model, NSPConfig.preset(**STEPS[name], positions_per_sequence=8, rollout_length=5))
        given = scores if name == "closed form, cached scores" else None

        def run() -> None:
            step(ids, generator=torch.Generator().manual_seed(0), scores=given).loss.backward()
            model.zero_grad()

        return run

    def other() -> None:
        theirs(input_ids=ids, labels=ids).loss.backward()
        theirs.zero_grad()

    return {NTP: ntp} | ({} if theirs is None else {FLA: other}) | {name: method(name) for name in STEPS}


def waiting(device: torch.device, step: Step) -> Step:
    """Wrap a step so that it returns only when the device has finished it."""

    def run() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def peak_gib(device: torch.device, step: Step) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**30


def waits_of(device: torch.device, step: Step) -> int | None:
    """Count how often the host waits in a step, as torch reports it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in caught)


@contextmanager
def fitting(where: str):
    """Print that a candidate did not fit into memory, and continue with the next."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        print(f"{where}: {error}")
        torch.cuda.empty_cache()


def profiled(device: torch.device, step: Step) -> str:
    """List a step's kernels, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=activities) as profile:
        waiting(device, step)()
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=70)


def matmul_peak(device: torch.device, size: int) -> float:
    """Measure the best rate of one large product in bfloat16, in FLOP/s."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = alternate({"mm": waiting(device, lambda: torch.mm(a, b))}, 20, warm_up=5)["mm"]
    return 2 * size**3 / min(times)


def measure(name: str, T: int, args: argparse.Namespace, peak: float) -> list[Figures]:
    device = torch.device(args.device)
    model, theirs = model_of(name, args.tiny, device), theirs_of(name, args.tiny, device)
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (1, T), generator=torch.Generator().manual_seed(1)).to(device)
    if checkpointed := T >= CHECKPOINTED:
        for m in (model, theirs):
            if m is not None:
                m.activation_checkpointing_enable()
    # Linear layers and the head, 2 FLOP forward and 4 backward a weight and token; states and attention are not counted.
    flops = 6.0 * T * sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    candidates: dict[str, Step] = {}
    memory, waits = {}, {}
    for step_name, step in steps_of(model, theirs, ids).items():
        with fitting(f"{name}, T {T}, {step_name}"):
            step()  # kernels are compiled and tuned here
            memory[step_name], waits[step_name] = peak_gib(device, step), waits_of(device, step)
            candidates[step_name] = waiting(device, step)
            if args.profile:
                with args.output.with_suffix(".profile.txt").open("a") as file:
                    file.write(f"{name}, T {T}, {step_name}\n{profiled(device, step)}\n")
    if NTP not in candidates:
        return []
    seconds = alternate(candidates, args.rounds, warm_up=1)

    def relative(step_name: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[step_name], seconds[to], strict=True))

    return [
        Figures(
            model=name, tokens=T, step=s, seconds=times, tokens_per_second=T / statistics.median(times),
            share_of_peak=flops / statistics.median(times) / peak, relative_to_ntp=relative(s, NTP),
            relative_to_fla=relative(s, FLA) if FLA in seconds else None, peak_gib=memory[s], waits=waits[s],
            checkpointed=checkpointed,
        )
        for s, times in seconds.items()
    ]  # fmt: skip


def tables_of(figures: list[Figures], title: str) -> list[Table]:
    columns = ["T", "step", "tokens/s", "of matmul peak", "time / NTP", "goal at 16K", "time / fla's NTP", "peak GiB", "waits"]
    tables = []
    for name in dict.fromkeys(f.model for f in figures):
        rows: list[list[Cell]] = [
            [
                f"{f.tokens}{' (checkpointed)' if f.checkpointed else ''}", f.step, f"{f.tokens_per_second:,.0f}", f"{f.share_of_peak:.0%}",
                f"{f.relative_to_ntp:.2f}", GOALS.get(f.step), None if f.relative_to_fla is None else f"{f.relative_to_fla:.2f}",
                None if f.peak_gib is None else f"{f.peak_gib:.1f}", f.waits,
            ]
            for f in figures
            if f.model == name
        ]  # fmt: skip
        tables.append(Table(f"{name}: {title}", columns, rows))
    return tables


def try_few(count: int) -> None:
    """Tune kernels from now on over at most `count` of their configurations, spread over the list."""
    from triton.runtime.autotuner import Autotuner

    every = Autotuner.prune_configs

    def few(self: Any, arguments: dict[str, Any]) -> list[Any]:
        found = list(every(self, arguments))
        return found[:: -(-len(found) // count)]

    Autotuner.prune_configs = few


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(SIZES), default=sorted(SIZES))
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of two small layers, T 128 and 256")
    parser.add_argument("--quick", action="store_true", help="T 4,096 and 16,384, three rounds")
    parser.add_argument("--profile", action="store_true", help="each step's longest kernels, in a .profile.txt beside the output")
    parser.add_argument(
        "--configurations",
        type=int,
        metavar="N",
        help="tune each kernel over N of its configurations: two are compiled in minutes [all]",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="this name with .json and .md")
    args = parser.parse_args()
    if args.quick:
        args.rounds = 3
    lengths = args.lengths or ([128, 256] if args.tiny else [4096, 16384] if args.quick else [4096, 16384, 65536])
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --device cpu --tiny tries the script without one")
    if args.configurations and device.type == "cuda":
        try_few(args.configurations)
    peak = matmul_peak(device, 512 if args.tiny else 8192)
    where = devices()[-1]["name"] if device.type == "cuda" else "CPU"
    tuned = f"; {args.configurations} configurations a kernel" if args.configurations else ""
    title = (
        f"{where}; {chosen()}{tuned}; bfloat16, P 8, K 5; matmul peak {peak / 1e12:.3g} TFLOP/s; median of {args.rounds} rounds"
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".profile.txt").unlink(missing_ok=True)
    started, figures = time.monotonic(), []
    for name in args.models:
        for T in lengths:
            figures += measure(name, T, args, peak)
            record = {
                "environment": environment(), "devices": devices(), "kernels": by_operation(), "matmul_peak": peak,
                "seconds": time.monotonic() - started, "figures": [asdict(f) for f in figures],
            }  # fmt: skip
            args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
            args.output.with_suffix(".md").write_text("\n".join(t.markdown() for t in tables_of(figures, title)))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(args.output.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
