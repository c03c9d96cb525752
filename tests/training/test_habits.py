"""What people do with models of transformers, done with ours: TRL, PEFT, pipelines, torch.compile, streamed data, rewards of one's own."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import pipeline

from refine_nsp import (
    NSPConfig,
    PostTrainer,
    PostTrainingConfig,
    ReFINEConfig,
    ReFINETrainer,
    TestTimeConfig,
    TestTimeTrainer,
    load,
)
from refine_nsp.models.load import SHIPPED

NAMES = list(SHIPPED)
TEXTS = [f"def f{i}(x):\n    return x + {i}\n\nThe value of key {i} is {7 * i}.\n" * 6 for i in range(8)]
QUIET = dict(report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, max_steps=2, learning_rate=1e-3)
SHORT = dict(positions_per_sequence=2, rollout_length=2, min_prefix=8)


@pytest.fixture(scope="module")
def loaded():
    return {name: load(name) for name in NAMES}


def rows(tokenizer) -> Dataset:
    return Dataset.from_list([{"input_ids": tokenizer(t)["input_ids"][:160]} for t in TEXTS])


def weights(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_generates_what_generate_does(loaded, name):
    model, tokenizer = loaded[name]
    made = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    texts = made(["def add(a, b):", "import os\nimport"], batch_size=2, return_full_text=False, **options)
    for prompt, found in zip(["def add(a, b):", "import os\nimport"], texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected = model.generate(ids, **options)[0, ids.shape[1] :]
        assert found[0]["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("name", NAMES)
def test_trl_fine_tunes_our_models(tmp_path, name):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    model, tokenizer = load(name)
    before = weights(model)
    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_length=96, per_device_train_batch_size=2, logging_steps=1, bf16=False, **QUIET
    )
    data = Dataset.from_list([{"prompt": t[:60], "completion": t[60:120]} for t in TEXTS])
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 2 and all(0 < x < 20 for x in losses)
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[1:])])
def test_a_compiled_model_computes_the_same(loaded, name):
    """With the graphs alone (`aot_eager`): code for this machine would take minutes to make."""
    model, tokenizer = loaded[name]
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"][:96]])
    compiled = torch.compile(model.eval(), backend="aot_eager")
    found, plain = compiled(ids, labels=ids), model(ids, labels=ids)
    torch.testing.assert_close(found.logits, plain.logits, rtol=1e-4, atol=1e-4)
    found.loss.backward()
    gradient = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    for k, p in model.named_parameters():
        torch.testing.assert_close(gradient[k], p.grad, rtol=1e-3, atol=1e-5, msg=k)
    model.zero_grad()


def adapters(model):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    names = ["qkv", "o_proj"] if model.config.model_type == "lact_swiglu" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, target_modules=names))


def trained(phase: str, model, tokenizer, folder) -> None:
    """Two steps of a phase on adapters alone."""
    if phase == "mid-training":
        args = ReFINEConfig(output_dir=str(folder), per_device_train_batch_size=2, max_length=160, **SHORT, **QUIET)
        trainer = ReFINETrainer(model=model, args=args, train_dataset=rows(tokenizer), processing_class=tokenizer)
    else:
        ids = [r["input_ids"] for r in rows(tokenizer)]
        data = [{"prompt_ids": i[:100], "answers_ids": [i[100:104]], "references": [tokenizer.decode(i[100:104])]} for i in ids]
        args = PostTrainingConfig(output_dir=str(folder), per_device_train_batch_size=2, max_length=160, **SHORT, **QUIET)
        trainer = PostTrainer(model=model, args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(folder / "saved"))


@pytest.mark.parametrize("phase", ["mid-training", "post-training"])
@pytest.mark.parametrize("name", NAMES)
def test_adapters_are_trained_saved_loaded_and_merged(tmp_path, name, phase):
    model, tokenizer = load(name)
    base, ids = weights(model), torch.tensor([tokenizer(TEXTS[1])["input_ids"][:64]])
    wrapped = adapters(model)
    trained(phase, wrapped, tokenizer, tmp_path)
    from peft import PeftModel

    again = PeftModel.from_pretrained(load(name)[0], tmp_path / "saved")
    found = again(ids).logits
    torch.testing.assert_close(found, wrapped.eval()(ids).logits)
    assert not torch.equal(found, load(name)[0](ids).logits)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, found, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(load(tmp_path / "merged")[0](ids).logits, found, rtol=1e-4, atol=1e-4)
    frozen = {k.replace(".base_layer", "").removeprefix("base_model.model."): v for k, v in wrapped.state_dict().items()}
    assert all(torch.equal(frozen[k], v) for k, v in base.items() if k in frozen)


def test_test_time_training_of_a_model_with_adapters_restores_it():
    model, tokenizer = load(NAMES[0])
    wrapped = adapters(model)
    before = weights(wrapped)
    trainer = TestTimeTrainer(wrapped, TestTimeConfig(objective="ntp", learning_rate=1e-2))
    with trainer.adapt(tokenizer(TEXTS[2])["input_ids"]):
        assert any(not torch.equal(v, before[k]) for k, v in wrapped.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in wrapped.state_dict().items())


def test_streamed_data_and_a_reward_of_ones_own(tmp_path):
    model, tokenizer = load(NAMES[0])
    seen = []

    def digits(*, completion_ids, truth_ids, **_):
        seen.append(completion_ids.shape)
        return (completion_ids == truth_ids).float().mean(-1)

    def documents():
        yield from ({"input_ids": r["input_ids"]} for r in rows(tokenizer))

    args = ReFINEConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_length=160, logging_steps=1,
        nsp=NSPConfig(reward=digits, num_generations=2, **SHORT), **QUIET,
    )  # fmt: skip
    trainer = ReFINETrainer(
        model=model, args=args, train_dataset=IterableDataset.from_generator(documents), processing_class=tokenizer
    )
    trainer.train()
    assert seen and all(s[-1] == 2 for s in seen) and any("reward_digits" in log for log in trainer.state.log_history)
