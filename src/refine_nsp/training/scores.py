"""Context scores computed once, by the model a run starts from, and kept with the data: a step then costs what an NTP step costs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from datasets.fingerprint import Hasher
from filelock import FileLock, Timeout
from torch import Tensor, nn

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.models.protocols import CausalModel
from refine_nsp.nsp.context import context_divergence
from refine_nsp.nsp.forward import run_hidden
from refine_nsp.nsp.records import Batch
from refine_nsp.progress import step_progress
from refine_nsp.training.data import collate

PART_ROWS = 64  # rows scored and kept together: an interruption costs no more


def with_context_scores(
    data: Dataset | IterableDataset,
    model: nn.Module,
    config: NSPConfig,
    quiet: bool = True,
    autocast: torch.dtype | None = None,
    process: int = 0,
    processes: int = 1,
) -> Dataset:
    """The data with a column `context_scores`, d of every token (float32, or float64), read back where they are known.

    Kept in the cache of `datasets`, by model, data and settings; written part by part, so that an interrupted scoring goes on. Processes
    beside each other, of this run or of others that need the same scores, share the parts out: each begins with its own, goes on with
    what nobody is at, and waits for the rest. So nothing depends on how many there are, nor on whether they see one disk.

    Args:
        autocast: what products are computed in, where that is not the weights' dtype.
        process, processes: which of how many this is.

    Raises:
        RefineError: streamed data, or settings that use no context scores.
    """
    gain = wants_gain(config)
    if not isinstance(data, Dataset):
        raise RefineError(
            "context_scores='cached' keeps scores with the data, which streaming does not; use context_scores='online'"
        )
    key = scores_key(data, model, config, autocast)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "refine_nsp_context_scores" / key
    folder.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device

    def scored(row: Mapping[str, Any]) -> dict[str, list[float]]:
        with nullcontext() if autocast is None else torch.autocast(device.type, autocast):
            return {"context_scores": scores_of(row, model, config, gain, device)}

    features = datasets.Features({**data.features, "context_scores": datasets.Sequence(datasets.Value(kept_dtype(model)))})
    starts = range(0, len(data), PART_ROWS)
    own_first = sorted(starts, key=lambda start: (start // PART_ROWS - process) % processes)
    parts: dict[int, Dataset] = {}
    training = model.training
    model.eval()
    with step_progress(len(data), 0, "context scores", quiet) as progress:
        for start, blocking in [(s, False) for s in own_first] + [(s, True) for s in own_first]:
            if start in parts:
                continue
            rows = data.select(range(start, min(start + PART_ROWS, len(data))))
            # Named here: to find a name itself, `datasets` would pickle the model for every part.
            part = {"cache_file_name": str(folder / f"part-{start}.arrow"), "new_fingerprint": f"{key}-{start}"}
            try:
                with FileLock(folder / f"part-{start}.lock", blocking=blocking):
                    parts[start] = rows.map(scored, features=features, load_from_cache_file=True, **part)
            except Timeout:
                continue  # somebody is at it
            progress.advance(sum(map(len, parts[start]["context_scores"])), len(rows))
    model.train(training)
    return concatenate_datasets([parts[start] for start in starts])


def scores_key(data: Dataset, model: nn.Module, config: NSPConfig, autocast: torch.dtype | None = None) -> str:
    """Name of the scores: they depend on the data, the weights and what is computed with them, and what the score is."""
    gain = wants_gain(config)
    settings = (data._fingerprint, weights_key(model), model_key(model), config.local_window, config.local_span, gain)
    wide = ("float64",) if kept_dtype(model) == "float64" else ()
    return Hasher.hash((*settings, *wide) if autocast is None else (*settings, *wide, str(autocast)))


def kept_dtype(model: nn.Module) -> str:
    """What a model's scores are kept in."""
    return "float64" if next(model.parameters()).dtype == torch.float64 else "float32"


def model_key(model: nn.Module) -> str:
    """A model's config without where it came from: the same weights with another window are another model."""
    settings: dict[str, Any] = model(step=lambda m: m.config.to_dict())
    return Hasher.hash({k: v for k, v in sorted(settings.items()) if k not in ("_name_or_path", "transformers_version")})


def context_score_of(config: NSPConfig) -> str | None:
    """Name the context score that positions or token weights are made of, `context_kl` or `context_gain`; None where they need none."""
    name = config.score if config.samples_rollouts or config.token_weights == "selected" else config.token_weights
    return {"context": "context_kl", "context_kl": "context_kl", "context_gain": "context_gain"}.get(name)


def wants_gain(config: NSPConfig) -> bool:
    """Tell whether a run's context score is the gain, or else the KL. RefineError where it uses neither."""
    name = context_score_of(config)
    if name is None:
        raise RefineError(
            f"context_scores='cached' has nothing to keep: selection={config.selection!r} and token_weights={config.token_weights!r} of "
            f"estimator={config.estimator!r} use no context scores; leave it 'online'"
        )
    return name == "context_gain"


@torch.no_grad()
def scores_of(row: Mapping[str, Any], model: nn.Module, config: NSPConfig, gain: bool, device: torch.device) -> list[float]:
    """d of one example's tokens; of a packed one document by document."""
    inputs = collate([{k: row[k] for k in ("input_ids", "lengths") if k in row}])
    batch = Batch.of(inputs["input_ids"].to(device), inputs["lengths"])

    def score(m: CausalModel) -> Tensor:
        return context_divergence(m, batch, run_hidden(m, batch, config), config, gain)

    d = model(step=score).cpu()
    return torch.cat([x[:n] for x, n in zip(d, batch.sizes, strict=True)]).tolist()


def weights_key(model: nn.Module) -> str:
    """Name of a model's weights: a digest of all of them."""
    digest = hashlib.sha256()
    for name, p in model.state_dict().items():
        digest.update(name.encode())
        digest.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
