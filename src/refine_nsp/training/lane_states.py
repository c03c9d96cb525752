"""The states of lanes are kept between optimizer steps: what a window left is what the next window in its lane starts from.

A process keeps those of its own rows. They are part of a checkpoint, a file a process, and are dealt out anew on another number of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from refine_nsp.errors import RefineError
from refine_nsp.models.state import FastWeightCache, LayerState
from refine_nsp.nsp.records import Batch, Starts
from refine_nsp.training.checkpoints import Dealing

LANES_FILE = "lanes.process{}.safetensors"  # every process has its own


@dataclass(frozen=True)
class Lane:
    """Hold what one lane continues from."""

    cache: FastWeightCache  # the states of one row
    recent: Tensor  # [n] long, the last tokens it consumed
    finite: Tensor  # bool: all of the states are finite


@dataclass
class LaneStates:
    """Keep the states of lanes by number; a lane that is not there starts from nothing."""

    recent: int  # H, how many of the last tokens are kept with them, for context scores
    keys: int | None = None  # of so many of the newest tokens attention's keys and values are kept; None: of all there are
    lanes: dict[int, Lane] = field(default_factory=dict)

    def forget(self, lanes: Iterable[int]) -> None:
        """Let lanes start from nothing."""
        for lane in lanes:
            self.lanes.pop(lane, None)

    def starts(self, lanes: Sequence[int], device: torch.device) -> Starts:
        """Join what the given lanes continue from, one row each. A lane whose states a failed step left not finite begins anew."""
        there = [lane for lane in lanes if lane in self.lanes]
        if there:  # the one thing that the device is asked for
            finite = torch.stack([self.lanes[lane].finite for lane in there]).tolist()
            self.forget(lane for lane, well in zip(there, finite, strict=True) if not well)
        known = [self.lanes.get(lane) for lane in lanes]
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        recent = [nothing if lane is None else lane.recent for lane in known]
        cache = FastWeightCache.joined([None if lane is None else lane.cache for lane in known])
        return Starts(cache, torch.stack([F.pad(x, (self.recent - len(x), 0)) for x in recent]))

    def keep(self, lanes: Sequence[int], batch: Batch, left: FastWeightCache) -> None:
        """Keep what the rows of a batch left, for the next window in each lane."""
        assert batch.starts is not None
        tokens = torch.cat([batch.starts.recent, batch.input_ids], 1)
        seen = left.consumed
        for i, (lane, row) in enumerate(zip(lanes, left.apart(self.keys), strict=True)):
            end = self.recent + batch.sizes[i] - 1  # the last token is the first of the next window
            recent = tokens[i, max(0, end - min(self.recent, int(seen[i]))) : end].clone()
            finite = torch.stack([x.isfinite().all() for layer in row.layers for x in layer.values()]).all()
            self.lanes[lane] = Lane(row, recent, finite)

    def save(self, folder: Path, process: int) -> None:
        """Write the lanes of this process into a checkpoint's folder."""
        tensors: dict[str, Tensor] = {}
        for number, lane in self.lanes.items():
            assert lane.cache.lengths is not None
            tensors |= {f"{number}.lengths": lane.cache.lengths, f"{number}.recent": lane.recent}
            tensors[f"{number}.consumed"] = lane.cache.consumed.clone()
            for i, layer in enumerate(lane.cache.layers):
                tensors |= {f"{number}.{i}.{name}": x.contiguous() for name, x in layer.items()}
        layers = max((len(lane.cache.layers) for lane in self.lanes.values()), default=0)
        save_file(tensors, folder / LANES_FILE.format(process), metadata={"layers": str(layers)})

    def load(self, folder: Path, own: Sequence[int], device: torch.device) -> None:
        """Read the lanes numbered `own` from a checkpoint's folder, whichever process wrote them. RefineError where a file is missing."""
        made = Dealing.of(folder)
        paths = [folder / LANES_FILE.format(p) for p in range(1 if made is None else made.processes)]
        if missing := [path.name for path in paths if not path.exists()]:
            raise RefineError(
                f"{folder} has no {', '.join(missing)}, where states of lanes are; copy the files of all processes into it, or begin anew"
            )
        self.lanes = {}
        for path in paths:
            with safe_open(path, "pt") as file:
                split = [name.split(".") for name in sorted(file.keys())]
                for number in sorted({int(parts[0]) for parts in split} & set(own)):
                    layers: list[LayerState] = [{} for _ in range(int(file.metadata()["layers"]))]
                    for _, layer, what in (parts for parts in split if parts[0] == str(number) and len(parts) == 3):
                        layers[int(layer)][what] = file.get_tensor(f"{number}.{layer}.{what}").to(device)
                    lengths = file.get_tensor(f"{number}.lengths")
                    earlier = file.get_tensor(f"{number}.consumed") - lengths
                    cache = FastWeightCache(layers, lengths, int(lengths[0]), earlier if bool(earlier) else None)
                    recent = file.get_tensor(f"{number}.recent").to(device)
                    self.lanes[number] = Lane(cache, recent, torch.tensor(True, device=device))
