"""Pretraining: what rows are made of, resuming, measuring, and how the model is stored."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

import refine_nsp
from refine_nsp.errors import RefineError
from refine_nsp.files import read_json_lines
from refine_nsp.models.load import SHIPPED
from refine_nsp.tiny import pretrain as module
from refine_nsp.tiny.corpus import standard_library
from refine_nsp.tiny.families import FAMILIES
from refine_nsp.tiny.pretrain import Sources, family_at, pretrain, training_batch
from refine_nsp.tiny.pretrain_settings import SHARED, PretrainConfig, PretrainPhase
from refine_nsp.tiny.recall import RecallTokens, recall_document

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
EVERYTHING = dict.fromkeys(SHARED, 0.15)


@pytest.fixture(scope="module")
def texts():
    return standard_library(held_out=True)


@pytest.fixture(scope="module")
def small_tokenizer(texts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WORD_REPEATS", 200)  # seconds less, for little text
        return module.train_tokenizer(texts[1:3], 600)


@pytest.fixture
def library(monkeypatch, texts, small_tokenizer):
    """Little text, and its tokenizer made once."""
    monkeypatch.setattr(module, "standard_library", lambda held_out: texts[:1] if held_out else texts[1:3])
    monkeypatch.setattr(module, "train_tokenizer", lambda texts, vocab_size: small_tokenizer)


def tiny(folder, shares, length=64, **settings):
    sizes = dict(vocab_size=600, hidden_size=16, num_hidden_layers=1, num_heads=1, intermediate_size=16, tokens_per_step=512,
                 save_steps=2, log_steps=1, probe_steps=2, probe_lengths=[300], probes_per_kind=2)  # fmt: skip
    phases = [PretrainPhase(4, length, shares, 1.0, 2.0)]
    return PretrainConfig(output_dir=str(folder), phases=phases, **{**sizes, **settings})


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return refine_nsp.load("refine-nsp/tiny-delta-net")[1]


def sources_for(phase, tokenizer):
    return Sources.of(PretrainConfig(phases=[phase]), tokenizer, standard_library(held_out=True)[:2])


def rows_of_the_first_release(config, phase, step, stream, tokens, recall_share):
    rng = random.Random(f"{config.seed}-{step}")
    rows, weights = [], []
    for _ in range(config.tokens_per_step // phase.length):
        start = rng.randrange(len(stream) - phase.length)
        window = stream[start : start + phase.length]
        weight = torch.ones(phase.length)
        if rng.random() < recall_share:
            filler = stream[start : start + 4 * phase.length].tolist()
            ids, asked = recall_document(rng, tokens, filler, phase.length, phase.dense * (0.5 + 0.5 * rng.random()))
            window, weight = torch.tensor(ids), torch.where(torch.tensor(asked), phase.answer_weight, 1.0)
        rows.append(window)
        weights.append(weight)
    return torch.stack(rows), torch.stack(weights)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_rows_with_facts_alone_are_those_of_the_first_release(tokenizer, share):
    phase = PretrainPhase(1, 128, {"facts": share}, 0.7, 3.0)
    config, sources = PretrainConfig(), sources_for(phase, tokenizer)
    for step in (0, 7):
        new = training_batch(config, phase, step, sources)
        old = rows_of_the_first_release(config, phase, step, sources.stream, RecallTokens.of(tokenizer), share)
        assert all(torch.equal(a, b) for a, b in zip(new, old, strict=True))


def test_shares_are_shares_of_the_rows():
    phase = PretrainPhase(1, 128, {"chains": 0.2, "facts": 0.1, "needles": 0.3}, 1.0, 1.0)
    drawn = [family_at(phase, (i + 0.5) / 1000) for i in range(1000)]
    assert {name: drawn.count(name) for name in set(drawn)} == {"facts": 100, "needles": 300, "chains": 200, None: 400}
    assert drawn[:100] == ["facts"] * 100


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_weigh_more_in_every_family(tokenizer, family):
    phase = PretrainPhase(1, 128, {family: 1.0}, 1.0, 5.0)
    ids, weights = training_batch(PretrainConfig(), phase, 3, sources_for(phase, tokenizer))
    assert ids.shape == weights.shape == (32, 128)
    assert set(weights.unique().tolist()) == {1.0, 5.0} and (weights == 5.0).any(-1).all()


@pytest.mark.parametrize(
    ("shares", "length", "message"),
    [({"needle": 0.1}, 128, "did you mean 'needles'"), ({"facts": 0.7, "needles": 0.4}, 128, "add up to 1.1"),
     ({"facts": -0.1}, 128, "between 0 and 1"), (0.5, 128, "facts: 0.5"), ({"needles": 0.1}, 64, "need 128")],
)  # fmt: skip
def test_shares_that_cannot_be_are_refused(shares, length, message):
    with pytest.raises(RefineError, match=message):
        PretrainPhase(1, length, shares, 1.0, 1.0)


def test_settings_that_cannot_be_are_refused():
    phase = {"steps": 1, "length": 128, "shares": {}, "dense": 1.0, "answer_weight": 1.0}
    assert PretrainConfig.read({"phases": [phase]}).total_steps == 1
    for settings, message in (
        ({"hiden_size": 3}, "did you mean 'hidden_size'"),
        ({"phases": [{**phase, "recall_share": 0.3}]}, "now shares"),
        ({"phases": [{"steps": 1}]}, "answer_weight, dense, length, shares missing"),
        ({"store_dtype": "int8"}, "float32, bfloat16"),
    ):
        with pytest.raises(RefineError, match=message):
            PretrainConfig.read(settings)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("pretrain_*.yaml")), ids=lambda path: path.stem)
def test_recipes_can_be_read(recipe):
    config = PretrainConfig.read(yaml.safe_load(recipe.read_text()))
    assert all(p.length <= config.tokens_per_step for p in config.phases) and config.model_type in module.NEW_MODELS
    assert config.total_steps * config.tokens_per_step >= 60_000_000
    assert [p.length for p in config.phases] == sorted(p.length for p in config.phases)


# --- training ---------------------------------------------------------------------------------------------------------


def test_resumed_equals_uninterrupted(tmp_path, library, monkeypatch):
    monkeypatch.setattr(module, "write_curves", lambda folder: None)
    whole = refine_nsp.load(pretrain(tiny(tmp_path / "a", EVERYTHING, 128)))[0]
    real, steps = module.train_step, []

    def cut_off(*args):
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(1)
        return real(*args)

    monkeypatch.setattr(module, "train_step", cut_off)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny(tmp_path / "b", EVERYTHING, 128))
    monkeypatch.setattr(module, "train_step", real)
    again = refine_nsp.load(pretrain(tiny(tmp_path / "b", EVERYTHING, 128)))[0]
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    a, b = ({r["step"]: r for r in read_json_lines(tmp_path / x / "metrics.jsonl")} for x in "ab")
    assert [a[4][k] for k in ("eval_loss", "probes")] == [b[4][k] for k in ("eval_loss", "probes")]


def test_a_model_saved_on_the_way_is_gone_on_from(tmp_path, library):
    whole = refine_nsp.load(pretrain(tiny(tmp_path / "a", {"facts": 0.5})))[0]
    halfway = pretrain(tiny(tmp_path / "b", {"facts": 0.5}), stop_after=3)
    with pytest.raises(RefineError, match="at least one step"):
        pretrain(tiny(tmp_path / "c", {"facts": 0.5}), stop_after=0)
    assert "3 of 4 steps" in (halfway / "README.md").read_text()
    assert not torch.equal(refine_nsp.load(halfway)[0].lm_head.weight, whole.lm_head.weight)
    again = refine_nsp.load(pretrain(tiny(tmp_path / "b", {"facts": 0.5})))[0]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_curves_of_every_family(tmp_path, library):
    pretrain(tiny(tmp_path, {"facts": 0.2, "listing": 0.2, "chains": 0.2}, 128))
    records = read_json_lines(tmp_path / "metrics.jsonl")
    measured = [r for r in records if "probes" in r]
    names = {"facts_300", "listing_300", "listing_held_out_300", "chains_300", "chains_held_out_300"}
    assert [r["step"] for r in measured] == [2, 4]
    for record in measured:
        assert set(record["probes"]) == names and record["eval_loss"] > 0
        assert all(set(p) == {"greedy", "log_p", "sampled", "tokens"} for p in record["probes"].values())
    page = (tmp_path / "curves.html").read_text()
    assert page.count("<figure") == 1 + 3 * 3 and "held out 300" in page
    # A new start keeps nothing of an earlier run.
    pretrain(tiny(tmp_path, {"facts": 0.2}, 128), resume=False)
    assert [r["step"] for r in read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 4]


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(tmp_path, library):
    pretrain(tiny(tmp_path, {"facts": 0.2}))
    with pytest.raises(RefineError, match=r"other settings \(hidden_size, phases\).*--restart"):
        pretrain(tiny(tmp_path, {"facts": 0.3}, hidden_size=32))
    pretrain(tiny(tmp_path, {"facts": 0.2}, save_steps=1))
    pretrain(tiny(tmp_path, {"facts": 0.3}, hidden_size=32), resume=False)


# --- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", module.NEW_MODELS)
def test_weights_stored_as_bfloat16_load_as_float32(tmp_path, library, model_type):
    sizes = dict(model_type=model_type, num_heads=2, hidden_size=32)
    folder = pretrain(tiny(tmp_path, {"facts": 0.5}, store_dtype="bfloat16", **sizes))
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    model, _ = refine_nsp.load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and model.config.dtype == torch.float32
    for name, weight in model.named_parameters():
        assert torch.equal(weight, stored[name].float())
    assert model.lm_head.weight is model.model.embeddings.weight
    assert {p.dtype for p in refine_nsp.load(folder, dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}
    # The last figures are those of the stored weights.
    config = tiny(tmp_path, {"facts": 0.5}, store_dtype="bfloat16", **sizes)
    held_out = module.standard_library(held_out=True)
    tokenizer = refine_nsp.load(folder)[1]
    measures = module.Measures.of(config, tokenizer, held_out, module.encode_texts(tokenizer, held_out))
    assert read_json_lines(tmp_path / "metrics.jsonl")[-1]["eval_loss"] == measures.take(model)["eval_loss"]


def test_float32_is_stored_as_it_is(tmp_path, library):
    folder = pretrain(tiny(tmp_path, {"facts": 0.5}))
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118 (not a dict)
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (not a dict)
    assert json.loads((folder / "pretrain_config.json").read_text())["phases"][0]["shares"] == {"facts": 0.5}


def test_the_card_says_what_was_trained_and_measured(tmp_path, library):
    folder = pretrain(tiny(tmp_path, {"facts": 0.2, "needles": 0.3}, 128, bf16=True))
    card, last = (folder / "README.md").read_text(), read_json_lines(tmp_path / "metrics.jsonl")[-1]
    assert "4 of 4 steps of 512 tokens" in card and "bfloat16 products" in card and "Overlap with RULER" in card
    assert f"cross-entropy {last['eval_loss']:.2f} nats" in card and "needles, held-out wordings" in card
    assert "| 4 | 128 | 2 | 20 | 30 |" in card and "listing" not in card


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_names_load_as_float32_unless_told_otherwise(name):
    assert {p.dtype for p in refine_nsp.load(name)[0].parameters()} == {torch.float32}
    assert {p.dtype for p in refine_nsp.load(name, dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}


def test_unknown_models_are_refused(tmp_path):
    with pytest.raises(RefineError, match="gated_deltanet"):
        pretrain(replace(tiny(tmp_path, {}), model_type="mamba"))


def test_a_base_is_gone_on_from(library, tmp_path):
    """With nothing to do but measure it is that base; its sizes must be those of the settings."""
    first = pretrain(tiny(tmp_path / "first", {"facts": 0.5}))
    settings = dict(start_from=str(first), seed=1)
    again = pretrain(tiny(tmp_path / "still", {"facts": 0.5}, learning_rate=0.0, **settings))
    further = pretrain(tiny(tmp_path / "further", {"facts": 0.5}, **settings))
    weights = [refine_nsp.load(folder)[0].state_dict() for folder in (first, again, further)]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    assert not all(torch.equal(weights[2][name], value) for name, value in weights[0].items())
    assert f"going on from `{first}`" in (further / "README.md").read_text()
    with pytest.raises(RefineError, match="of other sizes"):
        pretrain(tiny(tmp_path / "other", {"facts": 0.5}, **{**settings, "hidden_size": 32}))
