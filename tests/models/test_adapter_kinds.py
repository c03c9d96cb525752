"""What a run with adapters ends with is what its folder loads as, and what merging makes of it: for every module that can be adapted and
every option of PEFT's LoRA that is accepted. What cannot be so is refused when it is asked for."""

import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn

from refine_nsp.errors import RefineError
from refine_nsp.models.load import load_adapter, load_model
from refine_nsp.training import ReFINEConfig, ReFINETrainer
from refine_nsp.training.checkpoints import export_checkpoint
from tests.models.families import FAMILY_NAMES, build
from tests.models.transformers_models import plain

peft = pytest.importorskip("peft", reason="PEFT is not installed")

TIED = {"tie_word_embeddings": True}
IDS = torch.randint(0, 64, (2, 50), generator=torch.Generator().manual_seed(1))
LINEAR = {
    "delta_net": ["q_proj", "k_proj", "v_proj", "b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gated_deltanet": ["q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "lact_swiglu": ["qkv", "o_proj", "lr_proj", "momentum_proj.0", "ttt_scale_proj", "gate_proj", "up_proj", "down_proj"],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of tiny models, by family and fields."""
    made: dict[str, Path] = {}

    def folder(family: str, **fields) -> Path:
        if (key := f"{family} {sorted(fields.items())}") not in made:
            made[key] = tmp_path_factory.mktemp(family)
            model = build(family, dtype=torch.float32, **fields) if family in FAMILY_NAMES else plain(family, dtype=torch.float32)
            model.save_pretrained(made[key])
        return made[key]

    return folder


def rows(count: int = 8) -> Dataset:
    g = torch.Generator().manual_seed(0)
    return Dataset.from_list([{"input_ids": torch.randint(0, 64, (40,), generator=g).tolist()} for _ in range(count)])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def trainer(model, folder: Path, config=None, **settings) -> ReFINETrainer:
    args = ReFINEConfig(
        **{"output_dir": str(folder), "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_steps": 2,
           "learning_rate": 0.1, "per_device_train_batch_size": 4, "max_length": 64, "objective": "ntp", "min_prefix": 5,
           "positions_per_sequence": 2, "rollout_length": 2, **settings}
    )  # fmt: skip
    return ReFINETrainer(model=model, args=args, train_dataset=rows(), eval_dataset=rows(2), peft_config=config)


def check(base: Path, folder: Path, config, atol: float = 2e-5, **settings) -> ReFINETrainer:
    """Train for two steps, and compare the model at the end with its folder, exported, and by PEFT's own merging."""
    model = load_model(base)
    before = logits(model)
    t = trainer(model, folder, config, **settings)
    learned = {name: p.detach().clone() for name, p in t.model.named_parameters() if p.requires_grad}
    t.train()
    assert not [name for name, p in t.model.named_parameters() if name in learned and torch.equal(p, learned[name])]
    t.save_model(str(folder / "run"))
    end = logits(t.model)
    assert (end - before).abs().max() > 1e-2
    # The losses see the adapters as the logits do.
    ids = torch.tensor(t.eval_dataset["input_ids"])
    with torch.no_grad():
        expected = nn.functional.cross_entropy(t.model.eval()(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert t.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)
    export_folder = folder / "plain"
    loaded = load_model(folder / "run")
    loaded.save_pretrained(export_folder)
    for found in (loaded, load_model(export_folder), load_adapter(folder / "run")):
        torch.testing.assert_close(logits(found), end, rtol=1e-4, atol=atol)
    assert not any("lora" in name for name in loaded.state_dict()) and all(p.requires_grad for p in loaded.parameters())
    return t


@pytest.mark.parametrize(
    ("family", "name"), [(f, n) for f in FAMILY_NAMES for n in (*LINEAR[f], "embeddings", "lm_head", "all-linear")]
)
def test_every_module(bases, tmp_path, family, name):
    check(bases(family), tmp_path, peft.LoraConfig(r=2, target_modules=name if name == "all-linear" else [name]))


def test_the_modules_above_are_all_there_are(bases):
    for family in FAMILY_NAMES:
        layers = load_model(bases(family)).named_modules()
        found = {n.partition(".attn.")[2] or n.rpartition(".")[2] for n, m in layers if isinstance(m, nn.Linear)}
        assert found == {*LINEAR[family], "lm_head"}


OPTIONS = {
    "dropout": {"lora_dropout": 0.3},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "one_layer": {"layers_to_transform": [1]},
    "layers_pattern": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "rank_pattern": {"rank_pattern": {"q_proj": 1}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 5}},
    "exclude": {"exclude_modules": ["o_proj"]},
    "tokens": {"trainable_token_indices": [1, 2]},
    "tokens_by_name": {"trainable_token_indices": {"embeddings": [1, 2]}},
    "save_norms": {"modules_to_save": ["attn_norm", "norm"]},
    "save_convolution": {"modules_to_save": ["q_conv1d"]},
    "save_mlp": {"modules_to_save": ["mlp"]},
    "save_embeddings": {"modules_to_save": ["embeddings"]},
    "save_head": {"modules_to_save": ["lm_head"]},
    "regex": {"target_modules": r".*\.0\.attn\.(q|k)_proj"},
    "parameters": {"target_parameters": ["q_conv1d.weight", "gate_proj.weight"]},
    "embeddings_weight": {"target_parameters": ["embeddings.weight"]},
    "head_weight": {"target_parameters": ["lm_head.weight"]},
    "both": {"target_modules": ["embeddings", "lm_head"]},
    "head": {"target_modules": ["q_proj", "lm_head"], "use_rslora": True},
    "random": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


ON_SHARED = ("save_embeddings", "save_head", "embeddings_weight", "head_weight", "both", "head")  # what may be shared is adapted
TIED_SOON = (
    *ON_SHARED,
    "tokens",
    "bias_all",
    "random",
)  # with tied weights in every run of the tests; the others in the slow ones


@pytest.mark.parametrize(
    ("option", "fields"),
    [
        pytest.param(option, fields, marks=[pytest.mark.slow] if fields and option not in TIED_SOON else [])
        for option in OPTIONS
        for fields in ({}, TIED)
    ],
)
def test_every_option(bases, tmp_path, option, fields):
    """Also where embeddings and head share a weight, which an adapter on one of them must leave to the other."""
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "o_proj"], **OPTIONS[option]})
    check(bases("delta_net", **fields), tmp_path, config)
    assert load_model(tmp_path / "run").config.tie_word_embeddings == (bool(fields) and option not in ON_SHARED)


@pytest.mark.parametrize("objective", ["ntp", "refine"])
@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"w0_w2_low_rank": -1}, {"target_modules": ["qkv"], "target_parameters": ["attn.w0", "attn.w1", "attn.w2"]}),
        ({}, {"target_modules": [], "target_parameters": ["attn.w1", "attn.qk_scale", "attn.qk_offset"]}),
        ({"qkv_bias": True, "attn_qk_norm": True}, {"target_modules": ["qkv", "lm_head"], "bias": "all"}),
        ({"qkv_bias": True}, {"target_modules": ["qkv"], "lora_bias": True}),
    ],
    ids=["full_rank", "parameters", "bias", "lora_bias"],
)
def test_parameters_and_biases_of_lact(bases, tmp_path, fields, options, objective):
    check(bases("lact_swiglu", **fields), tmp_path, peft.LoraConfig(r=2, **options), objective=objective)


@pytest.mark.parametrize(
    "settings", [{"schedule": "snapshot", "num_generations": 2}, {"preset": "likelihood", "local_window": 8}]
)
@pytest.mark.parametrize("fields", [{}, TIED], ids=["", "tied"])
def test_adapters_on_the_head_in_every_loss(bases, tmp_path, settings, fields):
    check(
        bases("gated_deltanet", **fields),
        tmp_path,
        peft.LoraConfig(r=2, target_modules=["lm_head"]),
        objective="refine",
        **settings,
    )


def test_a_hybrid_of_transformers(bases, tmp_path):
    for i, targets in enumerate(("all-linear", ["embed_tokens", "lm_head"])):
        # Its experts and recurrent layers round differently once adapters are merged, on some processors by 1e-4 of logits that moved by 1.
        check(bases("qwen3_next"), tmp_path / str(i), peft.LoraConfig(r=2, target_modules=targets), atol=1e-3)


def test_tied_weights_are_untied_at_the_start_saying_so(bases, tmp_path):
    base = bases("delta_net", **TIED)
    config = peft.LoraConfig(r=2, target_modules=["lm_head"])
    with pytest.warns(UserWarning, match="embeddings and head share a weight, .*tie_word_embeddings=False"):
        t = trainer(load_model(base), tmp_path, config)
    t.train()
    t.save_model(str(tmp_path / "run"))
    merged, before = load_model(tmp_path / "run"), load_model(base)
    assert torch.equal(merged.get_input_embeddings().weight, before.get_input_embeddings().weight)
    assert not torch.equal(merged.get_output_embeddings().weight, before.get_output_embeddings().weight)
    assert merged.config.tie_word_embeddings is False
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer(load_model(base), tmp_path, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    # PEFT reads the folder as the same model.
    again = peft.PeftModel.from_pretrained(load_model(base), tmp_path / "run")
    torch.testing.assert_close(logits(again), logits(merged), rtol=1e-4, atol=2e-5)


def test_export_and_a_resumed_run_of_untied_weights(bases, tmp_path):
    base = bases("delta_net", **TIED)
    config = peft.LoraConfig(r=2, target_modules=["embeddings", "q_proj"])
    straight = trainer(load_model(base), tmp_path / "a", config, max_steps=3)
    straight.train()
    trainer(load_model(base), tmp_path / "b", config, max_steps=2, save_strategy="steps", save_steps=2).train()
    again = trainer(load_model(base), tmp_path / "b", config, max_steps=3, save_strategy="steps", save_steps=3)
    again.train(resume_from_checkpoint=True)
    torch.testing.assert_close(logits(again.model), logits(straight.model), rtol=1e-5, atol=1e-6)
    from refine_nsp.models.load import SHIPPED, load_tokenizer

    load_tokenizer(SHIPPED["refine-nsp/tiny-delta-net"]).save_pretrained(tmp_path / "b" / "checkpoint-3")
    export_checkpoint(tmp_path / "b" / "checkpoint-3", tmp_path / "plain")
    torch.testing.assert_close(logits(load_model(tmp_path / "plain")), logits(again.model), rtol=1e-4, atol=2e-5)


LORA = {"r": 2, "target_modules": ["q_proj"]}
CHANGING = ("pissa", "pissa_niter_4", "olora", "eva", "lora_ga")  # ways to begin that change the base, or need data


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "peft_type='IA3'"),
        (peft.LoHaConfig(target_modules=["q_proj"]), "peft_type='LOHA'"),
        (peft.VeraConfig(target_modules=["q_proj"]), "peft_type='VERA'"),
        (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9), "peft_type='ADALORA'"),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "peft_type='PROMPT_TUNING'"),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "peft_type='PREFIX_TUNING'"),
        *(
            (peft.LoraConfig(**LORA, init_lora_weights=i), f"init_lora_weights='{i}'")
            for i in ("pissa", "pissa_niter_4", "olora", "eva", "lora_ga")
        ),
        (peft.LoraConfig(**LORA, layer_replication=[(0, 2), (1, 2)]), "layer_replication="),
        (peft.LoraConfig(**LORA, alora_invocation_tokens=[1]), "alora_invocation_tokens="),
        (peft.LoraConfig(**LORA, use_qalora=True), "use_qalora=True"),
        (peft.LoraConfig(r=2, target_modules=["lm_head"], ensure_weight_tying=True), "ensure_weight_tying=True"),
        (peft.LoraConfig(**LORA, lora_bias=True), "lora_bias=True: model.layers.0.attn.q_proj has no bias"),
        (peft.LoraConfig(r=2, target_modules=["lm_head"], use_dora=True), "lm_head takes a plain LoRA adapter alone"),
        (peft.LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.1), "lm_head takes a plain LoRA adapter alone"),
        (peft.LoraConfig(r=2, target_modules=["lm_head"], trainable_token_indices=[1]), "trainable_token_indices cannot go with"),
        (peft.LoraConfig(r=2, target_modules=["q_conv1d"]), "no adapters: Target module ShortConv"),
        (peft.LoraConfig(r=2, target_modules=["attn_norm"]), "no adapters: Target module RMSNorm"),
        (peft.LoraConfig(r=2, target_modules=["q_porj"]), "no adapters: .*Its linear layers are b_proj"),
        (
            peft.LoraConfig(r=2, target_modules=["q_proj", "k_porj"]),
            "target_modules names 'k_porj', which the model does not have",
        ),
        (peft.LoraConfig(**LORA, modules_to_save=["hed"]), "modules_to_save names 'hed'"),
        (peft.LoraConfig(**LORA, target_parameters=["attn.w9"]), "w9"),
        (peft.LoraConfig(**LORA, trainable_token_indices=[10**6]), "no adapters: "),
    ],
)
def test_what_no_folder_could_be_loaded_with_is_refused_at_the_start(bases, tmp_path, config, said):
    with pytest.raises(RefineError, match=said) as error:
        trainer(load_model(bases("delta_net", **TIED)), tmp_path, config)
    assert "\n" not in str(error.value)


def test_initial_fast_weights_of_low_rank_are_refused(bases, tmp_path):
    for options in ({"target_parameters": ["w0.w_left"]}, {"modules_to_save": ["w0"]}):
        with pytest.raises(RefineError, match=r"attn\.w0 makes weights and takes no input, so PEFT cannot adapt it"):
            trainer(load_model(bases("lact_swiglu")), tmp_path, peft.LoraConfig(r=2, target_modules=["qkv"], **options))


def test_a_model_that_came_with_adapters_is_looked_at_too(bases, tmp_path):
    def wrapped(config, name="default"):
        return peft.get_peft_model(load_model(bases("delta_net", **TIED)), config, adapter_name=name)

    with pytest.raises(RefineError, match="the model has an adapter with peft_type='IA3'"):
        trainer(wrapped(peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])), tmp_path)
    with pytest.raises(RefineError, match="the model has the adapters mine; expected one, called default"):
        trainer(wrapped(peft.LoraConfig(**LORA), "mine"), tmp_path)
    two = wrapped(peft.LoraConfig(**LORA))
    two.add_adapter("second", peft.LoraConfig(**LORA))
    with pytest.raises(RefineError, match="the model has the adapters default, second"):
        trainer(two, tmp_path)
    with pytest.warns(UserWarning, match="embeddings and head share a weight"):
        t = trainer(wrapped(peft.LoraConfig(r=2, target_modules=["embeddings"])), tmp_path)
    t.train()
    t.save_model(str(tmp_path / "run"))
    torch.testing.assert_close(logits(load_model(tmp_path / "run")), logits(t.model), rtol=1e-4, atol=2e-5)
    with pytest.warns(UserWarning, match="the model has no name_or_path"):
        trainer(peft.get_peft_model(build("delta_net", dtype=torch.float32), peft.LoraConfig(**LORA)), tmp_path)
