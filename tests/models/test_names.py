"""Checkpoints whose names are not the model's: saved through a wrapper, they are read; what else is wrong is one line."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from refine_nsp.cli import main
from refine_nsp.errors import RefineError
from refine_nsp.models.load import SHIPPED, load_model
from tests.models.families import FAMILY_NAMES, build

NAME = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a tiny model, by family and fields."""

    def folder(family: str = "delta_net", **fields) -> Path:
        path = tmp_path_factory.mktemp(family)
        build(family, dtype=torch.float32, **fields).save_pretrained(path)
        return path

    return folder


def renamed(folder: Path, rename, shards: int = 1) -> Path:
    """The folder with other names, in so many files."""
    tensors = {rename(name): tensor for name, tensor in load_file(folder / NAME).items()}
    if shards == 1:
        save_file(tensors, folder / NAME, metadata={"format": "pt"})
        return folder
    (folder / NAME).unlink()
    names, where = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.mark.parametrize(
    ("prefix", "fields", "shards"),
    [
        ("_orig_mod.", {}, 1),
        ("module.", {}, 1),
        ("module._orig_mod.", {}, 3),
        ("_orig_mod.module.", {"tie_word_embeddings": True}, 1),
        ("module.module.", {}, 1),
        ("_forward_module.", {}, 1),
        ("base_model.model.", {}, 2),
        ("_fsdp_wrapped_module.", {}, 1),
    ],
)
def test_a_prefix_of_all_names_is_left_out_saying_so(saved, tmp_path, prefix, fields, shards):
    folder = saved(**fields)
    plain, names = load_model(folder).state_dict(), set(load_file(folder / NAME))
    renamed(folder, lambda name: prefix + name, shards)
    with pytest.warns(UserWarning, match="wrapper") as said:
        model = load_model(folder)
    ours = [str(w.message) for w in said if "wrapper" in str(w.message)]
    assert ours == [f"the weights of {folder} were saved through a wrapper: {prefix} is left out of their names"]
    assert all(torch.equal(plain[name], w) for name, w in model.state_dict().items())
    model.save_pretrained(tmp_path)  # under its own names
    assert set(load_file(tmp_path / NAME)) == names


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_wrappers_of_blocks_are_left_out_too(saved, family):
    folder = saved(family)
    plain = load_model(folder).state_dict()
    inside = "layers.1._checkpoint_wrapped_module._orig_mod."
    renamed(folder, lambda name: name.replace("layers.0.", "layers.0._orig_mod.").replace("layers.1.", inside))
    with pytest.warns(UserWarning, match=r"_orig_mod\., _checkpoint_wrapped_module\. is left out"):
        model = load_model(folder)
    assert all(torch.equal(plain[name], w) for name, w in model.state_dict().items())


def test_a_model_too_many_or_too_few_is_no_matter(saved):
    for rename in (lambda name: "model." + name, lambda name: name.removeprefix("model.")):
        folder = saved()
        plain = load_model(folder).state_dict()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model = load_model(renamed(folder, rename))
        assert all(torch.equal(plain[name], w) for name, w in model.state_dict().items())


def test_adapters_saved_through_a_wrapper(saved, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    base = load_model(saved())
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path)
    plain = load_model(tmp_path).state_dict()
    file = tmp_path / "adapter_model.safetensors"
    save_file({name.replace("base_model.model.", "base_model.model._orig_mod."): w for name, w in load_file(file).items()}, file)
    assert all(torch.equal(plain[name], w) for name, w in load_model(tmp_path).state_dict().items())


def settings(**changed):
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))

    return change


def unmerged(folder: Path) -> None:
    renamed(folder, lambda name: "base_model.model." + name.replace("q_proj.", "q_proj.base_layer."))


def other_family(folder: Path) -> None:
    build("lact_swiglu", dtype=torch.float32).save_pretrained(folder / "other")
    shutil.copy(folder / "other" / NAME, folder / NAME)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: renamed(f, lambda n: "student." + n), r"31 missing: lm_head.weight, .* and 27 more; 31 unknown to the model: student"),
        (unmerged, r"with adapters on it .*merge_and_unload"),
        (other_family, r"missing: model\.layers\.0\.attn\.b_proj\.weight, .*30 unknown to the model"),
        (settings(vocab_size=70), r"2 of another shape: lm_head\.weight, model\.embeddings\.weight"),
        (settings(hidden_size=64), r"31 of another shape: .* and 27 more"),
        (settings(num_hidden_layers=40), r"532 missing: .* and 528 more"),
        (settings(model_type="nothing"), "cannot load a model from"),
        (lambda f: (f / NAME).write_bytes((f / NAME).read_bytes()[:5000]), "cannot load the weights of .*not fully covered"),
        (lambda f: (f / NAME).write_bytes(b""), "cannot load the weights of .*header"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged .* expected a model's configuration"),
        (lambda f: (f / NAME).rename(f / "pytorch_model.bin"), "holds only pickled weights"),
    ],
    ids=["student", "unmerged", "family", "vocabulary", "width", "depth", "type", "cut", "empty", "json", "pickle"],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_short_line(saved, capsys, damage, said):
    folder = saved()
    damage(folder)
    with pytest.raises(RefineError, match=said):
        load_model(folder)
    capsys.readouterr()
    assert main(["generate", str(folder), "--prompt", "a"]) == 1
    captured = capsys.readouterr()
    assert (
        captured.err.startswith("refine-nsp: ") and captured.err.count("\n") == 1 and len(captured.err) < 800 and not captured.out
    )


def test_the_command_line_reads_a_compiled_models_checkpoint(tmp_path, capsys):
    folder = tmp_path / "compiled"
    shutil.copytree(SHIPPED["refine-nsp/tiny-delta-net"], folder)
    renamed(folder, lambda name: "_orig_mod." + name)
    assert main(["generate", str(folder), "--prompt", "import os", "--max_new_tokens", "3", "--greedy"]) == 0
    found = capsys.readouterr()
    assert main(["generate", "refine-nsp/tiny-delta-net", "--prompt", "import os", "--max_new_tokens", "3", "--greedy"]) == 0
    assert capsys.readouterr().out == found.out
    said = [line for line in found.err.splitlines() if line.startswith("refine-nsp: ")]
    assert said == [f"refine-nsp: the weights of {folder} were saved through a wrapper: _orig_mod. is left out of their names"]
