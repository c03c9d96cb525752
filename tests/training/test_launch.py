"""The configs of recipes/accelerate are what accelerate understands, and say what their names say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, is_deepspeed_available
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

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


@pytest.mark.skipif(not is_deepspeed_available(), reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_configs_make_the_plugin_they_describe(monkeypatch, stage):
    _, env = launched(config(f"eight_gpus_zero{stage}"))
    for key, value in env.items():
        if "DEEPSPEED" in key:
            monkeypatch.setenv(key, value)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == stage and plugin.deepspeed_config["gradient_accumulation_steps"] == "auto"


def test_a_run_starts_by_accelerate_launch(tmp_path):
    """Two processes on this machine's CPU from the config of eight GPUs."""
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"document {i}: " + "alpha beta gamma delta " * 30}) for i in range(12)))
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config("eight_gpus")),
        "--num_processes", "2", "-m", "refine_nsp.cli", "midtrain", "--model_name_or_path", "refine-nsp/tiny-delta-net",
        "--dataset_name", str(text), "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--max_length", "64",
        "--per_device_train_batch_size", "1", "--logging_steps", "1", "--preset", "exact", "--use_cpu", "true",
    ]  # fmt: skip
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "checkpoint-1" / "dealing.json").read_text())["processes"] == 2
