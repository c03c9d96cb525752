"""LoRA in every phase: what `--use_peft` writes is read by every command as the model it stands for."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

import refine_nsp
from refine_nsp.cli import main
from refine_nsp.commands.shared import ModelArguments, build_model
from refine_nsp.errors import RefineError
from refine_nsp.models.load import SHIPPED, adapters_of, load_adapter, load_config
from refine_nsp.training import ReFINEConfig

peft = pytest.importorskip("peft", reason="PEFT is not installed")
safetensors = pytest.importorskip("safetensors.torch")

BASE = "refine-nsp/tiny-delta-net"
PROMPT = "def add(a, b):\n    return a + b\n\n" * 8
SMALL = "--max_steps 2 --per_device_train_batch_size 2 --positions_per_sequence 2 --rollout_length 2 --report_to none --use_cpu"


def train(phase: str, source: Path, data: Path, run: Path, *more: str) -> Path:
    argv = [
        phase,
        "--model_name_or_path",
        str(source),
        "--dataset_name",
        str(data),
        "--output_dir",
        str(run),
        "--eval_strategy",
        "no",
    ]
    assert main([*argv, *SMALL.split(), "--learning_rate", "1e-2", *more]) == 0
    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    text, pairs, prompt = folder / "text.txt", folder / "pairs.jsonl", folder / "prompt.txt"
    text.write_text("\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(200)))
    rows = [{"prompt": f"{PROMPT}What is {i} + 1?", "answers": str(i + 1)} for i in range(6)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompt.write_text(PROMPT)
    return {"text": text, "pairs": pairs, "prompt": prompt, "folder": folder}


@pytest.fixture(scope="module")
def run(files) -> Path:
    """The folder of a mid-training of adapters, with a checkpoint."""
    target = files["folder"] / "mid"
    return train("midtrain", Path(BASE), files["text"], target, "--use_peft", "--max_length", "128", "--save_steps", "1")


def logits(model) -> torch.Tensor:
    ids = refine_nsp.load(BASE)[1](PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.eval()(ids).logits


def adapted(folder: Path) -> torch.Tensor:
    """By PEFT alone."""
    return logits(peft.PeftModel.from_pretrained(refine_nsp.load(BASE)[0], folder))


def altered(run: Path, folder: Path, **settings) -> Path:
    """A copy of an adapter with other words in its configuration."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return folder


def test_a_run_and_its_checkpoints_are_loaded_as_what_peft_makes_of_them(run):
    assert not (run / "config.json").exists() and (run / "adapter_model.safetensors").exists()
    for folder in (run, run / "checkpoint-1"):
        model, _ = refine_nsp.load(folder)
        assert type(model).__name__ == "DeltaNetForCausalLM" and not any("lora" in name for name in model.state_dict())
        torch.testing.assert_close(logits(model), adapted(folder), rtol=1e-4, atol=1e-4)
        assert (logits(model) - logits(refine_nsp.load(BASE)[0])).abs().max() > 1e-2
    assert load_config(run).model_type == "delta_net"


def test_export_makes_the_plain_model_that_the_adapters_stand_for(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "plain")]) == 0
    assert (tmp_path / "plain" / "config.json").exists() and not (tmp_path / "plain" / "adapter_config.json").exists()
    torch.testing.assert_close(logits(refine_nsp.load(tmp_path / "plain")[0]), adapted(run), rtol=1e-4, atol=1e-4)
    for again, said in (("plain", "is a plain folder already"), ("nothing", "no adapters")):
        assert main(["export", str(tmp_path / again), str(tmp_path / "more")]) == 1 and said in capsys.readouterr().err


def test_every_command_takes_the_adapters_as_a_model(run, files, tmp_path, capsys):
    plain = tmp_path / "plain"
    assert main(["export", str(run), str(plain)]) == 0
    capsys.readouterr()
    said = []
    for model in (run, plain):
        assert main(["generate", str(model), "--prompt_file", str(files["prompt"]), "--max_new_tokens", "6", "--greedy"]) == 0
        ttt = ["--prompt_file", str(files["prompt"]), "--max_new_tokens", "4", "--ttt", "ntp", "--ttt_learning_rate", "1e-3"]
        assert main(["ttt", str(model), *ttt]) == 0
        # Seconds differ.
        said.append(
            [line for line in capsys.readouterr().out.splitlines() if "adapted" not in line and "plain  " not in line][:8]
        )
        tasks = [
            "--tasks",
            "niah_single_1",
            "--lengths",
            "512",
            "--samples",
            "1",
            "--output_dir",
            str(tmp_path / f"of_{model.name}"),
        ]
        assert main(["evaluate", str(model), *tasks]) == 0
        capsys.readouterr()
    assert said[0] == said[1]
    assert main(["inspect", str(run), str(files["prompt"]), "--output", str(tmp_path / "picture.html")]) == 0


def test_post_training_goes_on_with_the_adapters(run, files, tmp_path):
    """One adapter on the first base, as PEFT reads it: beginning where it was, and not where the base is."""
    before = safetensors.load_file(run / "adapter_model.safetensors")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        post = train(
            "posttrain", run, files["pairs"], tmp_path / "post", "--use_peft", "--objective", "none", "--learning_rate", "1e-5"
        )
    assert not [w for w in heard if "goes on with the adapters" in str(w.message)]
    after = safetensors.load_file(post / "adapter_model.safetensors")
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)
    assert all((before[k] - after[k]).abs().max() < 1e-3 for k in before)
    assert [a.base for a in adapters_of(post)] == [str(SHIPPED[BASE])]
    torch.testing.assert_close(logits(refine_nsp.load(post)[0]), adapted(post), rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="lora_r=16, lora_alpha=32"):
        build_model(ModelArguments(str(run), use_peft=True, lora_r=4), ReFINEConfig(output_dir="x", report_to="none"))


def test_post_training_without_adapters_trains_the_merged_model(run, files, tmp_path):
    post = train("posttrain", run, files["pairs"], tmp_path / "post", "--objective", "none", "--learning_rate", "1e-7")
    assert (post / "config.json").exists() and not (post / "adapter_config.json").exists()
    torch.testing.assert_close(logits(refine_nsp.load(post)[0]), adapted(run), rtol=1e-2, atol=1e-2)


def test_new_adapters_are_drawn_by_the_seed():
    arguments = ModelArguments(BASE, use_peft=True, lora_r=2)

    def drawn(seed):
        model = build_model(arguments, ReFINEConfig(output_dir="x", report_to="none", seed=seed))
        return {k: v for k, v in model.named_parameters() if "lora_A" in k}

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(first[k], again[k]) and not torch.equal(first[k], other[k]) for k in first) and first


def test_new_adapters_on_adapters(run, tmp_path):
    """A chain: what the second was trained on is the first merged, and so it is loaded."""
    model, tokenizer = refine_nsp.load(run)
    second = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    expected = logits(second)
    second.save_pretrained(tmp_path / "second", save_embedding_layers=False)
    found, same = refine_nsp.load(tmp_path / "second")
    assert [a.base for a in adapters_of(tmp_path / "second")] == [str(run), str(SHIPPED[BASE])]
    assert same.get_vocab() == tokenizer.get_vocab()  # the base's
    torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-4)


def test_adapters_of_a_hybrid_of_transformers(tmp_path):
    from tests.models.transformers_models import plain

    plain("qwen3_next", dtype=torch.float32).save_pretrained(tmp_path / "base")
    refine_nsp.load(BASE)[1].save_pretrained(tmp_path / "base")
    base = refine_nsp.load(tmp_path / "base")[0]
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(refine_nsp.load(tmp_path / "adapter")[0](ids).logits, wrapped(ids).logits, rtol=1e-3, atol=1e-3)


def test_the_base_of_another_installation_is_the_shipped_one(run, tmp_path):
    elsewhere = altered(
        run, tmp_path / "a", base_model_name_or_path="/usr/lib/python3/site-packages/refine_nsp/assets/tiny-delta-net"
    )
    torch.testing.assert_close(logits(refine_nsp.load(elsewhere)[0]), adapted(run), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"base_model_name_or_path": None}, "names no base"),
        ({"base_model_name_or_path": "/not/there"}, "the base of the adapter"),
        ({"base_model_name_or_path": "refine-nsp/tiny-lact"}, "does not belong on"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config"),
        ({"r": 3}, "cannot put the adapter"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_by_name(run, tmp_path, settings, said):
    with pytest.raises(RefineError, match=said):
        refine_nsp.load(altered(run, tmp_path / "a", **settings))


def test_circles_pickles_and_broken_files_are_refused(run, tmp_path):
    circle = altered(run, tmp_path / "circle", base_model_name_or_path=str(tmp_path / "circle"))
    pickled = altered(run, tmp_path / "pickled")
    torch.save(safetensors.load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    base = tmp_path / "base"
    shutil.copytree(SHIPPED[BASE], base)
    torch.save(safetensors.load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    on_pickles = altered(run, tmp_path / "on_pickles", base_model_name_or_path=str(base))
    cut, words, nan = altered(run, tmp_path / "cut"), altered(run, tmp_path / "words"), altered(run, tmp_path / "nan")
    (cut / "adapter_model.safetensors").write_bytes((run / "adapter_model.safetensors").read_bytes()[:1000])
    (words / "adapter_config.json").write_text("[1")
    weights = safetensors.load_file(run / "adapter_model.safetensors")
    safetensors.save_file({k: v * float("nan") for k, v in weights.items()}, nan / "adapter_model.safetensors")
    less = altered(run, tmp_path / "less")
    safetensors.save_file(dict(list(weights.items())[1:]), less / "adapter_model.safetensors")
    for folder, said in (
        (circle, "leads back to itself"), (pickled, "pickled weights"), (on_pickles, "holds only pickled weights"),
        (cut, "cannot put the adapter"), (words, "expected a configuration of PEFT"), (nan, "not all finite"), (less, "1 missing"),
    ):  # fmt: skip
        with pytest.raises(RefineError, match=said):
            refine_nsp.load(folder)
    with pytest.raises(RefineError, match="holds no adapter"):
        load_adapter(BASE)
