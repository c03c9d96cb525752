"""Runs are saved whole and resumed exactly: a resumed run is the uninterrupted one, or it is refused with the reason."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import datasets
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from refine_nsp.config import NSPConfig
from refine_nsp.environment import environment
from refine_nsp.errors import RefineError
from refine_nsp.fields import is_known, live, told
from refine_nsp.files import write_atomically
from refine_nsp.ops.memory import part
from refine_nsp.training.arguments import ReFINEConfig
from refine_nsp.training.callbacks import ProgressCallback, StopCallback
from refine_nsp.training.checkpoints import DEALING_FILE, Checkpoint, Dealing
from refine_nsp.training.lane_states import LaneStates
from refine_nsp.training.pending_rollouts import load_pending, save_pending
from refine_nsp.training.phases import MicroBatch, Phase
from refine_nsp.training.remedies import TRAINING
from refine_nsp.training.run_folder import RunFolder
from refine_nsp.training.step_figures import StepFigures
from refine_nsp.training.stream import Stream

SETTINGS_FILE = "settings.json"
# These schedules know no last step.
ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")
EXAMPLES = 16  # so many examples of the training data are compared


class ResumingTrainer(Trainer):
    """Begin, save and resume runs in their folder; a subclass says what a step does."""

    model: nn.Module
    args: ReFINEConfig
    processing_class: PreTrainedTokenizerBase | None
    phase: Phase  # what is learned
    bar: ProgressCallback
    stop: StopCallback

    def __init__(self, model: nn.Module | None, args: ReFINEConfig, **kwargs: Any) -> None:
        with part("loading"):
            super().__init__(model=model, args=args, **kwargs)
        self.figures = StepFigures()
        self._pending: list[MicroBatch] = []  # drawn and prepared for later steps
        self._restored: list[MicroBatch] | None = None  # what waited in the checkpoint that is resumed from
        self._begun_at = 0  # the step of that checkpoint
        self._model_in_words = model_of(self.model)
        self.describe(self.accelerator.unwrap_model(self.model).config.name_or_path, (), {})
        self._trained_before = False
        self.lanes: LaneStates | None = None  # of this process, where states are carried
        self._settings: dict[str, object] = {}

    @property
    def method(self) -> dict[str, object]:
        """Return the settings of `NSPConfig` that this run's weights depend on, by name."""
        return self.phase.settings

    @property
    def dealing(self) -> Dealing:
        """Return how this run deals the examples of an optimizer step out."""
        w, b, loading = self.args.world_size, self._train_batch_size, vars(self.args.accelerator_config)
        return Dealing(w, self.args.gradient_accumulation_steps, b // w if loading["split_batches"] else b)

    @property
    def n_lanes(self) -> int:
        """Count the lanes of a run that carries states: the examples that are drawn together, which the next ones continue."""
        return self.dealing.examples * (self.args.steps_per_generation if self.phase.prepares_steps else 1)

    def train(self, resume_from_checkpoint: str | bool | Path | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as Trainer does. `resume_from_checkpoint=True` takes the last complete checkpoint, and None means what `args` say. Ctrl-C
        and SIGTERM save, then raise KeyboardInterrupt and SystemExit (143). An earlier run in `output_dir` is set aside inside it.

        Raises:
            RefineError: nothing to resume from, a checkpoint that is cut off or changed, or one made with other settings.
        """
        given = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        checkpoint = self.run_folder.to_resume(given)
        self._begin(checkpoint)
        self.figures.restart_clock()
        skips = self.args.ignore_data_skip
        if checkpoint is not None and isinstance(self.train_dataset, Stream) and self.train_dataset.load(checkpoint.path):
            self.args.ignore_data_skip = True  # the stream begins there by itself
        try:
            with part("optimizer", TRAINING):  # the other parts of a step name themselves
                output = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RefineError(
                f"{str(error).strip().rstrip('.')}: a process that reads data has ended, perhaps for want of memory; resume from the last "
                "checkpoint, with a smaller dataloader_num_workers (0: no process of its own)"
            ) from error
        finally:
            self.args.ignore_data_skip = skips
            self.bar.on_train_end(self.args, self.state, self.control)
            self.stop.on_train_end(self.args, self.state, self.control)
        self.stop.request.end()
        return output

    def _begin(self, checkpoint: Checkpoint | None) -> None:
        """Refuse a checkpoint of a run unlike this one, take up what waits in it, and have the run's folder hold this run alone."""
        early = [] if self._trained_before else self.state.log_history
        self._settings, self._trained_before = settings_of(self.args, self.method, self._model_in_words, self.train_dataset), True
        self._begun_at, self._pending = 0, []
        recent = self.phase.config.local_span * self.phase.config.local_window if self.phase.reads_scores else 0
        self.lanes = LaneStates(recent, self.args.carried_keys) if self.args.carry_states else None
        if checkpoint is not None:
            self._begun_at = checkpoint.step
            self.dealing.check(checkpoint.path)
            checkpoint.check_shards(bool(self.is_fsdp_enabled))
            check_settings(checkpoint, self._settings)
            if self.lanes is not None:
                d, process = self.dealing, self.args.process_index
                own = [lane for lane in range(self.n_lanes) if lane // d.batch % d.processes == process]
                self.lanes.load(checkpoint.path, own, self.args.device)
            self._restored = load_pending(checkpoint.path, self.args.process_index, self.dealing, self.args.device)
        if self.is_world_process_zero():
            self.run_folder.begin(checkpoint, early)
        self.accelerator.wait_for_everyone()

    @property
    def run_folder(self) -> RunFolder:
        """Return the folder that the run is kept in, `output_dir`."""
        return RunFolder(Path(str(self.args.output_dir)))

    def describe(self, base: str, data: Sequence[str], settings: Mapping[str, object]) -> None:
        """Tell model cards of this run what the trainer does not know: the model it is trained from, its data, and further settings by the
        names of flags."""
        self._base, self._data, self._preset = base, data, settings.get("preset")

    def write_card(self, folder: Path, plotted: bool = True) -> None:
        """Write the model card of what is saved in a folder: how it came about, and what was logged so far."""
        from refine_nsp.report.card import write_card  # imports matplotlib, which nothing needed before
        from refine_nsp.report.runs import run_of

        model, out = self.accelerator.unwrap_model(self.model), self.run_folder.path
        settings = told_of(self.args, self.method, self._preset, getattr(model, "peft_config", {}))
        made_with = {} if (out / "environment.json").exists() else environment(self.args.seed)
        run = run_of(out, made_with, with_figures=self._trained_before)
        if folder.resolve() != out.resolve():
            run = replace(run, name=f"{run.name}, {folder.name}", config="")
        tags = [model.config.model_type, str(self.args.objective)]
        write_card(folder, run, self._base, self._data, settings, tags, plotted)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write that same card where Trainer would write its own over it, on a push to the hub."""
        if self.is_world_process_zero():
            self.write_card(self.run_folder.path)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as Trainer does, with a model card. A model in shards is gathered and written as a plain folder too; a checkpoint keeps its
        shards, and with them what `export_checkpoint` needs to make a plain folder."""
        folder = output_dir if output_dir is not None else str(self.args.output_dir)
        in_checkpoint = _internal_call and output_dir is not None
        if not self.is_fsdp_enabled or "SHARDED" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            super().save_model(output_dir, _internal_call)
        elif not in_checkpoint:
            self._save(folder, state_dict=self.accelerator.get_state_dict(self.model))
        elif self.args.should_save:
            for described in (self.accelerator.unwrap_model(self.model).config, self.processing_class):
                if described is not None:
                    described.save_pretrained(folder)
        if self.args.should_save:
            self.write_card(Path(folder), plotted=not in_checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Save a checkpoint that is sealed when it is whole, or leave none."""
        checkpoint = self.run_folder.checkpoint(self.state.global_step)
        with checkpoint.whole_or_not_at_all():
            if self._pending and self._pending[0].rollouts is not None:
                save_pending(checkpoint.path, self.args.process_index, self._pending)
            if self.lanes is not None:
                self.lanes.save(checkpoint.path, self.args.process_index)
            if self.args.should_save:
                write_atomically(checkpoint.path / DEALING_FILE, json.dumps(asdict(self.dealing)) + "\n")
                write_atomically(checkpoint.path / SETTINGS_FILE, json.dumps(self._settings, indent=1) + "\n")
                if isinstance(self.train_dataset, Stream):
                    self.train_dataset.save(checkpoint.path, self.state.global_step * self.dealing.examples)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every process has files of its own in it
            if self.args.should_save:
                checkpoint.seal()


def settings_of(args: ReFINEConfig, method: Mapping[str, Any], model: str, data: object) -> dict[str, Any]:
    """List what the weights of a run depend on, by the names of flags, as plain values: its settings, `method` (the fields of `NSPConfig`
    that its phase reads), the model (see `model_of`) and the training data (see `data_of`)."""
    theirs = {f.name for f in fields(TrainingArguments)}
    # A user's subclass may have fields of its own, of which nothing is said.
    of_a_subclass = {f.name for f in fields(args) if f.name not in theirs and not is_known(f)}
    compared = ({*told(type(args), "resume")} & live(args)) | of_a_subclass
    settings = {name: getattr(args, name) for name in sorted(compared)}
    settings["max_steps"] = args.max_steps if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    settings |= {name: method[name] for name in told(NSPConfig, "resume") if name in method}
    settings |= {"model": model, "training_data": data_of(data)}
    return dict(json.loads(json.dumps(settings, default=str)))


def told_of(args: ReFINEConfig, method: Mapping[str, Any], preset: object, adapters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a model card tells, in its order: those that say how the model came about, where they had an effect.

    Args:
        method: the fields of `NSPConfig` that the run's phase reads, with their values. preset: what these started from, where known.
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


def model_of(model: nn.Module) -> str:
    """Name a model by its kind and size, since a checkpoint of another would be loaded in part, in silence."""
    kind = model(step=lambda m: m.config.model_type)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{kind}, {trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters trained"


def data_of(data: object) -> str | None:
    """Name the training data by content: their number, and a checksum of some; None where they cannot be looked up."""
    if not isinstance(data, datasets.Dataset):
        return None
    columns = [name for name in data.column_names if name != "context_scores"]
    some = data.select_columns(columns).select(range(0, len(data), max(1, len(data) // EXAMPLES)))
    text = json.dumps([some[i] for i in range(len(some))], sort_keys=True, default=str)
    return f"{len(data)} examples ({zlib.crc32(text.encode()):08x})"


def check_settings(checkpoint: Checkpoint, own: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that was made with other settings, or has made more steps than there are to be (RefineError). Another number of
    steps will do where the learning rate's schedule does not depend on it."""
    done = checkpoint.step
    if isinstance(own["max_steps"], int) and done > own["max_steps"]:
        raise RefineError(f"{checkpoint} has made {done} steps, more than max_steps={own['max_steps']}")
    path = checkpoint.path / SETTINGS_FILE
    if not path.exists():  # another program made the checkpoint
        return
    made = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in made if name in own and made[name] != own[name]]
    kind = own["lr_scheduler_type"]
    if kind == "constant" or (kind in ENDLESS and not 0 < own["warmup_steps"] < 1):
        changed = [name for name in changed if name != "max_steps"]
    if changed:
        why = f" (lr_scheduler_type={kind} follows it)" if "max_steps" in changed else ""
        shown = "; ".join(f"{name} was {made[name]!r}, now {own[name]!r}" for name in changed)
        raise RefineError(
            f"{checkpoint} was made with other settings: {shown}{why}. Resume with those it was made with, or begin a new run: in "
            f"another output_dir, or from its weights (model_name_or_path={checkpoint})"
        )
