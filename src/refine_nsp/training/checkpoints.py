"""A checkpoint is resumed from only where it is whole: its files are compared with a seal that is written last.

It also records how the examples of a step were dealt out to processes and micro-batches; what a step learns does not depend on that.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from zipfile import BadZipFile, ZipFile

import torch
from accelerate.utils import merge_fsdp_weights
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors import SafetensorError, safe_open
from transformers.trainer_pt_utils import safe_globals

from refine_nsp.errors import RefineError, first_line
from refine_nsp.files import made_whole, write_atomically
from refine_nsp.models.adapters import CONFIG as ADAPTER_CONFIG
from refine_nsp.models.load import load
from refine_nsp.nsp.seeds import generator_of

SEAL_FILE, DEALING_FILE = "sealed.json", "dealing.json"
# A model's files that are not its weights.
PLAIN_FILES = ("*config.json", "tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt")


@dataclass(frozen=True)
class Dealing:
    """Record how the examples of an optimizer step are dealt out: `batch` for each of `micro_batches` on each of `processes`."""

    processes: int
    micro_batches: int
    batch: int

    @property
    def examples(self) -> int:
        """Count the examples of an optimizer step."""
        return self.processes * self.micro_batches * self.batch

    def __str__(self) -> str:
        return (
            f"{self.processes} processes x {self.micro_batches} gradient_accumulation_steps x {self.batch} a batch = {self.examples} "
            "examples a step"
        )

    def generators(
        self, seed: int, step: int, process: int, drawn: int, places: Sequence[tuple[int, int]]
    ) -> list[torch.Generator]:
        """Make a generator for every row of a micro-batch, which all of the row's randomness comes from.

        It is seeded by the run's seed, the step, the index of the row's example among all that are drawn as this step begins, and the
        row's document in that example. Batches are dealt to processes in turn, so this index is the same however examples are shared out.

        Args:
            drawn: micro-batches that this process has drawn before in this step. places: (example, document) of each row.
        """
        first = (drawn * self.processes + process) * self.batch
        return [generator_of(seed, step, first + example, document) for example, document in places]

    @classmethod
    def of(cls, folder: Path) -> Dealing | None:
        """Read the dealing of a checkpoint's folder; None where another program made it."""
        path = folder / DEALING_FILE
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def check(self, folder: Path) -> None:
        """Refuse a checkpoint whose steps have another number of examples (RefineError): only with the same is it known which come next."""
        made = Dealing.of(folder)
        if made is not None and made.examples != self.examples:
            raise RefineError(
                f"{folder} was made with {made}, and this run has {self}: it would continue at another example. Keep the product, for "
                f"example by gradient_accumulation_steps; or begin a new run from the weights (model_name_or_path={folder})"
            )


@dataclass(frozen=True)
class Checkpoint:
    """Read, check and seal the folder of a checkpoint, which holds transformers' files and ours: how examples were dealt out, the settings,
    rollouts that wait, a stream's place, and the seal."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def step(self) -> int:
        """Count the optimizer steps that were made before it."""
        return int(json.loads((self.path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])

    @contextmanager
    def whole_or_not_at_all(self) -> Iterator[None]:
        """Make the folder, and remove it where writing into it fails (RefineError for a full disk)."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            yield
        except Exception as error:
            shutil.rmtree(self.path, ignore_errors=True)
            if isinstance(error, OSError | RuntimeError | SafetensorError):  # each library has a kind of its own for a full disk
                raise RefineError(f"could not save {self}: {error}; nothing half-written was left") from error
            raise

    def seal(self) -> None:
        """Write down every file's size and checksum, as the last thing of a checkpoint."""
        files = [p for p in sorted(self.path.rglob("*")) if p.is_file() and p.name != SEAL_FILE]
        sums = {p.relative_to(self.path).as_posix(): [p.stat().st_size, checksum(p)] for p in files}
        write_atomically(self.path / SEAL_FILE, json.dumps({"crc32": sums}, indent=1) + "\n")

    def problem(self) -> str | None:
        """Say why it cannot be resumed from; None when it can.

        A sealed one is compared with its seal, file by file. One of ours without a seal was cut off before it. One of another program is
        judged by its trainer state, which transformers writes last, and by whether its files can be read.
        """
        if not self.path.is_dir():
            return "there is no such folder"
        sealed = (self.path / SEAL_FILE).exists()
        if not sealed and (self.path / DEALING_FILE).exists():
            return f"no {SEAL_FILE}, which is written last"
        if (problem := self._broken_seal() if sealed else self._unreadable()) is not None:
            return problem
        try:
            _ = self.step
        except FileNotFoundError:
            return "no trainer_state.json"
        except (ValueError, KeyError, TypeError):
            return "trainer_state.json is cut off, or holds no global_step"
        if not any(any(self.path.glob(f"{name}*")) for name in ("optimizer", "global_step", "pytorch_model_fsdp")):
            return "no optimizer state, so it was saved with save_only_model; a new run can begin from its weights (model_name_or_path)"
        return None

    def check_shards(self, sharded: bool) -> None:
        """Refuse weights that do not lie as this run reads them: in shards, or whole (RefineError)."""
        made = any(self.path.glob(f"{FSDP_MODEL_NAME}*"))
        if made and not sharded:
            raise RefineError(
                f"{self} holds weights in shards, and this run holds them whole; launch it with FSDP, as it was made (on any number of "
                f"processes), or begin a new run from a plain folder: refine-nsp export {self} FOLDER, then model_name_or_path=FOLDER"
            )
        if sharded and not made:
            raise RefineError(
                f"{self} holds whole weights, and this run shares them out (FSDP); launch it without FSDP, as it was made, or begin a "
                f"new run from the weights (model_name_or_path={self})"
            )

    def _broken_seal(self) -> str | None:
        """Name the file that is not what was sealed; None where all are."""
        try:
            sums = json.loads((self.path / SEAL_FILE).read_text(encoding="utf-8"))["crc32"]
            known = {name: (int(size), int(crc)) for name, (size, crc) in sums.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{SEAL_FILE} is empty or cut off"
        for name, (size, crc) in known.items():
            file = self.path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size:,} bytes, not {size:,}"
            if checksum(file) != crc:
                return f"{name} was changed or damaged"
        return None

    def _unreadable(self) -> str | None:
        """Name a file of tensors or states that cannot be read, or would run code; None where all can be read."""
        for path in sorted(p for p in self.path.glob("*") if p.suffix in (".safetensors", ".pt", ".pth")):
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
    """Compute the CRC-32 of a file, which finds accidents and is no guard against malice."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            crc = zlib.crc32(block, crc)
    return crc


def export_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Make a plain folder of a checkpoint whose weights are in shards, or of LoRA adapters by merging them into their base. The folder is
    complete, or it is not there. RefineError where the checkpoint has neither, or the folder has something in it."""
    shards = checkpoint / f"{FSDP_MODEL_NAME}_0"
    sharded = (shards / ".metadata").exists()
    if not sharded and not (checkpoint / ADAPTER_CONFIG).exists():
        plain = (checkpoint / "model.safetensors").exists() or (checkpoint / "model.safetensors.index.json").exists()
        neither = f"holds no sharded weights ({shards.name}) and no adapters ({ADAPTER_CONFIG})"
        raise RefineError(f"{checkpoint} {'is a plain folder already' if plain else neither}")
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
        if (card := checkpoint / "README.md").exists():  # of adapters too, what is written is a whole model
            text = card.read_text(encoding="utf-8").replace("\nlibrary_name: peft\n", "\nlibrary_name: transformers\n", 1)
            write_atomically(temporary / "README.md", text)
