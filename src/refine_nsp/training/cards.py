"""The model card of what a run saves: its settings and figures, handed to `report/card.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from refine_nsp.config import NSPConfig
from refine_nsp.environment import environment
from refine_nsp.fields import live, told
from refine_nsp.training.arguments import ReFINEConfig


@dataclass(frozen=True)
class Origin:
    """base: name or path of the model that is trained. data: what on, by names. settings: by names of flags, beside the trainer's."""

    base: str
    data: Sequence[str] = ()
    settings: Mapping[str, object] = field(default_factory=dict)


def write_run_card(
    folder: Path, args: ReFINEConfig, method: Mapping[str, object], model: Any, origin: Origin, with_figures: bool, plotted: bool
) -> None:
    """The card of `model`, saved in `folder`, the run's own or one inside. with_figures: tell what was logged so far. plotted: draw it."""
    from refine_nsp.report.card import write_card  # matplotlib, which nothing before needs
    from refine_nsp.report.runs import run_of

    out = Path(str(args.output_dir))
    made_with = {} if (out / "environment.json").exists() else environment(args.seed)
    run = run_of(out, made_with, with_figures=with_figures)
    if folder.resolve() != out.resolve():
        run = replace(run, name=f"{run.name}, {folder.name}", config="")
    tags = [model.config.model_type, str(args.objective)]
    settings = told_of(args, method, origin.settings.get("preset"), getattr(model, "peft_config", {}))
    write_card(folder, run, origin.base, origin.data, settings, tags, plotted)


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
