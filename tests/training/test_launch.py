"""The configs of recipes/accelerate are what accelerate understands, and say what their names say."""

import json
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from accelerate.commands import accelerate_cli
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, is_deepspeed_available
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from refine_nsp.commands import midtrain
from tests.children import exit_code, fork, launch_in_forks

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


def launched(path: Path):
    """The arguments and the environment by which `accelerate launch` starts processes from a config."""
    args = launch_command_parser().parse_args(["--config_file", str(path), "-m", "refine_nsp.cli", "midtrain"])
    args, defaults, _ = _validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return args, prepare_deepspeed_cmd_env(args)[1]
    return args, prepare_multi_gpu_env(args) if int(args.num_processes) > 1 else {}


def config(name: str) -> Path:
    return ROOT / "recipes" / "accelerate" / f"{name}.yaml"


@pytest.mark.parametrize(
    ("name", "machines", "processes"),
    [
        ("one_gpu", 1, 1), ("eight_gpus", 1, 8), ("eight_gpus_fsdp2", 1, 8), ("eight_gpus_fsdp2_checkpointing", 1, 8),
        ("two_nodes_fsdp2", 2, 16), ("eight_gpus_zero2", 1, 8), ("eight_gpus_zero3", 1, 8),
    ],
)  # fmt: skip
def test_configs_launch_as_many_processes_as_they_say(name, machines, processes):
    args, _ = launched(config(name))
    assert (int(args.num_machines), int(args.num_processes)) == (machines, processes)
    assert args.use_fsdp == ("fsdp2" in name) and args.use_deepspeed == ("zero" in name)
    assert args.multi_gpu == (name == "eight_gpus")


def test_every_config_is_tested():
    assert len(CONFIGS) == 7


@pytest.mark.parametrize("name", ["eight_gpus_fsdp2", "eight_gpus_fsdp2_checkpointing", "two_nodes_fsdp2"])
def test_fsdp_configs_make_the_plugin_they_describe(monkeypatch, name):
    _, env = launched(config(name))
    for key, value in env.items():
        if "FSDP" in key:
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert str(plugin.state_dict_type).endswith("SHARDED_STATE_DICT")
    assert bool(plugin.activation_checkpointing) == name.endswith("checkpointing")


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_configs_describe_their_stage(monkeypatch, stage):
    settings = yaml.safe_load(config(f"eight_gpus_zero{stage}").read_text())["deepspeed_config"]
    assert settings["zero_stage"] == stage and settings["gradient_accumulation_steps"] == "auto"
    _, env = launched(config(f"eight_gpus_zero{stage}"))
    assert env["ACCELERATE_USE_DEEPSPEED"] == "true" and env["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(stage)


# What fills in `auto`. transformers makes it one of accelerate's configs only where deepspeed is installed.
FILLED = type("Filled", (HfDeepSpeedConfig,), {k: v for k, v in vars(HfTrainerDeepSpeedConfig).items() if not k.startswith("__")})


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_configs_make_the_plugin_they_describe_and_the_recipe_fills_it_in(monkeypatch, stage):
    given = ["--config", str(ROOT / "recipes" / "midtrain_delta_net_1.3b.yaml"), "--use_cpu"]
    args = midtrain.COMMAND.call(given)[1][2]
    _, env = launched(
        config(f"eight_gpus_zero{stage}")
    )  # only now: with these variables the settings above would want deepspeed itself
    for key, value in env.items():
        if "DEEPSPEED" in key or "GRADIENT" in key:
            monkeypatch.setenv(key, value)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == stage and plugin.deepspeed_config["gradient_accumulation_steps"] == "auto"
    monkeypatch.setattr(type(args), "world_size", 8)
    plugin.set_mixed_precision("bf16" if args.bf16 else "no")
    filled = FILLED(plugin.deepspeed_config)
    filled.mismatches = []
    filled.trainer_config_process(args)
    filled.trainer_config_finalize(args, None, args.max_steps)
    got = filled.config
    assert "auto" not in json.dumps(got) and got["zero_optimization"]["stage"] == stage
    assert got["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is (stage == 3)
    assert (got["train_batch_size"], got["train_micro_batch_size_per_gpu"], got["gradient_accumulation_steps"]) == (32, 1, 4)
    assert got["gradient_clipping"] == args.max_grad_norm == 0.2 and got["bf16"]["enabled"] is True
    if is_deepspeed_available():
        from deepspeed.runtime.config import DeepSpeedConfig

        read = DeepSpeedConfig({**got, "train_batch_size": 4})  # here is one process
        assert read.zero_optimization_stage == stage and read.gradient_clipping == 0.2


def test_a_run_starts_by_accelerate_launch(tmp_path):
    """Two processes on this machine's CPU from the config of eight GPUs."""
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"document {i}: " + "alpha beta gamma delta " * 30}) for i in range(12)))
    words = [
        "accelerate", "launch", "--config_file", str(config("eight_gpus")),
        "--num_processes", "2", "-m", "refine_nsp.cli", "midtrain", "--model_name_or_path", "refine-nsp/tiny-delta-net",
        "--dataset_name", str(text), "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--max_length", "64",
        "--per_device_train_batch_size", "1", "--logging_steps", "1", "--preset", "expected", "--use_cpu", "true",
    ]  # fmt: skip

    def launch() -> None:
        sys.argv, datasets.config.HF_DATASETS_CACHE = words, tmp_path / "cache"
        launch_in_forks()
        accelerate_cli.main()

    log = tmp_path / "log.txt"
    assert exit_code(fork(launch, log, {"CUDA_VISIBLE_DEVICES": ""})) == 0, log.read_text()[-3000:]
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "checkpoint-1" / "dealing.json").read_text())["processes"] == 2
