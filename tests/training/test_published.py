"""`published` in the phases: test time in steps of four prompts with weight decay, answers without EOS, rollouts before inner steps."""

import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from refine_nsp.cli import main
from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.models.load import load_tokenizer
from refine_nsp.nsp.records import Batch
from refine_nsp.nsp.selection import count_positions
from refine_nsp.training import PostTrainer, PostTrainingConfig, ReFINEConfig, TestTimeConfig, TestTimeTrainer, answers
from refine_nsp.training.phases import MicroBatch, NextSequence
from tests.models.families import build

SHORT = {"min_prefix": 5, "positions_per_sequence": 2, "rollout_length": 3}
EOS = 0


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("refine-nsp/tiny-delta-net")


def prompts(n: int = 6) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randint(0, 64, (30 + 3 * i,), generator=g) for i in range(n)]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def assert_same_weights(model, expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    for name, value in weights(model).items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


# --- test time --------------------------------------------------------------------------------------------------------
def test_test_time_takes_a_step_for_every_four_prompts_and_keeps_what_it_learned():
    nsp = NSPConfig.preset("test_time", published=True, **SHORT)
    model = build("delta_net").eval()
    ttt = TestTimeTrainer(model, TestTimeConfig(learning_rate=1e-2, nsp=nsp))
    assert (ttt.config.scope, ttt.config.weight_decay, ttt.config.max_grad_norm) == ("never", 0.01, 1.0)

    by_hand = build("delta_net").eval()
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, weight_decay=0.01)
    phase = NextSequence(replace(nsp, schedule="snapshot"))
    for _ in range(2):  # two batches of six, one after the other
        losses = []
        with ttt.adapt(prompts()):
            pass
        batches = []
        for part in (prompts()[:4], prompts()[4:]):
            ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
            generators = [torch.Generator().manual_seed(0) for _ in part]
            batches.append(MicroBatch(Batch.of(ids, torch.tensor([len(p) for p in part])), generators))
        phase.prepare(by_hand, batches)  # all rollouts by the policy before the first step
        for batch in batches:
            batch.totals = phase.count(batch)
            loss, _ = phase.loss(by_hand, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert ttt.last.losses == pytest.approx(losses, rel=1e-9)
        assert_same_weights(model, weights(by_hand), rtol=1e-9, atol=1e-12)


def test_test_time_by_the_cross_entropy_alone_is_one_step_and_other_choices_stand():
    model, nsp = build("delta_net").eval(), NSPConfig.preset("test_time", published=True, **SHORT)
    before = weights(model)
    ttt = TestTimeTrainer(model, TestTimeConfig(objective="ntp", scope="batch", weight_decay=0.2, learning_rate=1e-2, nsp=nsp))
    assert (ttt.config.scope, ttt.config.weight_decay) == ("batch", 0.2)
    with ttt.adapt(prompts()):
        assert len(ttt.last.losses) == 1
    assert_same_weights(model, before, rtol=0, atol=0)
    ours = TestTimeConfig()
    assert (ours.scope, ours.weight_decay, ours.nsp.published) == ("example", 0.0, False)
    assert replace(ours, objective="ntp").scope == "example"


def test_evaluation_and_ttt_take_it_as_a_flag():
    from refine_nsp.commands.grammar import Command
    from refine_nsp.commands.shared import TEST_TIME, test_time_trainer

    flags = ["--ttt", "refine", "--ttt_published", "true"]
    _, (given, test_time) = Command("", TEST_TIME).call(flags)
    assert (test_time.scope, test_time.weight_decay, test_time.nsp.published) == ("never", 0.01, True)
    trainer, together = test_time_trainer(build("delta_net"), given, test_time)
    assert trainer is not None and together == 8
    _, (given, test_time) = Command("", TEST_TIME).call(flags[:2])
    assert (test_time.scope, test_time.weight_decay) == ("example", 0.0)
    _, (_, test_time) = Command("", TEST_TIME).call([*flags, "--ttt_scope", "batch", "--ttt_weight_decay", "0"])
    assert (test_time.scope, test_time.weight_decay) == ("batch", 0.0)


# --- post-training ----------------------------------------------------------------------------------------------------
def rows(n: int = 4, end: tuple[int, ...] = (EOS,)) -> Dataset:
    """Prompts with answers of four tokens, and one of EOS in the middle, each with `end` behind it."""
    g = torch.Generator().manual_seed(0)
    draw = lambda k: torch.randint(1, 64, (k,), generator=g).tolist()  # noqa: E731
    return Dataset.from_list(
        [
            {"prompt_ids": draw(30 + 3 * i), "answers_ids": [[*draw(2), EOS, *draw(1), *end]], "references": ["a"]}
            for i in range(n)
        ]
    )


def post_trainer(folder, data, tokenizer, **settings) -> PostTrainer:
    args = PostTrainingConfig(
        **{
            "output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "max_length": 96,
            "train_sampling_strategy": "sequential", **SHORT, **settings,
        }
    )  # fmt: skip
    return PostTrainer(model=build("delta_net", vocab_size=2048), args=args, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("objective", ["none", "refine"])
def test_answers_are_learned_without_eos(tmp_path, tokenizer, objective):
    assert tokenizer.eos_token_id == EOS
    published, without, ours = (
        post_trainer(tmp_path / str(i), rows(end=end), tokenizer, objective=objective, published=flag)
        for i, (flag, end) in enumerate([(True, (EOS,)), (True, ()), (False, (EOS,))])
    )
    for trainer in (published, without, ours):
        trainer.train()
    assert_same_weights(published.model, weights(without.model), rtol=0, atol=0)
    assert not torch.equal(published.model.lm_head.weight, ours.model.lm_head.weight)
    counted = published.phase.validate(published.model, [published.data_collator(list(rows()))])
    assert counted["targets"] == 4 * 4


def test_an_answer_that_is_eos_alone_stays_and_own_collators_too(tmp_path, tokenizer):
    for answer, left in (([5, EOS], [5]), ([5, EOS, 7], [5, EOS, 7]), ([EOS], [EOS]), ([5], [5]), ([], [])):
        assert answers.without_end(answer, EOS) == left and answers.without_end(answer, None) == answer
    trainer = post_trainer(tmp_path, rows(), tokenizer)
    assert trainer.data_collator is answers.collate_answers
    with pytest.raises(RefineError, match="published=True learns answers without EOS: give the trainer its tokenizer"):
        post_trainer(tmp_path, rows(), None, published=True)


@pytest.mark.parametrize("published", [False, True])
def test_rollouts_of_a_batch_are_made_before_its_inner_steps(tmp_path, tokenizer, monkeypatch, published):
    trainer = post_trainer(tmp_path, rows(), tokenizer, published=published, inner_steps=2)
    assert trainer.nsp.schedule == ("snapshot" if published else "fused")
    done = []
    for name in ("prepare", "update"):
        make = getattr(trainer, name)
        monkeypatch.setattr(trainer, name, lambda phase, batches, *rest, name=name, make=make: (
            done.append((name, len(batches))) if phase is trainer.inner else None, make(phase, batches, *rest)))  # fmt: skip
    trainer.train()
    one, both = [("prepare", 1), ("update", 1)], [("prepare", 2), ("update", 1), ("update", 1)]
    assert done == (both if published else [*one, *one])


# --- the whole way ----------------------------------------------------------------------------------------------------
def test_a_preset_and_published_in_yaml_are_a_run(tmp_path, monkeypatch):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": "one two three four " * 6}) + "\n" for _ in range(8)))
    (tmp_path / "run.yaml").write_text(
        "preset: mid_training\npublished: true\nmax_steps: 1\nreport_to: none\nvalidation_fraction: 0\n"
    )
    out = tmp_path / "run"
    main(["midtrain", "--config", str(tmp_path / "run.yaml"), "--dataset_name", str(tmp_path / "text.jsonl"), "--output_dir", str(out),
          "--use_cpu", "true", "--disable_tqdm", "true"])  # fmt: skip
    assert "published: true" in (out / "config.yaml").read_text()
    assert "| published | " in (out / "README.md").read_text()


def test_a_run_keeps_texts_that_ours_leaves_out():
    args = ReFINEConfig(preset="mid_training", published=True)
    lengths = torch.tensor([20, 21, 25, 26])
    assert args.nsp.shortest == 21 and count_positions(lengths, args.nsp).tolist() == [0, 8, 8, 8]
    assert count_positions(lengths, NSPConfig.preset("mid_training")).tolist() == [0, 0, 0, 1]
