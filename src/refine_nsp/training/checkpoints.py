"""What a checkpoint has beside transformers' own files, and whether one can be gone on from: alike, also on another number of processes."""

from __future__ import annotations

import json
import shutil
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from accelerate.utils import merge_fsdp_weights
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.trainer_pt_utils import safe_globals

from refine_nsp.errors import RefineError, first_line
from refine_nsp.files import made_whole, write_atomically
from refine_nsp.models.adapters import CONFIG as ADAPTER_CONFIG
from refine_nsp.models.load import load
from refine_nsp.nsp.records import Batch, Rollouts
from refine_nsp.training.phases import MicroBatch

SEAL_FILE = "sealed.json"
ROLLOUTS_FILE = "rollouts.process{}.safetensors"  # every process has its own
DEALING_FILE = "dealing.json"
# Of a model and its tokenizer, beside the weights.
PLAIN_FILES = ("*config.json", "tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt")


@dataclass(frozen=True)
class Dealing:
    """How the examples of an optimizer step are dealt out: `batch` for each of `micro_batches` on each of `processes`."""

    processes: int
    micro_batches: int
    batch: int

    @property
    def examples(self) -> int:
        """Of an optimizer step."""
        return self.processes * self.micro_batches * self.batch

    def __str__(self) -> str:
        return (
            f"{self.processes} processes x {self.micro_batches} gradient_accumulation_steps x {self.batch} a batch = {self.examples} "
            "examples a step"
        )

    def save(self, folder: Path) -> None:
        write_atomically(folder / DEALING_FILE, json.dumps(asdict(self)) + "\n")

    @classmethod
    def of(cls, folder: Path) -> Dealing | None:
        """That of a checkpoint; None where it does not say."""
        path = folder / DEALING_FILE
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def check_dealing(folder: Path, own: Dealing) -> None:
    """RefineError unless a checkpoint's steps have as many examples as this run's: only then is it known which come next."""
    made = Dealing.of(folder)
    if made is not None and made.examples != own.examples:
        raise RefineError(
            f"{folder} was made with {made}, and this run has {own}: it would go on at another example. Keep the product, for example by "
            f"gradient_accumulation_steps; or begin a new run from the weights (model_name_or_path={folder})"
        )


def check_shards(folder: Path, sharded: bool) -> None:
    """RefineError unless a checkpoint's weights lie as this run reads them: in shards, or whole."""
    made = bool([*folder.glob(f"{FSDP_MODEL_NAME}*")])
    if made and not sharded:
        raise RefineError(
            f"{folder} holds weights in shards, and this run holds them whole; launch it with FSDP, as it was made (on any number of "
            f"processes), or begin a new run from a plain folder: refine-nsp export {folder} FOLDER, then model_name_or_path=FOLDER"
        )
    if sharded and not made:
        raise RefineError(
            f"{folder} holds whole weights, and this run shares them out (FSDP); launch it without FSDP, as it was made, or begin a new "
            f"run from the weights (model_name_or_path={folder})"
        )


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, newest first."""
    numbered = [p for p in folder.glob("checkpoint-*") if p.name.rsplit("-", 1)[1].isdecimal()]
    return sorted(numbered, key=lambda p: int(p.name.rsplit("-", 1)[1]), reverse=True)


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that can be read to its end; an unreadable one is passed over, saying so."""
    for checkpoint in checkpoints_of(folder):
        if (problem := checkpoint_problem(checkpoint)) is None:
            return str(checkpoint)
        warnings.warn(f"{checkpoint.name} is not complete ({problem}); the one before it is taken", stacklevel=2)
    return None


def checkpoint_problem(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; None when it can.

    A sealed one is compared with its seal, file by file. One of ours without a seal was cut off before it. One of another program is
    judged by its trainer state, which transformers writes last, and by whether its files can be read.
    """
    if not folder.is_dir():
        return "there is no such folder"
    if (problem := seal_problem(folder)) is not None:
        return problem
    if not (folder / SEAL_FILE).exists():
        if (folder / DEALING_FILE).exists():
            return f"no {SEAL_FILE}, which is written last"
        if (problem := unreadable(folder)) is not None:
            return problem
    path = folder / "trainer_state.json"
    if not path.exists():
        return "no trainer_state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return "trainer_state.json is empty or cut off"
    if not isinstance(state, dict) or "global_step" not in state:
        return "trainer_state.json holds no global_step"
    if not any([*folder.glob("optimizer*"), *folder.glob("global_step*"), *folder.glob("pytorch_model_fsdp*")]):
        return (
            "no optimizer state, so it was saved with save_only_model; a new run can begin from its weights (model_name_or_path)"
        )
    return None


def step_of(checkpoint: Path) -> int:
    """Steps that were made before it."""
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def seal(folder: Path) -> None:
    """Write down every file's size and checksum, as the last thing of a checkpoint."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != SEAL_FILE]
    sums = {p.relative_to(folder).as_posix(): [p.stat().st_size, checksum(p)] for p in files}
    write_atomically(folder / SEAL_FILE, json.dumps({"crc32": sums}, indent=1) + "\n")


def seal_problem(folder: Path) -> str | None:
    """Which file is not what was sealed; None where all are, or where there is no seal."""
    path = folder / SEAL_FILE
    if not path.exists():
        return None
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))["crc32"]
        known = {name: (int(size), int(crc)) for name, (size, crc) in sums.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{SEAL_FILE} is empty or cut off"
    for name, (size, crc) in known.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes, not {size:,}"
        if checksum(file) != crc:
            return f"{name} was changed or damaged"
    return None


def unreadable(folder: Path) -> str | None:
    """Which file of tensors or states cannot be read, or would run code; None where all can."""
    for path in sorted(p for p in folder.glob("*") if p.suffix in (".safetensors", ".pt", ".pth")):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    file.keys()
                continue
            with ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    return f"{path.name} is damaged in {damaged}"
            with safe_globals():
                torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, BadZipFile, SafetensorError, UnpicklingError) as error:
            return f"{path.name} cannot be read: {first_line(error)}"
    return None


def checksum(path: Path) -> int:
    """CRC-32 of a file: against accidents, not against malice."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            crc = zlib.crc32(block, crc)
    return crc


def export_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Make a plain folder, as `from_pretrained` reads it, of a checkpoint whose weights are in shards, or of LoRA adapters by merging them
    into their base; complete or not at all.

    Raises:
        RefineError: it has neither, or the folder has something in it.
    """
    shards = checkpoint / f"{FSDP_MODEL_NAME}_0"
    sharded = (shards / ".metadata").exists()
    if not sharded and not (checkpoint / ADAPTER_CONFIG).exists():
        plain = (checkpoint / "model.safetensors").exists() or (checkpoint / "model.safetensors.index.json").exists()
        what = (
            "is a plain folder already"
            if plain
            else f"holds no sharded weights ({shards.name}) and no adapters ({ADAPTER_CONFIG})"
        )
        raise RefineError(f"{checkpoint} {what}")
    if folder.exists() and any(folder.iterdir()):
        raise RefineError(f"{folder} is not empty; name a new folder")
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with made_whole(temporary, folder):
        temporary.mkdir(parents=True)
        if sharded:
            merge_fsdp_weights(str(shards), str(temporary))
            for pattern in PLAIN_FILES:
                for file in checkpoint.glob(pattern):
                    shutil.copy(file, temporary)
        else:
            for part in load(checkpoint):
                part.save_pretrained(temporary)
        if (card := checkpoint / "README.md").exists():  # what is written is a whole model, of adapters too
            text = card.read_text(encoding="utf-8").replace("\nlibrary_name: peft\n", "\nlibrary_name: transformers\n", 1)
            write_atomically(temporary / "README.md", text)


# --- rollouts that wait for their steps -------------------------------------------------------------------------------
_TENSORS = ("positions", "tokens", "log_probs", "rewards", "advantages", "entropy")


def save_pending(folder: Path, process: int, batches: Sequence[MicroBatch]) -> None:
    """A process' micro-batches that wait with their rollouts, as safetensors."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        tensors |= {f"{i}.input_ids": batch.input_ids, f"{i}.lengths": batch.lengths}
        tensors |= {f"{i}.{name}": getattr(batch.rollouts, name).contiguous() for name in _TENSORS}
    save_file(tensors, folder / ROLLOUTS_FILE.format(process), metadata={"count": str(len(batches))})


def load_pending(folder: Path, process: int, own: Dealing, device: torch.device) -> list[MicroBatch] | None:
    """What `save_pending` wrote, for this process; None when there is nothing.

    Where the checkpoint's steps were dealt out otherwise, its rows are dealt out anew, so that every step learns from those it would
    have learned from.

    Raises:
        RefineError: files of other processes are missing, or a micro-batch is not whole (packed documents, the end of an epoch).
    """
    made = Dealing.of(folder)
    if made is None or made == own:
        path = folder / ROLLOUTS_FILE.format(process)
        return [micro_batch_of(tensors, device) for tensors in read_pending(path)] if path.exists() else None
    paths = [folder / ROLLOUTS_FILE.format(p) for p in range(made.processes)]
    there = [path for path in paths if path.exists()]
    if not there:
        return None
    by_process = [read_pending(path) for path in there]
    whole = all(len(tensors["lengths"]) == made.batch for waiting in by_process for tensors in waiting)
    if len(there) < made.processes or not whole:
        raise RefineError(
            f"{folder} has rollouts that wait for their steps, made with {made}, and cannot deal them out for {own}: "
            f"{'files of other processes are not here' if whole else 'they are not whole batches'}. Resume as it was made"
        )
    # Batches were dealt to processes in turn.
    rows = [row_of(tensors, i) for turn in zip(*by_process, strict=True) for tensors in turn for i in range(made.batch)]
    mine = [rows[at : at + own.batch] for at in range(process * own.batch, len(rows), own.processes * own.batch)]
    return [micro_batch_of(stack_rows(batch), device) for batch in mine]


def read_pending(path: Path) -> list[dict[str, Tensor]]:
    """The tensors of each micro-batch that waits."""
    with safe_open(path, "pt") as file:
        names = ("input_ids", "lengths", *_TENSORS)
        return [{name: file.get_tensor(f"{i}.{name}") for name in names} for i in range(int(file.metadata()["count"]))]


def row_of(tensors: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """One sequence, without its padding."""
    length = int(tensors["lengths"][i])
    return {name: t[i, :length] if name in ("input_ids", "entropy") else t[i] for name, t in tensors.items()}


def stack_rows(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sequences as a micro-batch, right-padded with 0."""
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        name: pad([row[name] for row in rows], batch_first=True)
        if name in ("input_ids", "entropy")
        else torch.stack([row[name] for row in rows])
        for name in rows[0]
    }


def micro_batch_of(tensors: dict[str, Tensor], device: torch.device) -> MicroBatch:
    """A micro-batch that waits with its rollouts."""
    known: dict[str, Any] = {name: tensors[name].to(device) for name in _TENSORS}
    rollouts = Rollouts(**known, hidden=None, num_positions=int((tensors["positions"] >= 0).sum()))
    return MicroBatch(Batch.of(tensors["input_ids"].to(device), tensors["lengths"]), rollouts=rollouts)
