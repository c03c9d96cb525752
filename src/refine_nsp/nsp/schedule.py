"""Resolve the setting `schedule` to the two facts behind it (docs/method.md); everybody else asks the record that this file makes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast

from torch import nn

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.models.adapters import without_adapters
from refine_nsp.models.protocols import CausalModel


@dataclass(frozen=True)
class Schedule:
    """Say how the rollouts of a step are sampled and continued."""

    name: Literal["auto", "fused", "snapshot", "reprefill"]  # as `NSPConfig.schedule` has it
    two_passes: bool  # rollouts are sampled in a pass of their own, without gradients, before the pass that learns from them
    recomputes: bool  # every prefix is run again, for its state and with each of its rollouts; otherwise its state is handed over


SCHEDULES: dict[str, Schedule] = {
    "fused": Schedule("fused", two_passes=False, recomputes=False),
    "snapshot": Schedule("snapshot", two_passes=True, recomputes=False),
    "reprefill": Schedule("reprefill", two_passes=True, recomputes=True),
}
WITHOUT_ROLLOUTS = Schedule("auto", two_passes=False, recomputes=False)


@dataclass(frozen=True)
class Needs:
    """Say what a run asks of its schedule, beyond the settings of the method."""

    steps_per_generation: int = 1  # optimizer steps that learn from one batch of rollouts
    micro_batches: int = 1  # parts of an optimizer step that go through the model one after another
    beforehand: bool = False  # all rollouts of several steps are sampled before the first of these, as the published code does
    shards: nn.Module | None = None  # a model whose weights lie in parts with several processes, which must make the same passes


def schedule_of(config: NSPConfig, needs: Needs = Needs()) -> Schedule:
    """Find the schedule of a run. Raises RefineError for one that cannot do what the run needs.

    `auto` samples in the pass that learns where it can, since that saves a forward pass. It cannot where rollouts serve several steps or
    are compared across micro-batches, and by segments a pass of its own is cheaper: states are then kept at known positions alone.
    """
    steps = needs.steps_per_generation
    if not config.samples_rollouts:
        if steps > 1:
            raise RefineError(
                f"estimator={config.estimator!r} makes no rollouts that steps_per_generation={steps} could reuse; leave it at 1"
            )
        return WITHOUT_ROLLOUTS
    if needs.shards is not None and _positions_decide_passes(needs.shards, config):
        return SCHEDULES["snapshot"]
    compares_micro_batches = config.advantage_scale == "global" and needs.micro_batches > 1
    if config.schedule == "auto":
        first = steps > 1 or compares_micro_batches or needs.beforehand or config.segment_tokens is not None
        return SCHEDULES["snapshot" if first else "fused"]
    if config.schedule == "fused" and (steps > 1 or compares_micro_batches):
        why = f"steps_per_generation={steps} cannot reuse its rollouts"
        if steps == 1:
            why = f"advantage_scale='global' cannot be one scale for the {needs.micro_batches} micro-batches of a step"
        raise RefineError(f"schedule='fused' samples and learns in one pass, so {why}; use schedule='snapshot'")
    return SCHEDULES[config.schedule]


def with_schedule(config: NSPConfig, needs: Needs) -> NSPConfig:
    """Write the schedule of a run into its settings, so that whoever reads these later finds the same one."""
    name = schedule_of(config, needs).name
    return config if name in (config.schedule, WITHOUT_ROLLOUTS.name) else replace(config, schedule=name)


def _positions_decide_passes(model: nn.Module, config: NSPConfig) -> bool:
    """Tell whether the number of passes would follow from chosen positions, which differ from process to process.

    Where states are taken between segments, how many segments are run again for them depends on the positions; and gradients would reach
    weights through states alone, which FSDP does not see. Rollouts sampled in a pass of their own, without gradients, are learned from in
    a pass whose segments are as many in every process. Raises RefineError where even that pass would be cut at its positions.
    """
    trunk = cast(CausalModel, without_adapters(model)).model
    if trunk.cuts_at_positions and config.segment_tokens is not None:
        raise RefineError(
            f"segment_tokens={config.segment_tokens}: rollouts of {trunk.label} cut segments at their positions, which differ from process "
            "to process, and shards need every process in every pass; leave segment_tokens out (to save memory: gradient_checkpointing), "
            "or use estimator: closed_form (preset: likelihood), which needs no positions, or DDP"
        )
    return trunk.cuts_at_positions or config.segment_tokens is not None
