"""Every setting of transformers' `TrainingArguments` is applied, refused by name, or said to be irrelevant, and why: none is taken and
left out. The table fails where transformers adds a setting."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import TrainingArguments

from refine_nsp.cli import main
from refine_nsp.errors import RefineError
from refine_nsp.tiny.pretrain_settings import PretrainConfig
from refine_nsp.training import PostTrainingConfig, ReFINEConfig
from refine_nsp.training.phases import NextToken
from refine_nsp.training.row_order import ByLength
from tests.training import test_nested
from tests.training.test_trainer import data, trainer, weights

TESTS = Path(__file__).parents[1]
HERE = "training/test_settings.py::"
TRAINED, SAVED, SHOWN = HERE + "test_what_is_trained_follows", HERE + "test_checkpoints_follow", HERE + "test_logs_follow"
SHARDS, LAUNCH = "training/test_sharded.py", "training/test_launch.py"

# Applied: by which test it is seen (a file, where the whole file is about it).
APPLIED = {
    "output_dir": "training/test_folders.py::test_a_new_run_sets_an_earlier_one_aside",
    "per_device_train_batch_size": "training/test_trainer.py::test_one_batch_of_8_equals_8_batches_of_1",
    "gradient_accumulation_steps": "training/test_trainer.py::test_one_batch_of_8_equals_8_batches_of_1",
    "num_train_epochs": TRAINED,
    "max_steps": TRAINED,
    "learning_rate": TRAINED,
    "lr_scheduler_type": TRAINED,
    "lr_scheduler_kwargs": TRAINED,
    "warmup_steps": HERE + "test_a_warm_up_of_the_constant_schedule_is_one",
    "optim": TRAINED,
    "optim_args": TRAINED,
    "optim_target_modules": HERE + "test_what_nothing_would_read_is_refused",  # by the optimizers that do not read it
    "weight_decay": TRAINED,
    "adam_beta1": TRAINED,
    "adam_beta2": TRAINED,
    "adam_epsilon": TRAINED,
    "max_grad_norm": TRAINED,
    "neftune_noise_alpha": HERE + "test_noise_on_embeddings_is_of_training_alone",
    "bf16": HERE + "test_bf16_needs_no_use_cpu_where_there_is_no_accelerator",
    "fp16": HERE + "test_what_this_machine_cannot_do_is_refused_before_a_model_is_loaded",
    "tf32": HERE + "test_settings_of_transformers_are_refused_in_one_line",  # where there is no such GPU
    "activation_checkpointing": HERE + "test_checkpointing_changes_nothing_and_runs_blocks_again",
    "activation_checkpointing_kwargs": HERE + "test_checkpointing_changes_nothing_and_runs_blocks_again",
    "gradient_checkpointing": HERE + "test_checkpointing_changes_nothing_and_runs_blocks_again",
    "gradient_checkpointing_kwargs": HERE + "test_checkpointing_changes_nothing_and_runs_blocks_again",
    "torch_compile": "training/test_other_libraries.py::test_training_under_torch_compile_is_the_same_run",
    "torch_compile_backend": "training/test_other_libraries.py::test_training_under_torch_compile_is_the_same_run",
    "torch_compile_mode": HERE + "test_settings_reach_accelerate",
    "torch_empty_cache_steps": HERE + "test_the_cache_is_emptied_so_often",
    "use_cache": HERE + "test_use_cache_is_written_to_the_configuration",
    "logging_strategy": SHOWN,
    "logging_steps": SHOWN,
    "logging_first_step": SHOWN,
    "logging_nan_inf_filter": SHOWN,
    "include_num_input_tokens_seen": HERE + "test_tokens_are_counted_with_and_without_pads",
    "disable_tqdm": "training/test_folders.py::test_one_command_line_begins_goes_on_and_has_finished",
    "report_to": "training/test_logging.py::test_tensorboard_has_the_curves_of_the_run",
    "run_name": "training/test_logging.py::test_trackio_has_the_curves_of_the_run_and_sends_nothing",
    "project": "training/test_logging.py::test_trackio_has_the_curves_of_the_run_and_sends_nothing",
    "eval_strategy": HERE + "test_validation_follows",
    "eval_steps": HERE + "test_validation_follows",
    "eval_delay": HERE + "test_validation_follows",
    "eval_on_start": HERE + "test_validation_follows",
    "do_eval": "training/test_validation.py::test_a_run_is_validated_at_its_end_where_that_is_asked_for",
    "per_device_eval_batch_size": HERE + "test_validation_batches_are_as_large_as_asked",
    "save_only_model": SAVED,
    "save_strategy": SAVED,
    "save_steps": SAVED,
    "save_total_limit": SAVED,
    "push_to_hub": "models/test_hub.py",
    "hub_model_id": "models/test_hub.py",
    "load_best_model_at_end": HERE + "test_the_best_model_is_loaded_at_the_end",
    "metric_for_best_model": HERE + "test_the_best_model_is_loaded_at_the_end",
    "greater_is_better": HERE + "test_the_best_model_is_loaded_at_the_end",
    "ignore_data_skip": HERE + "test_a_resumed_run_begins_the_data_again_where_asked",
    "restore_callback_states_from_checkpoint": HERE + "test_callbacks_are_restored_where_asked",
    "full_determinism": HERE + "test_settings_reach_accelerate",
    "seed": TRAINED,
    "data_seed": TRAINED,
    "use_cpu": HERE + "test_settings_reach_accelerate",
    "accelerator_config": HERE + "test_settings_reach_accelerate",
    "dataloader_drop_last": TRAINED,
    "dataloader_num_workers": HERE + "test_settings_reach_the_data_loader",
    "dataloader_pin_memory": HERE + "test_settings_reach_the_data_loader",
    "dataloader_persistent_workers": HERE + "test_settings_reach_the_data_loader",
    "dataloader_prefetch_factor": HERE + "test_settings_reach_the_data_loader",
    "dataloader_multiprocessing_context": HERE + "test_settings_reach_the_data_loader",
    "dataloader_in_order": HERE + "test_settings_reach_the_data_loader",
    "train_sampling_strategy": HERE + "test_rows_of_like_lengths_go_together",
    "length_column_name": HERE + "test_rows_of_like_lengths_go_together",
    "ddp_find_unused_parameters": HERE + "test_settings_reach_accelerate",
    "ddp_bucket_cap_mb": HERE + "test_settings_reach_accelerate",
    "ddp_broadcast_buffers": HERE + "test_settings_reach_accelerate",
    "ddp_static_graph": HERE + "test_settings_reach_accelerate",
    "fsdp": SHARDS,
    "fsdp_config": SHARDS,
    "deepspeed": LAUNCH,
    "debug": HERE + "test_overflows_are_looked_for",
    "auto_find_batch_size": "training/test_memory.py::test_smaller_batches_are_tried_where_that_is_asked_for",
    "skip_memory_metrics": HERE + "test_memory_is_measured_in_training_and_validation",
    "resume_from_checkpoint": HERE + "test_arguments_say_what_to_resume_from",
}
# Refused: a value that would otherwise have been taken and left out.
REFUSED = {
    "label_smoothing_factor": 0.1,
    "average_tokens_across_devices": False,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "eval_accumulation_steps": 2,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "include_for_metrics": ["inputs"],
    "batch_eval_metrics": True,
    "label_names": ["labels"],
    "do_predict": True,
    "enable_jit_checkpoint": True,
    "parallelism_config": object(),
}
# Irrelevant: what makes no difference to what is trained, saved and shown here, and why.
IRRELEVANT = {
    "remove_unused_columns": "all columns are kept, since a reward may ask for any",
    "prediction_loss_only": "validation keeps no predictions anyway",
    "do_train": "a switch of scripts: the commands train, and `train()` is asked for",
    "local_rank": "deprecated: launchers set it",
    "log_level": "of transformers' own loggers",
    "log_level_replica": "of transformers' own loggers",
    "log_on_each_node": "of transformers' own loggers, on several machines",
    "save_on_each_node": "which machines write files; the Trainer asks it before each of them (should_save)",
    "trackio_space_id": "a name that the tracker is given",
    "trackio_bucket_id": "a name that the tracker is given",
    "trackio_static_space_id": "a name that the tracker is given",
    "hub_token": "how a push is made, which the Trainer makes",
    "hub_private_repo": "how a push is made, which the Trainer makes",
    "hub_strategy": "how a push is made, which the Trainer makes",
    "hub_always_push": "how a push is made, which the Trainer makes",
    "hub_revision": "how a push is made, which the Trainer makes",
    "ddp_backend": "how processes talk, which accelerate sees to",
    "ddp_timeout": "how long they wait for each other, likewise",
}
NEWER = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # than the oldest transformers that is supported
NTP = {"objective": "ntp", "max_steps": 2}


def config(cls=ReFINEConfig, **settings):
    return cls(**{"output_dir": "unused", "use_cpu": True, "report_to": "none", **settings})


# --- the table --------------------------------------------------------------------------------------------------------
def test_the_table_has_every_setting_once():
    listed = [*APPLIED, *REFUSED, *IRRELEVANT]
    assert len(listed) == len(set(listed))
    assert set(listed) - NEWER == {f.name for f in dataclasses.fields(TrainingArguments)} - NEWER
    assert all(IRRELEVANT.values())


@pytest.mark.parametrize("where", sorted(set(APPLIED.values())))
def test_the_table_names_tests_that_there_are(where):
    file, _, name = where.partition("::")
    assert re.search(rf"^def {name}\(" if name else "", (TESTS / file).read_text(), re.MULTILINE) is not None


@pytest.mark.parametrize("cls", [ReFINEConfig, PostTrainingConfig])
@pytest.mark.parametrize("objective", ["ntp", "refine"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_without_a_place_is_refused_by_name(cls, objective, name):
    with pytest.raises(RefineError, match=rf"^{name}=.* has no place here: .*; leave it out$") as error:
        config(cls, objective=objective, **{name: REFUSED[name]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["midtrain", "posttrain"])
@pytest.mark.parametrize("name", [n for n in REFUSED if n != "parallelism_config"])
def test_in_a_file_and_as_a_flag_too(tmp_path, capsys, command, name):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({name: REFUSED[name]}))
    value = REFUSED[name]
    words = ['{"rope": true}'] if isinstance(value, dict) else list(map(str, value)) if isinstance(value, list) else [str(value)]
    for given in (["--config", str(tmp_path / "c.yaml")], [f"--{name}", *words]):
        assert main([command, *given, "--dataset_name", "none", "--model_name_or_path", "none"]) != 0
        said = capsys.readouterr().err
        # A mapping of truth values is none that a flag can say: that flag is refused by name too.
        refused = (f"{name}=", f"argument --{name}/", f"{name} is given in a file")
        assert said.startswith(tuple(f"refine-nsp: {words}" for words in refused)) and said.count("\n") == 1, said


@pytest.mark.parametrize("name", ["compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"])
def test_arguments_of_the_trainer_that_a_phase_stands_for_are_refused(tmp_path, name):
    from refine_nsp.training import ReFINETrainer

    with pytest.raises(RefineError, match=f"{name} has no place here: .*phase="):
        ReFINETrainer(model="never loaded", args=config(output_dir=str(tmp_path)), **{name: print})
    with pytest.raises(RefineError, match="predict has no place here"):
        trainer(tmp_path).predict(data(2))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optim_args": "momentum=0.9"}, "optim_args: momentum=0.9 is not read by optim='adamw_torch"),
        ({"optim": "sgd", "optim_args": "momentm=0.9"}, "optim_args: momentm=0.9 is not read by optim='sgd'"),
        ({"optim": "sgd", "adam_beta1": 0.5}, "adam_beta1=0.5 is not read by optim='sgd'"),
        ({"optim": "adafactor", "adam_epsilon": 1e-3}, "adam_epsilon=0.001 is not read by optim='adafactor'"),
        ({"optim": "sgd", "optim_args": "momentum"}, "expected name=value"),
        ({"optim_target_modules": ["q_proj"]}, r"optim_target_modules=\['q_proj'\] is not read"),
        ({"optim": "lomo"}, "neither max_grad_norm nor the skipping"),
        ({"optim": "galore_adamw_layerwise"}, "neither max_grad_norm nor the skipping"),
        ({"length_column_name": "n"}, "is read by train_sampling_strategy='group_by_length'"),
        ({"train_sampling_strategy": "batch_rebalance"}, "is not one of random, sequential, group_by_length"),
        ({"dataloader_persistent_workers": True}, "needs processes that read data"),
        ({"dataloader_multiprocessing_context": "fork"}, "needs processes that read data"),
        ({"accelerator_config": {"even_batches": False}}, "even_batches=False"),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}, "'num_steps', which nothing here reads"),
        ({"debug": "tpu_metrics_debug"}, "debug='tpu_metrics_debug' has no place here"),
        ({"neftune_noise_alpha": 5.0}, "objective='refine' samples"),
        ({"neftune_noise_alpha": 5.0, "objective": "ntp", "segment_tokens": 8}, "segment_tokens=8 runs segments again"),
        ({"lr_scheduler_type": "greedy", "eval_strategy": "steps", "warmup_steps": 3}, "warmup_steps=3: .* no warm-up by steps"),
    ],
)
def test_what_nothing_would_read_is_refused(settings, said):
    with pytest.raises(RefineError, match=said):
        config(**settings)


# --- what is meant ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "meant"),
    [
        ({"learning_rate": "1e-4"}, 1e-4),
        ({"max_steps": "10"}, 10),
        ({"max_steps": "1e3"}, 1000),
        ({"max_steps": 10.0}, 10),
        ({"bf16": "true"}, True),
        ({"disable_tqdm": "no"}, False),
        ({"report_to": ["none"]}, []),
        ({"report_to": None}, []),
        ({"report_to": False}, []),
        ({"save_strategy": False}, "no"),
        ({"eval_strategy": "no"}, "no"),
        ({"logging_steps": "0.5"}, 0.5),
        ({"data_seed": "3"}, 3),
        ({"lr_scheduler_kwargs": {"min_lr": "1e-7"}, "lr_scheduler_type": "cosine_with_min_lr"}, {"min_lr": 1e-7}),
        ({"lr_scheduler_kwargs": '{"min_lr": 1e-7}', "lr_scheduler_type": "cosine_with_min_lr"}, {"min_lr": 1e-7}),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": "false"}}, {"use_reentrant": False}),
    ],
)
def test_a_value_is_what_it_says_in_python_and_in_a_file(tmp_path, settings, meant):
    from refine_nsp.commands.midtrain import COMMAND

    name = next(iter(settings))
    found = getattr(config(**settings), name)
    assert found == meant and type(getattr(found, "value", found)) is type(meant)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"output_dir": "unused", "use_cpu": True, **settings}))
    args = COMMAND.call(["--config", str(tmp_path / "c.yaml")])[1][2]
    assert getattr(args, name) == meant


def test_a_file_as_people_write_it(tmp_path):
    from refine_nsp.commands.midtrain import COMMAND

    (tmp_path / "c.yaml").write_text(
        "learning_rate: 1e-4\nmax_steps: 1e3\nbf16: true\nreport_to: no\nsave_strategy: no\nlr_scheduler_type: cosine_with_min_lr\n"
        "lr_scheduler_kwargs: {min_lr: 1e-6}\n"
    )
    args = COMMAND.call(["--config", str(tmp_path / "c.yaml")])[1][2]
    assert (args.learning_rate, args.max_steps, args.bf16, args.report_to, args.save_strategy) == (1e-4, 1000, True, [], "no")
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-6}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; expected a number"),
        ({"max_steps": "1.5"}, "max_steps is '1.5'; expected a whole number"),
        ({"max_steps": 1.5}, "max_steps is 1.5; expected a whole number"),
        ({"use_cpu": "perhaps"}, "use_cpu is 'perhaps'; expected true or false"),
        ({"lr_scheduler_kwargs": "{min_lr: 1}"}, "lr_scheduler_kwargs is .* no JSON"),
        ({"lr_scheduler_kwargs": "min_lr=1"}, "lr_scheduler_kwargs is 'min_lr=1'; expected a mapping"),
    ],
)
def test_text_that_says_no_value_is_refused(settings, said):
    with pytest.raises(RefineError, match=said):
        config(**settings)


def test_bf16_needs_no_use_cpu_where_there_is_no_accelerator(tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    for kind in (ReFINEConfig, PostTrainingConfig, PretrainConfig):
        for asked in ({"bf16": True}, {"bf16": "true"}, {"bf16": True, "use_cpu": False}):
            args = kind(output_dir=str(tmp_path), report_to="none", **asked)
            assert args.use_cpu and args.device.type == "cpu" and args.mixed_precision == "bf16"
    seen = set()
    t = trainer(tmp_path, dtype=torch.float32, bf16=True, **NTP)
    t.model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda m, i, out: seen.add(out.dtype))
    t.train()
    assert torch.bfloat16 in seen and {p.dtype for p in t.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fp16": True}, "fp16=True needs a GPU"),
        ({"optim": "galore_adamw", "optim_target_modules": ["q_proj"]}, "optim='galore_adamw' cannot be made: .*install"),
        ({"optim": "grokadamw"}, "optim='grokadamw' cannot be made: .*install"),
        ({"optim": "sgd", "optim_args": "momentum=much"}, "optim='sgd' cannot be made: could not convert"),
    ],
)
def test_what_this_machine_cannot_do_is_refused_before_a_model_is_loaded(tmp_path, capsys, settings, said):
    from refine_nsp.training import ReFINETrainer

    with pytest.raises(RefineError, match=said):
        ReFINETrainer(model="never loaded", args=config(output_dir=str(tmp_path), **settings))
    flags = [
        word for name, value in settings.items() for word in (f"--{name}", *(value if isinstance(value, list) else [str(value)]))
    ]
    assert main(["midtrain", *flags, "--use_cpu", "--dataset_name", "none", "--model_name_or_path", "none"]) == 1
    line = capsys.readouterr().err
    assert re.search(said, line) and line.count("\n") == 1


# --- schedules --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("cosine_with_min_lr", None, r"min_lr or min_lr_rate .*lr_scheduler_kwargs: \{min_lr: VALUE\}"),
        ("cosine_warmup_with_min_lr", {}, "min_lr or min_lr_rate"),
        ("warmup_stable_decay", None, r"needs num_decay_steps; .*--lr_scheduler_kwargs '\{\"num_decay_steps\": VALUE\}'"),
        ("cosine", {"num_cycle": 2}, r"does not take 'num_cycle' .*did you mean 'num_cycles'"),
        ("constant", {"min_lr": 1e-7}, "does not take 'min_lr' in lr_scheduler_kwargs; it takes none"),
        ("constant_with_warmup", {"min_lr": 1e-7}, "it takes none"),
        ("linear", {"a": 1}, "it takes none"),
        ("polynomial", {"lr_end": 1.0}, "must be smaller than initial lr"),
        ("cosine_with_min_lr", {"min_lr": [1]}, "cannot be made"),
        ("cosine_with_min_lr", {"min_lr": 1e-7, "min_lr_rate": 0.1}, "cannot be made"),
        ("reduce_lr_on_plateau", {"factor": 2.0}, "Factor should be < 1.0"),
        ("nearly_constant", None, "is not a valid SchedulerType"),
    ],
)
def test_a_schedule_that_lacks_its_arguments_says_which_before_anything_is_loaded(tmp_path, capsys, kind, given, said):
    settings = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": given, "eval_strategy": "steps", "learning_rate": 1e-5}
    with pytest.raises(RefineError, match=said):
        config(**settings)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    assert main(["midtrain", "--config", str(tmp_path / "c.yaml"), "--dataset_name", "none", "--model_name_or_path", "none"]) == 1
    line = capsys.readouterr().err
    assert re.search(said, line) and line.count("\n") == 1


@pytest.mark.parametrize("cls", [ReFINEConfig, PostTrainingConfig])
def test_every_schedule_can_be_had(cls):
    needs = {
        "cosine_with_min_lr": {"min_lr": 1e-8},
        "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
        "warmup_stable_decay": {"num_decay_steps": 2},
    }
    from transformers import SchedulerType

    for kind in SchedulerType:
        assert config(cls, lr_scheduler_type=kind.value, lr_scheduler_kwargs=needs.get(kind.value), eval_strategy="steps")


def test_a_warm_up_of_the_constant_schedule_is_one(tmp_path):
    t = trainer(tmp_path, objective="ntp", max_steps=4, warmup_steps=2, learning_rate=0.5)
    assert t.args.lr_scheduler_type == "constant_with_warmup"
    t.train()
    assert [log["learning_rate"] for log in t.state.log_history if "learning_rate" in log] == [0.0, 0.25, 0.5, 0.5]
    assert config(lr_scheduler_type="linear", warmup_steps=2).lr_scheduler_type == "linear"


def test_a_rate_falls_on_a_plateau_of_validation(tmp_path):
    t = trainer(
        tmp_path, objective="ntp", max_steps=4, eval_dataset=data(2), eval_strategy="steps", eval_steps=1, learning_rate=1.0,
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 0, "factor": 0.1, "threshold": 10.0, "threshold_mode": "abs"},
    )  # fmt: skip
    t.train()
    rates = [log["learning_rate"] for log in t.state.log_history if "learning_rate" in log]
    assert rates == pytest.approx([1.0, 1.0, 0.1, 0.01])


def test_settings_of_transformers_are_refused_in_one_line():
    for settings in (
        {"bf16": True, "fp16": True},
        {"load_best_model_at_end": True},
        {"accelerator_config": {"x": 1}},
        {"optim": "x"},
    ):
        with pytest.raises(RefineError, match=r"^these settings do not go together: .+") as error:
            config(**settings)
        assert "\n" not in str(error.value)
    if not torch.cuda.is_available():
        with pytest.raises(RefineError, match="tf32"):
            config(tf32=True)


# --- applied: what is trained -----------------------------------------------------------------------------------------
PLAIN = {"objective": "ntp", "max_steps": 3}
CHANGED = {
    "max_steps": 2,
    "num_train_epochs": {"max_steps": -1, "num_train_epochs": 1},
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 5e-3}},
    "optim": "sgd",
    "optim_args": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "weight_decay": 0.5,
    "adam_beta1": 0.1,
    "adam_beta2": 0.1,
    "adam_epsilon": 1.0,
    "max_grad_norm": {"optim": "sgd", "max_grad_norm": 1e-3},
    "seed": 7,
    "data_seed": 7,
    "dataloader_drop_last": {
        "dataloader_drop_last": True,
        "per_device_train_batch_size": 6,
        "max_steps": -1,
        "num_train_epochs": 1,
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Weights after a short run, by its settings; each made once."""
    known: dict[str, dict[str, torch.Tensor]] = {}

    def run(**settings):
        if (key := str(sorted(settings.items(), key=str))) not in known:
            t = trainer(tmp_path_factory.mktemp("run"), **settings)
            t.train()
            known[key] = weights(t)
        return known[key]

    return run


@pytest.mark.parametrize("name", CHANGED)
def test_what_is_trained_follows(made, name):
    """Beside the same run without this one setting."""
    value = CHANGED[name]
    settings = {**PLAIN, **(value if isinstance(value, dict) else {name: value})}
    without = {k: v for k, v in settings.items() if k != name} | (
        {"max_steps": 3} if name in ("max_steps", "num_train_epochs") else {}
    )
    if name == "lr_scheduler_kwargs":
        without |= {name: {"min_lr": 0.0}}
    with_it, base = made(**settings), made(**without)
    assert any(not torch.equal(with_it[k], base[k]) for k in base)


def test_a_step_of_sgd_is_minus_the_rate_times_the_clipped_gradient(tmp_path):
    """optim, learning_rate, max_grad_norm and weight_decay at their values."""
    settings = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.5,
        "weight_decay": 0.0,
        "objective": "ntp",
        "max_steps": 1,
    }
    t = trainer(tmp_path, **settings, train_dataset=data(4, mixed=False))
    before = weights(t)
    ids = torch.tensor(t.train_dataset["input_ids"])
    t.model(ids, labels=ids).loss.backward()
    gradient = {name: p.grad.clone() for name, p in t.model.named_parameters()}
    t.model.zero_grad()
    norm = torch.stack([g.norm() for g in gradient.values()]).norm()
    assert norm > 0.5
    t.train()
    for name, after in weights(t).items():
        torch.testing.assert_close(after, before[name] - 0.1 * gradient[name] * 0.5 / norm, rtol=1e-5, atol=1e-9)


def drawn(t) -> list[list[int]]:
    """The rows of each batch of two epochs, as their first tokens."""
    loader = t.get_train_dataloader()
    found = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        found += [batch["input_ids"][:, 0].tolist() for batch in loader]
    return found


def numbered(rows: int = 12) -> Dataset:
    """Rows that begin with their number, of lengths that differ."""
    return Dataset.from_list([{"input_ids": [i, *[1] * (10 + 7 * i % 31)], "n": 100 - i} for i in range(rows)])


def test_data_come_in_the_order_that_is_asked_for(tmp_path):
    def order(**settings):
        return drawn(trainer(tmp_path, objective="ntp", train_dataset=numbered(), **settings))

    in_turn = order(train_sampling_strategy="sequential")
    assert in_turn == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]] * 2
    assert order() != in_turn and order() == order() and order(data_seed=1) != order()
    assert order(data_seed=1, seed=1) == order(data_seed=1, seed=2)


def test_rows_of_like_lengths_go_together(tmp_path):
    def spread(batches, of):
        return sum(max(of(i) for i in batch) - min(of(i) for i in batch) for batch in batches)

    rows = numbered(64)
    length = {row["input_ids"][0]: len(row["input_ids"]) for row in rows}
    settings = {"objective": "ntp", "train_dataset": rows}
    plain = trainer(tmp_path, **settings)
    by_length = trainer(tmp_path, **settings, train_sampling_strategy="group_by_length")
    by_column = trainer(tmp_path, **settings, train_sampling_strategy="group_by_length", length_column_name="n")
    found, usual, other = drawn(by_length), drawn(plain), drawn(by_column)
    assert sorted(i for batch in found[:16] for i in batch) == list(range(64))
    assert spread(found, length.get) < spread(usual, length.get) / 3
    assert spread(other, lambda i: i) < spread(usual, lambda i: i) / 3
    assert found[:16] != found[16:] and drawn(by_length) == found
    with pytest.raises(RefineError, match="length_column_name='m' is no column of the training data"):
        trainer(tmp_path, **settings, train_sampling_strategy="group_by_length", length_column_name="m").train()


def test_a_resumed_run_by_lengths_has_the_same_order(tmp_path):
    settings = {"objective": "ntp", "train_dataset": data(12), "train_sampling_strategy": "group_by_length", "max_steps": 5}
    straight = trainer(tmp_path / "a", **settings)
    straight.train()
    trainer(tmp_path / "b", **{**settings, "max_steps": 4}, save_strategy="steps", save_steps=4).train()
    again = trainer(tmp_path / "b", **settings)
    again.train(resume_from_checkpoint=True)
    for name, w in weights(straight).items():
        torch.testing.assert_close(weights(again)[name], w, rtol=0, atol=1e-12)


def test_prompts_of_like_lengths_go_together(tmp_path):
    t = test_nested.trainer(tmp_path, output_dir=str(tmp_path), train_sampling_strategy="group_by_length", objective="none")
    sampler = t._get_train_sampler()
    assert isinstance(sampler, ByLength) and list(sampler.lengths) == [len(p) for p in t.train_dataset["prompt_ids"]]


def test_noise_on_embeddings_is_of_training_alone(tmp_path):
    quiet = trainer(tmp_path / "a", eval_dataset=data(2), **NTP)
    noisy = trainer(tmp_path / "b", eval_dataset=data(2), neftune_noise_alpha=50.0, **NTP)
    assert noisy.evaluate() | {"eval_runtime": 0} == quiet.evaluate() | {"eval_runtime": 0}
    quiet.train()
    noisy.train()
    first = [t.state.log_history[1]["loss"] for t in (quiet, noisy)]
    assert first[0] != pytest.approx(first[1], rel=1e-3)
    again = noisy.model.model.embeddings(torch.tensor([[1, 2]]))
    assert torch.equal(again, noisy.model.train().model.embeddings(torch.tensor([[1, 2]])))  # the hook has gone
    post = test_nested.trainer(tmp_path, output_dir=str(tmp_path), objective="none", neftune_noise_alpha=5.0, max_steps=1)
    post.train()


@pytest.mark.parametrize("objective", ["ntp", "refine"])
@pytest.mark.parametrize(
    "settings",
    [
        {"activation_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
    ],
)
def test_checkpointing_changes_nothing_and_runs_blocks_again(tmp_path, made, objective, settings):
    if not settings.keys() <= {f.name for f in dataclasses.fields(TrainingArguments)}:
        pytest.skip("a newer name, which this transformers does not have")
    t, passes = trainer(tmp_path, objective=objective, max_steps=1, **settings), []
    for layer in t.model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    t.train()
    plain = made(objective=objective, max_steps=1)
    for name, w in weights(t).items():
        torch.testing.assert_close(w, plain[name], rtol=0, atol=1e-9)
    if objective == "ntp":
        every = settings.get("activation_checkpointing_kwargs", {}).get("every_n_layers", 1)
        assert len(passes) == 2 + 2 // every


# --- applied: the rest ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"logging_steps": 1}, [1, 2, 3, 4]),
        ({"logging_steps": 2}, [2, 4]),
        ({"logging_steps": 0.5}, [2, 4]),
        ({"logging_steps": 3, "logging_first_step": True}, [1, 3]),
        ({"logging_strategy": "no"}, []),
        ({"logging_strategy": "epoch"}, [4]),
        ({"logging_steps": 2, "logging_nan_inf_filter": True}, [2, 4]),
    ],
)
def test_logs_follow(tmp_path, settings, steps):
    t = trainer(tmp_path, **{"objective": "ntp", "max_steps": 4, **settings})
    t.train()
    assert [log["step"] for log in t.state.log_history if "loss" in log] == steps


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, []),
        ({"eval_strategy": "steps", "eval_steps": 2}, [2, 4]),
        ({"eval_strategy": "steps"}, [1, 2, 3, 4]),
        ({"eval_strategy": "epoch"}, [4]),
        ({"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 3}, [3, 4]),
        ({"eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True}, [0, 4]),
    ],
)
def test_validation_follows(tmp_path, settings, steps):
    t = trainer(tmp_path, objective="ntp", max_steps=4, eval_dataset=data(2), **settings)
    t.train()
    assert [log["step"] for log in t.state.log_history if "eval_loss" in log] == steps


def test_validation_batches_are_as_large_as_asked(tmp_path):
    t = trainer(tmp_path, objective="ntp", eval_dataset=data(7), per_device_eval_batch_size=3)
    assert [len(batch["lengths"]) for batch in t.validation_batches(t.eval_dataset)] == [3, 3, 1]


def test_several_validation_sets_have_figures_each(tmp_path):
    sets = {"short": data(3, 30), "long": data(4)}
    t = trainer(tmp_path, objective="ntp", max_steps=2, eval_dataset=sets, eval_strategy="steps", eval_steps=2,
                metric_for_best_model="long_loss")  # fmt: skip
    found = t.evaluate()
    for name, rows in sets.items():
        assert found[f"eval_{name}_loss"] == t.evaluate(rows)["eval_loss"] == t.evaluate(name)["eval_loss"]
    t.train()
    assert t.state.best_metric == pytest.approx(t.evaluate()["eval_long_loss"])


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"save_strategy": "steps", "save_steps": 2}, [2, 4]),
        ({"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}, [3, 4]),
        ({"save_strategy": "epoch"}, [4]),
        ({"save_strategy": "no"}, []),
        ({"save_strategy": "steps", "save_steps": 4, "save_only_model": True}, [4]),
    ],
)
def test_checkpoints_follow(tmp_path, settings, found):
    t = trainer(tmp_path, **{"objective": "ntp", "max_steps": 4, **settings})
    t.train()
    assert sorted(int(p.name.split("-")[1]) for p in tmp_path.glob("checkpoint-*")) == found
    if "save_only_model" in settings:
        assert not (tmp_path / "checkpoint-4" / "optimizer.pt").exists()
        with pytest.raises(RefineError, match="no optimizer state, so it was saved with save_only_model"):
            t.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    """Cosine is better when greater, and a rate this high makes the loss worse: the first step stays the best."""
    same = {"objective": "ntp", "max_steps": 3, "eval_dataset": data(4), "learning_rate": 1.0, "eval_strategy": "steps", "eval_steps": 1,
            "save_strategy": "steps", "save_steps": 1}  # fmt: skip
    for name, settings, better in (
        ("a", {}, min),
        ("b", {"metric_for_best_model": "eval_cosine"}, max),
        ("c", {"metric_for_best_model": "entropy", "greater_is_better": False}, min),
    ):
        t = trainer(tmp_path / name, load_best_model_at_end=True, **same, **settings)
        t.train()
        key = "eval_" + t.args.metric_for_best_model.removeprefix("eval_")
        found = [log[key] for log in t.state.log_history if key in log]
        assert t.state.best_metric == better(found) == pytest.approx(t.evaluate()[key])
    with pytest.raises(
        RefineError, match=r"metric_for_best_model='acuracy' is no figure of validation \(did you mean 'accuracy'\?\)"
    ):
        trainer(tmp_path / "d", **same, metric_for_best_model="acuracy")

    class Own(NextToken):
        def summarise(self, sums):
            return {"own": 1 / sums["targets"]}

    assert trainer(tmp_path / "e", **same, metric_for_best_model="own", phase=Own(ReFINEConfig("x", report_to="none").nsp))


def test_tokens_are_counted_with_and_without_pads(tmp_path):
    rows = Dataset.from_list([{"input_ids": [0] * n} for n in (10, 20, 30, 40)])
    for kind, count in (("all", 160), ("non_padding", 100), (True, 160), ("no", 0)):
        t = trainer(tmp_path / str(kind), objective="ntp", max_steps=1, train_dataset=rows, include_num_input_tokens_seen=kind)
        t.train()
        assert t.state.num_input_tokens_seen == count


def test_memory_is_measured_in_training_and_validation(tmp_path):
    pytest.importorskip("psutil", reason="psutil is not installed")
    t = trainer(tmp_path, **NTP, eval_dataset=data(2), skip_memory_metrics=False)
    assert "train_mem_cpu_peaked_delta" in t.train().metrics
    assert "eval_mem_cpu_peaked_delta" in t.evaluate()


def test_the_cache_is_emptied_so_often(tmp_path, monkeypatch):
    emptied = []
    monkeypatch.setattr("transformers.trainer.clear_device_cache", lambda *a, **k: emptied.append(1))
    trainer(tmp_path, objective="ntp", max_steps=4, torch_empty_cache_steps=2).train()
    assert len(emptied) == 2


def test_use_cache_is_written_to_the_configuration(tmp_path):
    for asked in (True, False):
        assert trainer(tmp_path, use_cache=asked).model.config.use_cache is asked


def test_overflows_are_looked_for(tmp_path):
    from transformers.debug_utils import DebugUnderflowOverflow

    t = trainer(tmp_path, **NTP, debug="underflow_overflow")
    t.train()
    hooks = [h for m in t.model.modules() for h in m._forward_hooks.values()]
    assert any(isinstance(getattr(h, "__self__", None), DebugUnderflowOverflow) for h in hooks)


def test_settings_reach_accelerate(tmp_path, monkeypatch):
    t = trainer(
        tmp_path, ddp_find_unused_parameters=True, ddp_bucket_cap_mb=3, ddp_broadcast_buffers=False, ddp_static_graph=True,
        torch_compile_backend="eager", torch_compile_mode="reduce-overhead",
        accelerator_config={
            "split_batches": True, "use_seedable_sampler": False, "gradient_accumulation_kwargs": {"sync_each_batch": True},
        },
    )  # fmt: skip
    ddp, accelerator = t.accelerator.ddp_handler, t.accelerator
    assert (ddp.find_unused_parameters, ddp.bucket_cap_mb, ddp.broadcast_buffers, ddp.static_graph) == (True, 3, False, True)
    assert accelerator.state.dynamo_plugin.mode == "reduce-overhead" and accelerator.device.type == "cpu"
    assert accelerator.split_batches and not accelerator.use_seedable_sampler and t._always_synchronises()
    seen = []
    monkeypatch.setattr("transformers.trainer.enable_full_determinism", seen.append)
    trainer(tmp_path, full_determinism=True, seed=3)
    assert seen == [3]


def test_settings_reach_the_data_loader(tmp_path):
    t = trainer(
        tmp_path, objective="ntp", dataloader_num_workers=1, dataloader_persistent_workers=True, dataloader_prefetch_factor=3,
        dataloader_multiprocessing_context="fork", dataloader_in_order=False,
    )  # fmt: skip
    loader = t.get_train_dataloader()
    assert (loader.num_workers, loader.persistent_workers, loader.prefetch_factor, loader.in_order) == (1, True, 3, False)
    assert loader.multiprocessing_context.get_start_method() == "fork"
    assert loader.pin_memory is torch.cuda.is_available()


def test_a_resumed_run_begins_the_data_again_where_asked(tmp_path):
    settings = {"objective": "ntp", "train_dataset": data(24), "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, max_steps=1, **settings).train()
    ends = []
    for skip in (False, True):
        t = trainer(tmp_path / f"{skip}", max_steps=2, ignore_data_skip=skip, **settings)
        t.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        ends.append(weights(t))
        assert t.args.ignore_data_skip is skip
    assert any(not torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_callbacks_are_restored_where_asked(tmp_path):
    from transformers import EarlyStoppingCallback

    settings = {"objective": "ntp", "eval_dataset": data(2), "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
                "save_steps": 1, "metric_for_best_model": "loss", "learning_rate": 1.0}  # fmt: skip
    first = trainer(tmp_path, max_steps=2, callbacks=[EarlyStoppingCallback(9)], **settings)
    first.train()
    for restore, patience in ((True, 9), (False, 4)):
        t = trainer(tmp_path / str(restore), max_steps=3, callbacks=[EarlyStoppingCallback(4)],
                    restore_callback_states_from_checkpoint=restore, **settings)  # fmt: skip
        t.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        stop = next(c for c in t.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback))
        assert stop.early_stopping_patience == patience


def test_arguments_say_what_to_resume_from(tmp_path):
    settings = {"objective": "ntp", "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, max_steps=2, **settings).train()
    for given in ("last", str(tmp_path / "checkpoint-2")):
        t = trainer(tmp_path, max_steps=3, resume_from_checkpoint=given, **settings)
        t.train()
        assert t._begun_at == 2
    with pytest.warns(UserWarning, match="had an earlier run in it"):
        t.train(resume_from_checkpoint=False)
    assert t._begun_at == 0


def test_a_schedule_free_optimizer_is_told_when_it_is_validated(tmp_path):
    class Told(torch.optim.SGD):
        modes = []

        def train(self):
            self.modes.append("train")

        def eval(self):
            self.modes.append("eval")

    t = trainer(tmp_path, **NTP, eval_dataset=data(2), eval_strategy="steps", eval_steps=1)
    t.optimizer = Told(t.model.parameters(), lr=0.1)
    t.train()
    assert Told.modes == ["train", "eval"] * 2


def test_settings_of_adapters_or_test_time_without_them_are_refused(capsys):
    for argv, said in (
        (["midtrain", "--lora_r", "8"], r"nothing reads lora_r=8 \(it needs use_peft\)"),
        (["posttrain", "--lora_target_modules", "q_proj"], "it needs use_peft"),
        (
            ["evaluate", "refine-nsp/tiny-delta-net", "--ttt_learning_rate", "1e-3"],
            "ttt_learning_rate=0.001 changes nothing .* add --ttt",
        ),
        (["evaluate", "refine-nsp/tiny-delta-net", "--ttt_reward_funcs", "cosine"], "ttt_reward_funcs='cosine' changes nothing"),
    ):
        assert main(argv) == 1
        line = capsys.readouterr().err
        assert re.search(said, line) and line.count("\n") == 1, line
