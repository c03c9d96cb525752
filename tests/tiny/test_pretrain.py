"""Pretraining: what rows are made of, resuming, measuring, and how the model is stored."""

import json
import random
import zlib
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

import refine_nsp
from refine_nsp.commands.pretrain import COMMAND
from refine_nsp.errors import RefineError
from refine_nsp.files import read_json_lines
from refine_nsp.models.load import SHIPPED
from refine_nsp.tiny import pretrain as module
from refine_nsp.tiny.corpus import standard_library
from refine_nsp.tiny.documents import FactTokens, fact_document
from refine_nsp.tiny.families import FAMILIES
from refine_nsp.tiny.measures import recall_in
from refine_nsp.tiny.pretrain import pretrain
from refine_nsp.tiny.pretrain_settings import PretrainConfig, PretrainPhase
from refine_nsp.tiny.rows import PhaseRows, Sources, family_at, step_rows

ASSETS = Path(refine_nsp.__file__).parent / "assets"
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
EVERYTHING = dict.fromkeys(FAMILIES, 0.15)


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


def leave_curves_undrawn(monkeypatch):
    """Draw no page of curves at every validation: of all families it has dozens, and takes longer than the training."""
    monkeypatch.setattr(module, "write_curves", lambda folder: None)


@pytest.fixture
def undrawn(monkeypatch):
    leave_curves_undrawn(monkeypatch)


TINY = dict(
    vocab_size=600, hidden_size=16, num_hidden_layers=1, num_heads=1, intermediate_size=16, max_length=256,
    gradient_accumulation_steps=2, save_steps=2, logging_steps=1, eval_steps=2, warmup_steps=1, probe_lengths=[300], probes_per_kind=2,
    disable_tqdm=True,
)  # fmt: skip


def tiny(folder, shares, length=64, **settings):
    phases = [PretrainPhase(4, length, shares, 1.0, 2.0)]
    return PretrainConfig(output_dir=str(folder), phases=phases, **{**TINY, **settings})


def weights(folder):
    return refine_nsp.load(folder)[0].state_dict()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return refine_nsp.load("refine-nsp/tiny-delta-net")[1]


@pytest.fixture(scope="module")
def sources(tokenizer):
    return Sources.of(tokenizer, standard_library(held_out=True)[:2])


def rows_of_the_first_release(seed, phase, step, count, stream, tokens, recall_share):
    rng = random.Random(f"{seed}-{step}")
    rows, weights = [], []
    for _ in range(count):
        start = rng.randrange(len(stream) - phase.length)
        window = stream[start : start + phase.length]
        weight = torch.ones(phase.length)
        if rng.random() < recall_share:
            filler = stream[start : start + 4 * phase.length].tolist()
            ids, asked = fact_document(rng, tokens, filler, phase.length, phase.dense * (0.5 + 0.5 * rng.random()))
            window, weight = torch.tensor(ids), torch.where(torch.tensor(asked), phase.answer_weight, 1.0)
        rows.append(window)
        weights.append(weight)
    return torch.stack(rows), torch.stack(weights)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_rows_with_facts_alone_are_those_of_the_first_release(tokenizer, sources, share):
    phase = PretrainPhase(1, 128, {"facts": share}, 0.7, 3.0)
    for step in (0, 7):
        new = step_rows(5, step, 32, phase, sources)
        old = rows_of_the_first_release(5, phase, step, 32, sources.stream, FactTokens.of(tokenizer), share)
        assert all(torch.equal(a, b) for a, b in zip(new, old, strict=True))


def test_shares_are_shares_of_the_rows():
    phase = PretrainPhase(1, 128, {"chains": 0.2, "facts": 0.1, "needles": 0.3}, 1.0, 1.0)
    drawn = [family_at(phase, (i + 0.5) / 1000) for i in range(1000)]
    assert {name: drawn.count(name) for name in set(drawn)} == {"facts": 100, "needles": 300, "chains": 200, None: 400}
    assert drawn[:100] == ["facts"] * 100


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_weigh_more_in_every_family(sources, family):
    phase = PretrainPhase(1, 128, {family: 1.0}, 1.0, 5.0)
    ids, weights = step_rows(0, 3, 32, phase, sources)
    assert ids.shape == weights.shape == (32, 128)
    assert set(weights.unique().tolist()) == {1.0, 5.0} and (weights == 5.0).any(-1).all()


def test_rows_are_the_same_whoever_asks_for_them(tmp_path, sources):
    """In any order, and however the rows of a step are dealt out to examples; each phase has its own."""
    phases = [PretrainPhase(2, 128, {"facts": 0.5, "chains": 0.3}, 1.0, 4.0), PretrainPhase(1, 256, {}, 1.0, 1.0)]

    def rows(**dealing):
        return PhaseRows(PretrainConfig(output_dir=str(tmp_path), phases=phases, seed=3, warmup_steps=0, **dealing), sources)

    two = rows(max_length=512, gradient_accumulation_steps=2)
    one, asked = rows(max_length=1024), {i: two[i] for i in (5, 2, 0, 3, 1, 4)}
    assert len(one) == 3 and len(two) == 6
    for step, phase in enumerate([phases[0], phases[0], phases[1]]):
        ids, weights = step_rows(3, step, 1024 // phase.length, phase, sources)
        assert one[step]["input_ids"].tolist() == ids.flatten().tolist() and one[step]["lengths"] == [phase.length] * len(ids)
        parts = [asked[2 * step], asked[2 * step + 1]]
        assert torch.equal(torch.cat([p["input_ids"] for p in parts]), ids.flatten())
        assert torch.equal(torch.stack([w for p in parts for w in p["target_weights"]]), weights)


@pytest.mark.parametrize(
    ("shares", "length", "message"),
    [({"needle": 0.1}, 128, "did you mean 'needles'"), ({"facts": 0.7, "needles": 0.4}, 128, "add up to 1.1"),
     ({"facts": -0.1}, 128, "between 0 and 1"), (0.5, 128, "facts: 0.5"), ({"needles": 0.1}, 64, "need 128")],
)  # fmt: skip
def test_shares_that_cannot_be_are_refused(shares, length, message):
    with pytest.raises(RefineError, match=message):
        PretrainPhase(1, length, shares, 1.0, 1.0)


def parsed(tmp_path, settings):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    return COMMAND.call(["--config", str(tmp_path / "c.yaml")])[1][0]


def test_settings_that_cannot_be_are_refused(tmp_path):
    phase = {"steps": 2, "length": 128, "shares": {}, "dense": 1.0, "answer_weight": 1.0}
    good = parsed(tmp_path, {"phases": [phase], "warmup_steps": 1, "learning_rate": "1e-3"})
    assert good.max_steps == 2 and good.lr_scheduler_kwargs == {"lr_end": 1e-4} and good.phases == [PretrainPhase(**phase)]
    for settings, message in (
        ({"hiden_size": 3}, "did you mean 'hidden_size'"),
        ({"phases": [{**phase, "recall_share": 0.3}]}, "now shares"),
        ({"phases": [{"steps": 1}]}, "answer_weight, dense, length, shares missing"),
        ({"phases": [{**phase, "steps": "many"}]}, "phases: steps is 'many'"),
        ({"phases": [{**phase, "dense": 2}]}, "phases: dense is 2"),
        ({"phases": [phase]}, "warmup_steps=50 must be fewer than the 2 steps"),
        ({"phases": []}, "at least one step"),
        ({"max_steps": 5000}, "the phases have 1800 steps"),
        ({"max_length": 256}, "at least a row of each phase"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"model_type": "mamba"}, "gated_deltanet"),
        ({"model_type": "lact_swiglu", "num_heads": 3}, "two heads"),
        ({"store_dtype": "int8"}, "float32, bfloat16"),
    ):
        with pytest.raises(RefineError, match=message):
            parsed(tmp_path, settings)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("pretrain_*.yaml")), ids=lambda path: path.stem)
def test_recipes_describe_how_the_shipped_bases_were_made(recipe):
    """Their own settings are in another release's words."""
    _, (args,) = COMMAND.call(["--config", str(recipe), "--use_cpu"])
    base = {"delta_net": "tiny-delta-net", "gated_deltanet": "tiny-gated-deltanet", "lact_swiglu": "tiny-lact"}[args.model_type]
    made = json.loads((ASSETS / base / "pretrain_config.json").read_text())
    assert args.phases == [PretrainPhase(**phase) for phase in made.pop("phases")]
    assert args.max_length * args.gradient_accumulation_steps * args.per_device_train_batch_size == made.pop("tokens_per_step")
    assert (args.logging_steps, args.eval_steps) == (made.pop("log_steps"), made.pop("probe_steps"))
    assert {name: getattr(args, name) for name in made} == made
    # AdamW, warm-up and a linear fall to a tenth are the defaults.
    assert (args.adam_beta1, args.adam_beta2, args.lr_scheduler_type) == (0.9, 0.95, "polynomial")
    assert args.lr_scheduler_kwargs == {"lr_end": pytest.approx(args.learning_rate / 10)}


# --- training ---------------------------------------------------------------------------------------------------------


def test_resumed_equals_uninterrupted(tmp_path, library, undrawn, monkeypatch):
    whole = weights(pretrain(tiny(tmp_path / "a", EVERYTHING, 128)))
    real, steps = module.PreTrainer.training_step, []

    def cut_off(*args, **kwargs):
        if len(steps) == 6:  # in the fourth step: the checkpoint after the second is the last
            raise KeyboardInterrupt
        steps.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(module.PreTrainer, "training_step", cut_off)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny(tmp_path / "b", EVERYTHING, 128))
    monkeypatch.setattr(module.PreTrainer, "training_step", real)
    again = weights(pretrain(tiny(tmp_path / "b", EVERYTHING, 128), resume=True))
    assert same(whole, again)
    a, b = ({**r} for r in (read_json_lines(tmp_path / x / "metrics.jsonl")[-1] for x in "ab"))
    assert recall_in(a) and recall_in(a) == recall_in(b) and a["eval_loss"] == b["eval_loss"]


def test_a_step_in_several_parts_is_the_step(tmp_path, library, undrawn):
    """Whatever goes through the model together: the same rows, and what they are divided by. Weights alone are compared, at the end."""

    def trained(name: str, **settings) -> dict[str, torch.Tensor]:
        return weights(
            pretrain(tiny(tmp_path / name, EVERYTHING, 128, eval_steps=4, save_steps=4, probes_per_kind=1, **settings))
        )

    whole = trained("a", max_length=512, gradient_accumulation_steps=1)
    parts = trained("b", max_length=128, gradient_accumulation_steps=4)
    together = trained("c", gradient_accumulation_steps=1, per_device_train_batch_size=2)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(together[name], value, atol=1e-4, rtol=1e-3)


def test_the_learning_rate_rises_and_falls_to_a_tenth_and_matrices_alone_decay(tmp_path, library):
    args = tiny(tmp_path, {"facts": 0.5}, model_type="gated_deltanet", warmup_steps=2, learning_rate=0.1)
    trainer = module.trainer_of(args, ())
    trainer.train()
    rates = [r["learning_rate"] for r in read_json_lines(tmp_path / "metrics.jsonl") if "learning_rate" in r]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.055])
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in trainer.model.named_parameters()} == {
        name: 0.1 if p.ndim > 1 else 0.0 for name, p in trainer.model.named_parameters()
    }
    assert decays[id(trainer.model.model.layers[0].attn.A_log)] == 0.0


def test_curves_of_every_family(tmp_path, library):
    pretrain(tiny(tmp_path, {"facts": 0.2, "listing": 0.2, "chains": 0.2}, 128))
    measured = [r for r in read_json_lines(tmp_path / "metrics.jsonl") if "eval_loss" in r]
    names = {"facts_300", "listing_300", "listing_held_out_300", "chains_300", "chains_held_out_300"}
    assert [r["step"] for r in measured] == [2, 4, 4]  # the last time as it is stored
    for record in measured:
        assert set(recall_in(record)) == names and record["eval_loss"] > 0
        assert all(set(p) == {"greedy", "log_p", "sampled", "tokens"} for p in recall_in(record).values())
    page = (tmp_path / "curves.html").read_text()
    assert page.count("<figure") == 1 + 3 * 3 and "held out 300" in page
    # A new start keeps an earlier run apart.
    with pytest.warns(UserWarning, match="earlier-1"):
        pretrain(tiny(tmp_path, {"facts": 0.2}, 128))
    assert [r["step"] for r in read_json_lines(tmp_path / "metrics.jsonl") if "loss_ntp" in r and "loss" in r] == [1, 2, 3, 4]
    assert (tmp_path / "earlier-1" / "model.safetensors").exists()


def test_a_checkpoint_of_other_settings_is_not_resumed(tmp_path, library):
    pretrain(tiny(tmp_path, {"facts": 0.2}))
    with pytest.raises(RefineError, match=r"other settings: .*phases"):
        pretrain(tiny(tmp_path, {"facts": 0.3}), resume=True)
    with pytest.raises(RefineError, match=r"other settings: .*hidden_size"):
        pretrain(tiny(tmp_path, {"facts": 0.2}, hidden_size=32), resume=True)
    pretrain(tiny(tmp_path, {"facts": 0.2}, save_steps=1, eval_steps=1, probe_lengths=[256], store_dtype="bfloat16"), resume=True)


def test_a_checkpoint_is_a_base(tmp_path, library):
    pretrain(tiny(tmp_path, {"facts": 0.5}))
    first, last = tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"
    assert same(weights(last), weights(tmp_path)) and not same(weights(first), weights(last))
    assert "2 of 4 steps of 512 tokens" in (first / "README.md").read_text()


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
    last = read_json_lines(tmp_path / "metrics.jsonl")[-1]
    trainer = module.trainer_of(tiny(tmp_path, {"facts": 0.5}, **sizes), ())
    sums = trainer.phase.validate(model.eval(), trainer.validation_batches(trainer.eval_dataset))
    figures = {f"eval_{name}": value for name, value in trainer.phase.summarise(sums).items()}
    assert last["eval_loss"] == figures["eval_loss"] and recall_in(last) == recall_in(figures)


def test_float32_is_stored_as_it_is(tmp_path, library):
    folder = pretrain(tiny(tmp_path, {"facts": 0.5}))
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118 (not a dict)
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (not a dict)


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


def test_the_shipped_bases_are_the_files_they_were():
    sums = {
        path.relative_to(ASSETS).as_posix(): zlib.crc32(path.read_bytes()) for path in sorted(ASSETS.rglob("*")) if path.is_file()
    }
    assert sums == {
        "tiny-delta-net/README.md": 500020144,
        "tiny-delta-net/config.json": 2145965011,
        "tiny-delta-net/generation_config.json": 2675896895,
        "tiny-delta-net/model.safetensors": 3458385336,
        "tiny-delta-net/pretrain_config.json": 761379073,
        "tiny-delta-net/tokenizer.json": 1126407397,
        "tiny-delta-net/tokenizer_config.json": 1958630817,
        "tiny-gated-deltanet/README.md": 2481630455,
        "tiny-gated-deltanet/config.json": 1414578647,
        "tiny-gated-deltanet/generation_config.json": 2675896895,
        "tiny-gated-deltanet/model.safetensors": 3375261436,
        "tiny-gated-deltanet/pretrain_config.json": 1934368105,
        "tiny-gated-deltanet/tokenizer.json": 1126407397,
        "tiny-gated-deltanet/tokenizer_config.json": 1958630817,
        "tiny-lact/README.md": 1706140024,
        "tiny-lact/config.json": 2470939583,
        "tiny-lact/generation_config.json": 2675896895,
        "tiny-lact/model.safetensors": 65327392,
        "tiny-lact/pretrain_config.json": 3209276748,
        "tiny-lact/tokenizer.json": 1126407397,
        "tiny-lact/tokenizer_config.json": 1958630817,
    }


def test_a_base_is_trained_further(library, tmp_path):
    """With a learning rate of 0 it stays that base; its sizes must be those of the settings."""
    first = pretrain(tiny(tmp_path / "first", {"facts": 0.5}))
    settings = dict(start_from=str(first), seed=1)
    still = dict(learning_rate=0.0, lr_scheduler_type="constant", warmup_steps=0)
    again = pretrain(tiny(tmp_path / "still", {"facts": 0.5}, **still, **settings))
    further = pretrain(tiny(tmp_path / "further", {"facts": 0.5}, **settings))
    assert same(weights(first), weights(again)) and not same(weights(first), weights(further))
    assert f"started from `{first}`" in (further / "README.md").read_text()
    with pytest.raises(RefineError, match="of other sizes"):
        pretrain(tiny(tmp_path / "other", {"facts": 0.5}, **{**settings, "hidden_size": 32}))
