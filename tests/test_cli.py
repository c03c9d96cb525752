"""The command as a user meets it: help, configuration, each command end to end on tiny jobs, and one clear line for what is wrong."""

import gc
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import refine_nsp
from refine_nsp import environment
from refine_nsp.cli import main
from refine_nsp.commands import NAMES
from refine_nsp.config import PRESETS
from refine_nsp.models.load import SHIPPED, load_model
from refine_nsp.ops import kernels
from tests.models import transformers_models
from tests.models.families import build

BASE = "refine-nsp/tiny-delta-net"
TEXT = "\n".join(f"def function_{i}(argument):\n    return argument + {i}\n" for i in range(400))


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def tiny(tmp_path, text, *more: str) -> list[str]:
    return ["midtrain", "--dataset_name", str(text), "--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--max_length", "128",
            "--per_device_train_batch_size", "2", "--positions_per_sequence", "2", "--report_to", "none", "--use_cpu", *more]  # fmt: skip


def fails(capsys, argv: list[str], words: str, code: int = 1) -> None:
    """Exit code, exactly one line on stderr, naming what is wrong; no traceback."""
    capsys.readouterr()
    assert main(argv) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err and words in err, err
    assert len([line for line in err.strip().splitlines() if line.startswith("refine-nsp:")]) == 1


@pytest.fixture
def bfloat16_folder(tmp_path) -> Path:
    """A model as most of the hub's are stored."""
    model, tokenizer = refine_nsp.load(BASE)
    folder = tmp_path / "bfloat16"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_small_steps_change_a_bfloat16_checkpoint_under_autocast(tmp_path, text, bfloat16_folder, capsys):
    """Its weights are trained in float32, unless another dtype is asked for, which is warned of."""
    argv = [*tiny(tmp_path, text, "--model_name_or_path", str(bfloat16_folder), "--bf16"), "--learning_rate", "1e-6"]
    changed = []
    for dtype in ([], ["--dtype", "bfloat16"]):
        assert main([*argv, *dtype]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("refine-nsp: ")]
        assert any("in which a step of learning_rate=1e-06 rounds away" in line for line in lines) == bool(dtype)
        before, after = load_file(bfloat16_folder / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
        assert {x.dtype for x in after.values()} == {torch.bfloat16 if dtype else torch.float32}
        moved = sum(int((after[name].float() != x.float()).sum()) for name, x in before.items())
        changed.append(moved / sum(x.numel() for x in before.values()))
    assert changed[0] > 0.5 and changed[1] < 0.1


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in NAMES)


@pytest.mark.parametrize("command", NAMES)
def test_every_command_explains_itself(capsys, command):
    assert main([command, "--help"]) == 0
    assert len(capsys.readouterr().out) > 200


def test_env_says_what_is_here_and_what_computes(capsys, monkeypatch):
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (
        facts["environment"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
        and facts["devices"][0]["device"] == "cpu"
    )
    assert set(facts["kernels"]["delta rule"]) == {"runs_on", "why"}
    assert main(["env"]) == 0
    assert "window attention" in capsys.readouterr().out
    kernels.chosen.cache_clear()
    monkeypatch.setenv(kernels.VARIABLE, "fast")
    fails(capsys, ["env"], "REFINE_NSP_KERNELS='fast': expected one of auto, torch, fla")


def line_of(help_text: str, flag: str) -> str:
    """A flag's paragraph in a help text, as one line."""
    paragraph = help_text.partition(f"  --{flag} ")[2]
    return " ".join(re.split(r"\n  --|\n\n", paragraph)[0].split())


def test_help_shows_types_choices_and_what_the_preset_makes_the_default(capsys, tmp_path):
    assert main(["midtrain", "--help"]) == 0
    plain = capsys.readouterr().out
    assert line_of(plain, "rollout_length").startswith("INT") and line_of(plain, "rollout_length").endswith("[5]")
    assert line_of(plain, "estimator").startswith("sampled|closed_form") and line_of(plain, "estimator").endswith("[sampled]")
    config = tmp_path / "c.yaml"
    config.write_text("preset: expected\n")
    assert main(["midtrain", "--help", "--config", str(config)]) == 0
    preset = capsys.readouterr().out
    assert line_of(preset, "rollout_length").endswith("[3]") and line_of(preset, "estimator").endswith("[closed_form]")
    assert main(["posttrain", "--help"]) == 0
    assert line_of(capsys.readouterr().out, "reward_funcs").endswith("[hybrid]")
    assert all(len(line) <= 131 for line in preset.splitlines())


def test_help_is_ours_where_transformers_says_little(capsys):
    assert main(["midtrain", "--help"]) == 0
    shown = capsys.readouterr().out
    assert line_of(shown, "resume_from_checkpoint").startswith("TEXT `last`: continue after the newest whole checkpoint")
    assert "less memory, more time" in line_of(shown, "gradient_checkpointing") and "eprecated" not in shown
    assert main(["midtrain", "--help_all"]) == 0
    everything = capsys.readouterr().out
    assert line_of(everything, "dataloader_in_order").endswith("[True]")


AS_COMMAND = "import gc, sys; gc.disable(); sys.argv[0] = '/somewhere/refine-nsp'; from refine_nsp.cli import main; "


def as_command(code: str) -> subprocess.CompletedProcess[str]:
    """What happens in a process that was started as `refine-nsp`."""
    return subprocess.run([sys.executable, "-c", AS_COMMAND + code], capture_output=True, text=True, timeout=300, check=False)


def test_the_packages_names_are_there_in_the_command_too():
    done = as_command("import refine_nsp; print([getattr(refine_nsp, n).__name__ for n in refine_nsp.__all__])")
    assert done.returncode == 0 and "ReFINETrainer" in done.stdout and "DeltaNetForCausalLM" in done.stdout, done.stderr


def test_no_garbage_is_searched_for_while_libraries_are_loaded():
    with environment.without_garbage_searches():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() > 0


def test_sigterm_while_libraries_are_loaded_ends_quietly():
    loading = "import importlib, os, signal; importlib.import_module = lambda name: os.kill(os.getpid(), signal.SIGTERM); "
    done = as_command(loading + "main(['midtrain'])")
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")


@pytest.mark.parametrize(
    ("given", "expected"), [({}, str(environment.SPINS)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_how_threads_wait_is_set_before_torch_is_loaded_and_as_users_want_it(given, expected):
    loading = f"""
import importlib, os
for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
    os.environ.pop(name, None)
os.environ.update({given})
def load(name):
    print("torch" in sys.modules, os.environ.get("GOMP_SPINCOUNT"))
    raise SystemExit(0)
importlib.import_module = load
"""
    done = as_command(loading + "main(['midtrain'])")
    assert done.stdout.split() == ["False", str(expected)], done.stderr


def test_the_commit_is_that_of_the_package_and_not_of_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in ("init", "add a.py", "-c user.name=a -c user.email=a@b commit -m a"):
        (tmp_path / "a.py").touch()
        subprocess.run(["git", *words.split()], check=True, capture_output=True)
    (tmp_path / "installed.py").touch()  # as in an environment inside a repository
    assert len(environment.commit_of(tmp_path / "a.py") or "") == 40
    assert environment.commit_of(tmp_path / "installed.py") is None
    assert environment.environment()["commit"] == environment.commit_of(Path(environment.__file__))


def test_the_method_has_the_same_settings_for_training_test_time_and_inspect():
    from refine_nsp.commands.grammar import Command
    from refine_nsp.commands.inspect import COMMAND as INSPECT
    from refine_nsp.commands.shared import TEST_TIME
    from refine_nsp.config import NSPConfig

    flags = [
        "--ttt_preset",
        "context",
        "--ttt_selection",
        "argmax",
        "--ttt_smoothing_window",
        "none",
        "--ttt_num_generations",
        "3",
    ]
    _, (_, test_time) = Command("", TEST_TIME).call(flags)
    assert test_time.nsp == NSPConfig.preset("context", selection="argmax", num_generations=3)
    _, (_, nsp) = INSPECT.call(["--tau", "0.5"])
    assert nsp == NSPConfig.preset("context", tau=0.5)


def test_flags_can_take_back_what_a_preset_or_file_sets(tmp_path):
    from refine_nsp.commands.grammar import Command, Settings
    from refine_nsp.config import NSPConfig

    config = tmp_path / "c.yaml"
    config.write_text("reward_weights: [1.0, 2.0]\nreward_funcs: [cosine, hybrid]\nsmoothing_window: 3\n")

    def parse(*flags: str) -> NSPConfig:
        return Command("", (Settings(NSPConfig, preset="context"),)).call(["--config", str(config), *flags])[1][0]

    nsp = parse("--smoothing_window", "none")
    assert nsp.smoothing_window is None and nsp.reward_weights == [1.0, 2.0]
    config.write_text("smoothing_window: null\nadvantage_scale: std\n")
    assert parse() == NSPConfig.preset("context", advantage_scale="std")


def test_midtrain_end_to_end_then_report_and_generate(tmp_path, text, capsys):
    assert (
        main(tiny(tmp_path, text, "--log_completions", "--logging_steps", "1", "--eval_strategy", "steps", "--eval_steps", "1"))
        == 0
    )
    run = tmp_path / "run"
    for name in ("model.safetensors", "config.yaml", "environment.json", "metrics.jsonl", "completions.jsonl", "report.html"):
        assert (run / name).exists(), name
    page = (run / "report.html").read_text()
    assert "<svg" in page and "<script" not in page and "src=" not in page and "@import" not in page
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["max_steps"] == 2 and config["dataset_name"] == str(text)
    # The saved configuration gives the same run again.
    first = (run / "model.safetensors").read_bytes()
    assert main(["midtrain", "--config", str(run / "config.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == first
    assert main(["report", str(run), str(tmp_path / "again"), "--output", str(tmp_path / "both.html")]) == 0
    assert "again" in (tmp_path / "both.html").read_text()
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "def f(", "--max_new_tokens", "5", "--greedy"]) == 0
    assert capsys.readouterr().out.startswith("def f(")


def test_flags_win_over_the_file_and_dry_run_touches_nothing(tmp_path, text, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"max_steps": 77, "learning_rate": "3e-5", "preset": "context"}))
    assert main([*tiny(tmp_path, text, "--config", str(config), "--dry_run")]) == 0
    out = capsys.readouterr().out
    assert "context" in out and "77" not in out and "3e-05" in out and "parameters" in out
    assert not (tmp_path / "run").exists()


def test_inspect_writes_a_picture(tmp_path, text, capsys):
    page = tmp_path / "page.html"
    assert main(["inspect", BASE, str(text), "--output", str(page), "--max_tokens", "400", "--num_generations", "2"]) == 0
    content = page.read_text()
    assert "<svg" in content and "Rollouts against the truth" in content
    assert f"{load_model(BASE).num_parameters():,}" in capsys.readouterr().out


def test_inspect_without_a_text_says_what_the_model_is(tmp_path, capsys, monkeypatch):
    """A hybrid too; and it writes nothing."""
    monkeypatch.chdir(tmp_path)
    transformers_models.plain("qwen3_next", dtype=torch.float32).save_pretrained("hybrid")
    for name, kernels_are in ((BASE, "torch"), ("hybrid", "transformers' own; states by reference")):
        assert main(["inspect", name]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert f"{load_model(name).num_parameters():,}" in out and "MiB after 256 tokens" in out and kernels_are in out
    assert [path.name for path in tmp_path.iterdir()] == ["hybrid"]


def test_bad_words_are_answered_with_the_nearest(tmp_path, text, capsys):
    fails(capsys, ["midtran"], "did you mean 'midtrain'")
    fails(capsys, tiny(tmp_path, text, "--learnin_rate", "1"), "did you mean 'learning_rate'")
    bad = tmp_path / "bad.yaml"
    bad.write_text("lerning_rate: 1\n")
    fails(capsys, tiny(tmp_path, text, "--config", str(bad)), "did you mean 'learning_rate'")
    bad.write_text("- a\n- b\n")
    fails(capsys, tiny(tmp_path, text, "--config", str(bad)), "key: value")
    fails(capsys, tiny(tmp_path, text, "--config", str(tmp_path / "none.yaml")), "no configuration file")
    fails(capsys, ["pretrain", "--config", str(bad)], "key: value")
    bad.write_text("null: 3\n")
    fails(capsys, ["pretrain", "--config", str(bad)], "unknown key None")


def test_values_of_another_type_are_one_line(tmp_path, text, capsys):
    for argv, words in (
        (
            tiny(tmp_path, text, "--max_steps", "abc"),
            "--max_steps/--max-steps: invalid int value: 'abc'; `refine-nsp midtrain --help`",
        ),
        (["generate", "--top_k", "x"], "invalid int value: 'x'; `refine-nsp generate --help`"),
        (["report"], "required: runs; `refine-nsp report --help`"),
        (["--wrong"], "--wrong; `refine-nsp --help`"),
        (["midtrain", "--config"], "--config: expected one argument; `refine-nsp midtrain --help`"),
    ):
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert said.startswith("refine-nsp: ") and said.count("\n") == 1 and words in said, said


def test_values_out_of_range(tmp_path, text, capsys):
    fails(capsys, ["generate", "--prompt", "a", "--top_k", "-3"], "top_k must be at least 1, or 0 for all tokens, got -3")
    fails(capsys, ["generate", "--prompt", "a", "--top_p", "7"], "top_p must be above 0 and at most 1, got 7.0")
    fails(
        capsys, tiny(tmp_path, text, "--learning_rate", "-1", "--dry_run"), "learning_rate must be a finite number of at least 0"
    )
    fails(capsys, tiny(tmp_path, text, "--dtype", "float3"), "dtype='float3' is not one of float32, bfloat16, float16")
    fails(capsys, tiny(tmp_path, text, "--validation_fraction", "2"), "validation_fraction=2.0: expected a share")
    fails(capsys, tiny(tmp_path, text, "--adam_beta2", "1"), "adam_beta2 must be at least 0 and below 1, got 1.0")
    evaluation = ["evaluate", "--tasks", "ntp", "--documents", str(text), "--window", "1", "--output_dir", str(tmp_path / "e")]
    fails(capsys, evaluation, "window must be at least 2")
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    evaluation = ["evaluate", "--tasks", "ntp", "--documents", str(tmp_path / "d.jsonl"), "--output_dir", str(tmp_path / "e")]
    fails(capsys, evaluation, "row 1: text is 'None'; expected text in every row")
    (tmp_path / "t.txt").write_text(TEXT[:1200])
    page = ["--output", str(tmp_path / "t.txt" / "x.html")]
    fails(capsys, ["inspect", BASE, str(text), "--max_tokens", "300", *page], "t.txt is a file, so nothing can be written")


@pytest.mark.parametrize("command", ["midtrain", "posttrain"])
def test_reporting_to_what_is_not_installed_is_known_before_any_work(tmp_path, text, capsys, monkeypatch, command):
    from refine_nsp.commands import training_run

    monkeypatch.setattr(training_run, "get_available_reporting_integrations", lambda: ["wandb"])
    argv = [command, *tiny(tmp_path, text, "--dry_run")[1:]]
    argv[argv.index("--report_to") + 1] = "tensorboard"
    fails(capsys, argv, "--report_to tensorboard needs a package that is not installed: pip install tensorboard")
    argv[argv.index("--report_to") + 1] = "wandbb"
    fails(capsys, argv, "did you mean 'wandb'")


def test_bad_data_and_settings(tmp_path, text, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    fails(capsys, tiny(tmp_path, tmp_path / "missing.txt"), "no file or folder")
    fails(capsys, tiny(tmp_path, tmp_path / "empty.txt"), "is empty")
    fails(capsys, tiny(tmp_path, tmp_path / "bytes.txt"), "not UTF-8")
    fails(capsys, tiny(tmp_path, text, "--text_column", "txt"), "did you mean 'text'")
    fails(capsys, tiny(tmp_path, text, "--rollout_length", "0"), "rollout_length must be at least 1")
    fails(capsys, tiny(tmp_path, text, "--use_peft", "--lora_r", "0"), "lora_r must be at least 1")
    fails(capsys, tiny(tmp_path, text, "--use_peft", "--lora_target_modules", "x"), "Its linear layers are")
    fails(capsys, tiny(tmp_path, text, "--positions_per_sequence", "0"), "positions_per_sequence must be at least 1")
    fails(capsys, tiny(tmp_path, text, "--positions_per_sequence", "100"), "too many for max_length")
    fails(capsys, tiny(tmp_path, text, "--reward_funcs", "cosin"), "did you mean 'cosine'")
    fails(capsys, ["inspect", BASE, str(tmp_path / "empty.txt")], "is empty")
    fails(capsys, ["ttt", BASE, "--prompt", ""], "the prompt is empty")
    fails(capsys, ["report", str(tmp_path / "nothing")], "no run folder")
    fails(capsys, ["report", str(tmp_path)], "no metrics.jsonl")
    assert not (tmp_path / "run").exists()


def test_bad_models(tmp_path, text, capsys):
    def model(name: str) -> list[str]:
        return tiny(tmp_path, text, "--model_name_or_path", name)

    fails(capsys, model("refine-nsp/tiny-deltanet"), "did you mean 'refine-nsp/tiny-delta-net'")
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(capsys, model(str(empty)), "no config.json")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (other / "model.safetensors").write_bytes(b"")
    (other / "tokenizer.json").write_bytes((SHIPPED[BASE] / "tokenizer.json").read_bytes())
    fails(capsys, model(str(other)), "has no causal language model for 'vit'")
    pickled = tmp_path / "pickled"
    build("delta_net").save_pretrained(pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    (pickled / "tokenizer.json").write_bytes((SHIPPED[BASE] / "tokenizer.json").read_bytes())
    fails(capsys, model(str(pickled)), "pickled weights")
    bare = tmp_path / "bare"
    build("delta_net").save_pretrained(bare)
    fails(capsys, model(str(bare)), "has no tokenizer")
    fails(
        capsys,
        tiny(tmp_path, text, "--model_name_or_path", str(bare), "--tokenizer_name", BASE),
        "the tokenizer has 2048 tokens but",
    )


def test_what_transformers_has_against_settings_is_one_line(tmp_path, text, capsys):
    fails(capsys, tiny(tmp_path, text, "--reward_funcs", "os.getcwd"), "the reward getcwd returned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "false")  # which transformers sets
        fails(capsys, tiny(tmp_path, text, "--fsdp", "full_shard"), "these settings cannot be trained with: ")


def test_special_tokens_that_are_no_numbers_are_named(tmp_path, capsys):
    model, tokenizer = refine_nsp.load(BASE)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": "a"}))
    fails(capsys, ["generate", str(tmp_path / "m"), "--prompt", "a"], "eos_token_id is 'a' in its GenerationConfig")


def test_damaged_folders_of_runs_are_named(tmp_path, text, capsys):
    assert main(tiny(tmp_path, text, "--logging_steps", "1", "--log_completions")) == 0
    run = tmp_path / "run"
    for name, damage in (
        ("metrics.jsonl", '{"step": 1, "loss": \n{"step": 2}\n'), ("metrics.jsonl", '[1]\n'), ("metrics.jsonl", '{"loss": 1}\n'),
        ("completions.jsonl", '{"step": 1}\n'), ("environment.json", "[]"), ("environment.json", "{"),
    ):  # fmt: skip
        kept = (run / name).read_text()
        (run / name).write_text(damage)
        fails(capsys, ["report", str(run), "--output", str(tmp_path / "r.html")], f"{run / name} is damaged or something else")
        (run / name).write_text(kept)
    fails(capsys, ["report", str(run), "--output", ""], ". is a folder; name a file to write")
    assert not (tmp_path / "r.html").exists() and main(["report", str(run), "--output", str(tmp_path / "r.html")]) == 0


def test_weights_that_overflow_end_in_one_line(tmp_path, text, capsys):
    model, tokenizer = refine_nsp.load(BASE)
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)  # finite, as is all that is loaded
    model.save_pretrained(tmp_path / "huge")
    tokenizer.save_pretrained(tmp_path / "huge")
    argv = tiny(tmp_path, text, "--model_name_or_path", str(tmp_path / "huge"), "--max_skipped_steps", "2")
    fails(capsys, [*argv[:6], "9", *argv[7:]], "not finite in 2 steps in a row")


def test_a_full_disk_and_ctrl_c_end_in_one_line(tmp_path, text, capsys, monkeypatch):
    from refine_nsp.training import ReFINETrainer

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ReFINETrainer, "save_model", full)
        fails(capsys, tiny(tmp_path, text, "--save_strategy", "no"), "No space left on device")
    assert not list((tmp_path / "run").glob("*.safetensors"))

    def pressed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ReFINETrainer, "training_step", pressed)
    assert main(tiny(tmp_path, text)) == 130
    assert "interrupted" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path, text):
    with pytest.raises(ValueError, match="no file or folder"):
        main([*tiny(tmp_path, tmp_path / "missing.txt"), "--debug"])


def test_shipped_recipes_are_found_by_name_wherever_one_is(tmp_path, text, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = ["--dataset_name", str(text), "--use_cpu", "--bf16", "False", "--dry_run"]
    assert main(["midtrain", "--config", "recipes/midtrain_expected.yaml", *named]) == 0
    assert "expected" in capsys.readouterr().out
    fails(
        capsys,
        ["midtrain", "--config", "recipes/midtrain_expekted.yaml", *named],
        "did you mean 'recipes/midtrain_expected.yaml'",
    )
    fails(capsys, ["midtrain", "--config", "recipes/../x.yaml", *named], "no configuration file recipes/../x.yaml")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "midtrain_expected.yaml").write_text("max_steps: 77\n")  # what is here goes first
    assert main(["midtrain", "--config", "recipes/midtrain_expected.yaml", *named]) == 0
    assert "77" in capsys.readouterr().out


def test_a_saved_configuration_has_what_was_set_and_gives_the_run_again(tmp_path, text):
    """Also one that went on from a checkpoint, in a folder without any."""
    file = tmp_path / "mine.yaml"
    file.write_text("preset: expected\nrollout_length: 5\nlearning_rate: 1.0e-3\n")  # 5 is the default, but not the preset's
    saving = ["--config", str(file), "--save_strategy", "steps", "--save_steps", "1"]
    assert main(tiny(tmp_path, text, *saving)) == 0
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert main(tiny(tmp_path, text, *saving, "--resume_from_checkpoint", "last")) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    from_preset = set(PRESETS["expected"])
    flags = {w[2:] for w in tiny(tmp_path, text) if w.startswith("--")} | {
        "preset",
        "rollout_length",
        "learning_rate",
        "save_steps",
    }
    assert flags - {"report_to", "save_strategy"} <= set(saved) <= flags | from_preset, saved  # but for what is the default
    assert saved["rollout_length"] == 5
    assert main(["midtrain", "--config", str(tmp_path / "run" / "config.yaml"), "--output_dir", str(tmp_path / "other")]) == 0
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == weights


def test_recipes_are_understood(tmp_path, text, capsys):
    recipes = Path(__file__).resolve().parents[1] / "recipes"
    common = ["--dataset_name", str(text), "--use_cpu", "--bf16", "False", "--dry_run"]
    for recipe in sorted(recipes.glob("midtrain_*.yaml")):
        assert main(["midtrain", "--config", str(recipe), *common]) == 0, recipe
    assert main(["pretrain", "--config", str(recipes / "pretrain_delta_net.yaml"), "--dry_run"]) == 0


def test_a_reader_that_leaves_is_no_error():
    command = f"echo 'import os' | {sys.executable} -m refine_nsp.cli generate --max_new_tokens 60 --greedy | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("import os") and "refine-nsp:" not in done.stderr and "Traceback" not in done.stderr


def test_a_saved_model_has_a_card_and_nobodys_own_is_overwritten(tmp_path, text):
    import yaml as yaml_module

    assert main(tiny(tmp_path, text, "--logging_steps", "1", "--preset", "expected")) == 0
    run = tmp_path / "run"
    card = (run / "README.md").read_text()
    head = yaml_module.safe_load(card.split("---")[1])
    assert head["base_model"] == BASE and {"delta_net", "refine"} <= set(head["tags"]) and head["library_name"] == "transformers"
    for words in (
        "`text.txt`",
        "next-sequence prediction",
        "| estimator | closed_form |",
        "NTP loss (training)",
        "curves.svg",
        "arXiv",
    ):
        assert words in card, words
    assert str(tmp_path) not in card and (run / "curves.svg").read_text().startswith("<svg")
    (run / "README.md").write_text("mine")
    assert main(tiny(tmp_path, text, "--logging_steps", "1")) == 0
    assert (run / "README.md").read_text() == "mine"


def test_every_saved_model_has_a_card_of_what_had_an_effect(tmp_path):
    """In Python as well: of a run's model and of its checkpoints, sampled or closed form, by steps or by epochs."""
    from tests.training.test_trainer import trainer

    steps = trainer(tmp_path / "a", max_steps=2, save_strategy="steps", save_steps=1)
    steps.train()
    steps.save_model()
    card, early = (p.read_text() for p in (tmp_path / "a" / "README.md", tmp_path / "a" / "checkpoint-1" / "README.md"))
    assert "# a\n" in card and "# a, checkpoint-1\n" in early and "config.yaml" not in card
    for words in (
        "| max_steps | 2 |",
        "| reward_funcs | \\['hybrid'\\] |",
        "| positions_per_sequence | 2 |",
        "NTP loss (training)",
    ):
        assert words in card and words in early, words
    for name in ("num_train_epochs", "lora_r", "use_peft", "order", "token_weights", "bf16", "preset"):
        assert f"| {name} |" not in card + early
    assert "curves.svg" in card and "curves.svg" not in early
    steps.create_model_card(model_name="a", tags=["x"])  # as a push to the hub does
    assert (tmp_path / "a" / "README.md").read_text() == card
    steps.save_model(str(tmp_path / "elsewhere"))
    assert "# a, elsewhere" in (tmp_path / "elsewhere" / "README.md").read_text()
    epochs = trainer(tmp_path / "b", max_steps=-1, num_train_epochs=1, preset="expected", reward_funcs="prefix_match")
    epochs.save_model()  # before it was trained
    card = (tmp_path / "b" / "README.md").read_text()
    assert all(f"| {name} |" in card for name in ("num_train_epochs", "order", "token_weights", "estimator"))
    assert not any(f"| {name} |" in card for name in ("max_steps", "num_generations", "selection", "positions_per_sequence"))


def test_an_adapters_card_names_its_base(tmp_path, text):
    assert main(tiny(tmp_path, text, "--logging_steps", "1", "--objective", "ntp", "--use_peft", "--learning_rate", "1e-4")) == 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert "library_name: peft" in card and "next-token prediction alone" in card and "Model Card for Model ID" not in card
