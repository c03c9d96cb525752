"""A model card tells where a model comes from and which settings made it; `RunFolder.write_card` writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refine_nsp.config import NSPConfig
from refine_nsp.fields import live, told
from refine_nsp.training.arguments import ReFINEConfig


@dataclass(frozen=True)
class Origin:
    """Say where a run begins: the name or path of the model that is trained, the names of its data, and settings by the names of flags."""

    base: str
    data: Sequence[str] = ()
    settings: Mapping[str, object] = field(default_factory=dict)


def told_of(args: ReFINEConfig, method: Mapping[str, Any], preset: object, adapters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a card tells, in its order: those that say how the model came about, where they had an effect.

    Args:
        method: the fields of `NSPConfig` that the run's phase reads, with their values.
        preset: what these started from, where that is known.
        adapters: PEFT's configurations, by the adapters' names; empty where the weights themselves were trained.
    """
    own = {name: getattr(args, name) for name in told(type(args), "card") if name in live(args)}
    del own["num_train_epochs" if args.max_steps > 0 else "max_steps"]
    nsp = {name: method[name] for name in told(NSPConfig, "card") if name in method}
    if "reward_funcs" in nsp:
        nsp = {"preset": preset, **nsp, "reward_funcs": args.nsp.reward_names}
    lora = {"use_peft": True, "lora_r": next(getattr(a, "r", None) for a in adapters.values())} if adapters else {}
    everything = {"objective": args.objective, **nsp, **own, **lora}
    return {name: value for name, value in everything.items() if value is not None and value is not False}
