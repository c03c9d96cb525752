"""What people do with models of transformers, done with ours: TRL, PEFT, pipelines, torch.compile, streamed data, rewards of one's own."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, pipeline

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
from refine_nsp.errors import RefineError
from refine_nsp.models.load import SHIPPED
from refine_nsp.training.data import cut_windows
from tests.models.families import build

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
    assert len(losses) == 2
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_trls_loss_is_our_cross_entropy(tmp_path, name):
    """The same rows, all of them in each step: so the second loss shows the same gradient too."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    model, tokenizer = load(name)
    data = rows(tokenizer).select(range(4))
    same = dict(
        per_device_train_batch_size=4, max_length=160, logging_steps=1, weight_decay=0.0, lr_scheduler_type="constant", **QUIET
    )
    theirs = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path), bf16=False, **same),
        train_dataset=data,
        processing_class=tokenizer,
    )
    args = ReFINEConfig(output_dir=str(tmp_path), objective="ntp", **same)
    ours = ReFINETrainer(model=load(name)[0], args=args, train_dataset=data, processing_class=tokenizer)
    found, expected = ([log["loss"] for log in logs_of(trainer) if "loss" in log] for trainer in (theirs, ours))
    assert len(found) == 2 and found[1] < found[0]
    assert found == pytest.approx(expected, rel=1e-4)


def logs_of(trainer) -> list[dict]:
    trainer.train()
    return trainer.state.log_history


def test_a_model_by_name_text_rewards_and_adapters_are_given_as_to_trl(tmp_path):
    """Each is the same run as in our own words."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")

    def ends(*, completion_ids, truth_ids, **_):
        return (completion_ids[:, -1] == truth_ids[:, -1]).float()

    def settings(**more):
        nsp = dict(num_generations=2, **SHORT)
        return ReFINEConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=2, max_length=160, logging_steps=1, **nsp, **QUIET, **more
        )

    model, tokenizer = load(NAMES[0])
    lora = dict(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    args, plain = settings(), settings(reward_funcs=ends)  # before a trainer: accelerate begins anew with each
    torch.manual_seed(0)
    theirs = ReFINETrainer(
        model=NAMES[0], args=args, train_dataset=Dataset.from_dict({"text": TEXTS}), reward_funcs=[ends],
        peft_config=peft.LoraConfig(**lora),
    )  # fmt: skip
    found = next(log for log in logs_of(theirs) if "loss" in log)
    torch.manual_seed(plain.seed)
    ours = ReFINETrainer(
        model=peft.get_peft_model(model, peft.LoraConfig(**lora)), args=plain, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": [w for t in TEXTS for w in cut_windows(tokenizer(t)["input_ids"], 160, 11)]}),
    )  # fmt: skip
    expected = next(log for log in logs_of(ours) if "loss" in log)
    assert found["loss"] == expected["loss"] and found["reward_ends"] == expected["reward_ends"] and "reward_cosine" not in found
    assert args.nsp.rewards != plain.nsp.rewards and theirs.processing_class.get_vocab() == tokenizer.get_vocab()


def test_what_a_trainer_does_not_take_is_refused_with_the_way_that_there_is(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model, tokenizer = load(NAMES[0])
    args = ReFINEConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, max_length=160, **SHORT, **QUIET)
    text, chat = Dataset.from_dict({"text": TEXTS}), Dataset.from_dict({"messages": TEXTS})
    lora = peft.LoraConfig(target_modules=["q_proj"])

    def asks(*, completions, **_):
        return completions

    for given, said in (
        (dict(train_dataset=text), "give the tokenizer as processing_class"),
        (dict(train_dataset=chat), "need a column input_ids, there are messages"),
        (dict(train_dataset=text, processing_class=tokenizer, reward_funcs=asks), "asks for 'completions'"),
        (dict(train_dataset=text, reward_funcs="no_such"), "no reward 'no_such'"),
        (dict(model="refine-nsp/tiny-delta", train_dataset=text), "did you mean 'refine-nsp/tiny-delta-net'"),
        (dict(train_dataset=text, peft_config={"r": 2}), "peft_config must be PEFT's"),
        (dict(train_dataset=text, model=adapters(load(NAMES[0])[0]), peft_config=lora), "load_adapter"),
    ):
        with pytest.raises(RefineError, match=said):
            ReFINETrainer(**{"model": model, "args": args, **given}).train()
    nested = PostTrainingConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, **SHORT, **QUIET)
    with pytest.raises(RefineError, match="prepare_answers makes them"):
        PostTrainer(model=NAMES[0], args=nested, train_dataset=text).train()


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_adapters_of_either_kind_of_peft_are_trained(tmp_path, task_type):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    args = ReFINEConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, max_length=160, **SHORT, **QUIET)
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type=task_type)
    trainer = ReFINETrainer(model=NAMES[0], args=args, train_dataset=Dataset.from_dict({"text": TEXTS}), peft_config=lora)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    ids = torch.tensor([trainer.processing_class(TEXTS[1])["input_ids"][:64]])
    torch.testing.assert_close(load(tmp_path / "saved")[0](ids).logits, trainer.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ntp", "refine", "closed form"])
def test_training_under_torch_compile_is_the_same_run(tmp_path, objective):
    """With the graphs alone, as above; a sampled token may turn by a rounding, so the model is in float64."""
    found = []
    torch._dynamo.reset()
    for compiled in (False, True):
        method = dict(objective="ntp") if objective == "ntp" else dict(preset="expected" if objective == "closed form" else None)
        more = dict(torch_compile=True, torch_compile_backend="aot_eager") if compiled else {}
        args = ReFINEConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_length=64,
            logging_steps=1,
            **method,
            **SHORT,
            **QUIET,
            **more,
        )
        ids = torch.randint(0, 64, (8, 40), generator=torch.Generator().manual_seed(0)).tolist()
        trainer = ReFINETrainer(model=build("delta_net"), args=args, train_dataset=Dataset.from_dict({"input_ids": ids}))
        found.append([log["loss"] for log in logs_of(trainer) if "loss" in log])
        assert trainer.is_in_train is False and bool(args.torch_compile) == compiled
    assert len(found[0]) == 2 and found[0][0] != found[0][1]
    assert found[1] == pytest.approx(found[0], rel=1e-8)


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[1:])])
def test_a_compiled_model_computes_the_same(loaded, name):
    """With the graphs alone (`aot_eager`): code for this machine would take minutes to make. Of two layers, each of which is compiled."""
    shipped, tokenizer = loaded[name]
    model = type(shipped)(AutoConfig.from_pretrained(SHIPPED[name], num_hidden_layers=2))
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
        nsp=NSPConfig(reward_funcs=digits, num_generations=2, **SHORT), **QUIET,
    )  # fmt: skip
    trainer = ReFINETrainer(
        model=model, args=args, train_dataset=IterableDataset.from_generator(documents), processing_class=tokenizer
    )
    trainer.train()
    assert seen and all(s[-1] == 2 for s in seen) and any("reward_digits" in log for log in trainer.state.log_history)
