"""A checkpoint in shards, or one of adapters, becomes a plain folder that `from_pretrained` reads."""

from __future__ import annotations

import shutil
from pathlib import Path

from accelerate.utils import merge_fsdp_weights
from accelerate.utils.constants import FSDP_MODEL_NAME

from refine_nsp.errors import RefineError
from refine_nsp.files import made_whole, write_atomically
from refine_nsp.models.adapters import CONFIG as ADAPTER_CONFIG
from refine_nsp.models.load import load
from refine_nsp.training.run_folder import PLAIN_FILES


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
