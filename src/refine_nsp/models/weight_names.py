"""Turn the names of weights that were saved through wrappers (torch.compile, DDP, FSDP, PEFT) into the model's own."""

from __future__ import annotations

import re
from collections.abc import Sequence

from refine_nsp.errors import RefineError

# Wrappers put these in front of the name of the module they wrap, wherever in the model it is.
ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# DDP, DeepSpeed and Lightning, and PEFT put these in front of all names.
IN_FRONT = ("module.", "_forward_module.", "base_model.model.")
OF_ADAPTERS = (".lora_A.", ".lora_B.", ".base_layer.", ".modules_to_save.", ".original_module.")


def renaming(where: str, names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Find what wrappers added to a checkpoint's names, and the patterns by which `from_pretrained` takes it out again.

    Args:
        names: the checkpoint's names that the model does not know. transformers itself deals with a `model.` too many or too few.

    Raises:
        RefineError: weights of adapters that were not merged.
    """
    if unmerged := [name for name in names if any(part in name for part in OF_ADAPTERS)]:
        raise RefineError(
            f"the weights of {where} are those of a model with adapters on it ({len(unmerged)} names such as {unmerged[0]}): save "
            "merge_and_unload() of it where it was made, or the adapters alone (save_pretrained of PEFT's model)"
        )
    prefix, rest = "", list(names)
    while (found := next((w for w in (*ANYWHERE, *IN_FRONT) if all(name.startswith(w) for name in rest)), None)) is not None:
        prefix, rest = prefix + found, [name.removeprefix(found) for name in rest]
    inside = [w for w in ANYWHERE if any(f".{w}" in name for name in rest)]
    patterns = {f"^{re.escape(prefix)}": ""} if prefix else {}
    return ", ".join([prefix, *inside] if prefix else inside), patterns | {rf"(?<=\.){re.escape(w)}": "" for w in inside}


def without_wrappers(name: str) -> str:
    """Take out of a name what torch.compile, FSDP and DDP put into it."""
    return re.sub("|".join(map(re.escape, ANYWHERE)), "", name).removeprefix("module.")


def some(names: Sequence[str], most: int = 4) -> str:
    """Write the first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
