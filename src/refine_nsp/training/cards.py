"""The model card of what a run saves: its settings and figures, handed to `report/card.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from refine_nsp.environment import environment
from refine_nsp.training.arguments import ReFINEConfig


@dataclass(frozen=True)
class Origin:
    """base: name or path of the model that is trained. data: what on, by names. settings: by names of flags, beside the trainer's."""

    base: str
    data: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def write_run_card(
    folder: Path, args: ReFINEConfig, method: Mapping[str, Any], model: Any, origin: Origin, with_figures: bool, plotted: bool
) -> None:
    """The card of `model`, saved in `folder`, the run's own or one inside. with_figures: tell what was logged so far. plotted: draw it."""
    from refine_nsp.report.card import write_card  # matplotlib, which nothing before needs
    from refine_nsp.report.runs import run_of

    out = Path(str(args.output_dir))
    made_with = {} if (out / "environment.json").exists() else environment(args.seed)
    run = run_of(out, made_with, with_figures=with_figures)
    if folder.resolve() != out.resolve():
        run = replace(run, name=f"{run.name}, {folder.name}", config="")
    adapters = getattr(model, "peft_config", {})
    told = {**method, **({"reward_funcs": args.nsp.reward_names} if "reward_funcs" in method else {})}
    lora = {"use_peft": bool(adapters), "lora_r": next((getattr(a, "r", None) for a in adapters.values()), None)}
    unread = {f.name for f in fields(args.nsp)} | (set() if "estimator" in method else {"preset"})
    others = {k: v for k, v in {**origin.settings, **vars(args), **lora}.items() if k not in unread}
    tags = [model.config.model_type, str(args.objective)]
    write_card(folder, run, origin.base, origin.data, others | told, tags, plotted)
