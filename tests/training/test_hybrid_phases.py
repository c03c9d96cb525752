"""All three phases, evaluation and test time on a model of transformers: nothing above models/ knows that it is one."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from refine_nsp.config import NSPConfig
from refine_nsp.evaluation.documents import continuation_match, score_document
from refine_nsp.training import ReFINEConfig, ReFINETrainer
from refine_nsp.training.test_time import TestTimeConfig, TestTimeTrainer, chosen_parameters
from tests.models.transformers_models import NAMES as ALL
from tests.models.transformers_models import plain, stateful
from tests.training import test_nested, test_trainer

QUICK = ["qwen3_next", "bamba", "llama"]
NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in ALL if name not in QUICK)]
SHORT = {"min_prefix": 4, "positions_per_sequence": 2, "rollout_length": 3}
FAR = {"local_window": 6}  # for context scores of rows this short


def midtrain(folder, name, **settings) -> ReFINETrainer:
    args = ReFINEConfig(
        output_dir=str(folder), per_device_train_batch_size=2, learning_rate=1e-2, report_to="none", use_cpu=True, logging_steps=1,
        disable_tqdm=True, max_length=64, **SHORT, **{"max_steps": 2, "save_strategy": "no", **settings},
    )  # fmt: skip
    model = stateful(name, dtype=torch.float32)
    return ReFINETrainer(model=model, args=args, train_dataset=test_trainer.data(8), eval_dataset=test_trainer.data(2))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [{"preset": "context", "num_generations": 2, **FAR}, {"preset": "expected", **FAR}])
def test_midtraining_and_what_it_saves(tmp_path, name, settings):
    t = midtrain(tmp_path, name, **settings)
    before = {k: x.clone() for k, x in t.model.state_dict().items()}
    t.train()
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in t.state.log_history if "loss" in log)
    assert any(not torch.equal(x, before[k]) for k, x in t.model.state_dict().items())
    assert 0 <= t.evaluate()["eval_accuracy"] <= 1
    t.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again) is type(plain(name)) and all(
        torch.equal(x, again.state_dict()[k]) for k, x in t.model.state_dict().items()
    )


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    t = midtrain(tmp_path, "qwen3_next", max_steps=3, save_strategy="steps", save_steps=1, num_generations=2)
    t.train()
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()  # as if the last save had been cut off
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    again = midtrain(tmp_path, "qwen3_next", max_steps=3, num_generations=2)
    again.train(resume_from_checkpoint=True)
    for k, x in t.model.state_dict().items():
        torch.testing.assert_close(x, again.model.state_dict()[k], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_nested_post_training(tmp_path, name):
    model = stateful(name, dtype=torch.float32)
    t = test_nested.trainer(tmp_path, model, test_nested.data(4), max_steps=1)
    before = {k: x.clone() for k, x in model.state_dict().items()}
    t.train()
    logs = [log for log in t.state.log_history if "loss" in log]
    assert logs and all(torch.isfinite(torch.tensor(log["loss"])) for log in logs)
    assert any(not torch.equal(x, before[k]) for k, x in model.state_dict().items()) and json.dumps(logs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parameters", ["all", "fast_weights", "lora"])
@pytest.mark.parametrize("preset", ["test_time", "expected"])
def test_at_test_time_it_changes_inside_and_every_bit_is_back_outside(name, parameters, preset):
    model, ids = stateful(name, dtype=torch.float32), torch.randint(0, 64, (40,), generator=torch.Generator().manual_seed(0))
    before = {k: x.clone() for k, x in model.state_dict().items()}
    reads = model(ids[None]).logits
    nsp = NSPConfig.preset(preset, **SHORT, **(FAR if preset == "expected" else {}))
    ttt = TestTimeTrainer(model, TestTimeConfig(nsp=nsp, parameters=parameters, learning_rate=1e-2))
    with ttt.adapt(ids):
        assert (model(ids[None]).logits - reads).abs().max() > 1e-6
        assert model.generate(ids[None], max_new_tokens=2, do_sample=False, pad_token_id=0).shape[1] == 42
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())


def test_fast_weights_are_the_recurrent_layers_or_attention_where_there_are_none():
    for name, has, has_not in (
        ("qwen3_next", "linear_attn.in_proj_qkvz", "self_attn"),
        ("bamba", "mamba.in_proj", "self_attn"),
        ("llama", "self_attn.k_proj", "mlp"),
    ):
        model = stateful(name)
        chosen = {id(p) for p in chosen_parameters(model, "fast_weights")}
        names = [n for n, p in model.named_parameters() if id(p) in chosen]
        assert any(has in n for n in names) and not any(has_not in n or "o_proj" in n or "out_proj" in n for n in names)


def test_prompts_side_by_side_are_adapted_as_alone():
    model = stateful("qwen3_next", dtype=torch.float32)
    prompts = [torch.randint(0, 64, (n,), generator=torch.Generator().manual_seed(n)) for n in (40, 31)]
    settings = TestTimeConfig(nsp=NSPConfig.preset("test_time", **SHORT), parameters="lora", learning_rate=1e-2)
    read = torch.stack([p[:20] for p in prompts])
    with TestTimeTrainer(model, settings).adapt(prompts):
        together = model(read).logits
    for b, prompt in enumerate(prompts):
        with TestTimeTrainer(model, settings).adapt(prompt):
            torch.testing.assert_close(model(read[b : b + 1]).logits[0], together[b], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_documents_are_read_block_by_block(name, monkeypatch):
    monkeypatch.setattr("refine_nsp.evaluation.documents.BLOCK", 16)
    model, original = stateful(name, dtype=torch.float32), plain(name, dtype=torch.float32)
    ids = torch.randint(0, 64, (50,), generator=torch.Generator().manual_seed(0))
    score = score_document(model, ids.tolist(), None, 50)
    loss = original(ids[None], labels=ids[None]).loss
    assert score.figures["loss"] == pytest.approx(loss.item(), rel=1e-4)
    match = continuation_match(model, ids.tolist(), NSPConfig(**SHORT), seed=0)
    assert all(-1 <= value <= 1 for value in match.values())
