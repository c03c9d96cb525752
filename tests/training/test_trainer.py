"""The trainer: accumulation, resuming, several steps per rollout batch, validation, and every way a run can go wrong."""

import functools
import json
import math
import os
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from refine_nsp.errors import RefineError
from refine_nsp.training import ReFINEConfig, ReFINETrainer
from refine_nsp.training.run_folder import RunFolder
from tests.models.families import FAMILY_NAMES, build
from tests.models.transformers_models import stateful


@functools.cache
def data(rows: int = 16, length: int = 60, mixed: bool = True) -> Dataset:
    g = torch.Generator().manual_seed(0)
    sizes = [length - 7 * (i % 3) if mixed else length for i in range(rows)]
    return Dataset.from_list([{"input_ids": torch.randint(0, 64, (n,), generator=g).tolist()} for n in sizes])


def trainer(folder, family: str = "delta_net", dtype=torch.float64, **settings) -> ReFINETrainer:
    defaults = dict(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
        use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True, max_length=64, min_prefix=5,
        positions_per_sequence=2, rollout_length=3, reward_funcs="hybrid",
    )  # fmt: skip
    extra = {
        k: settings.pop(k)
        for k in ("eval_dataset", "train_dataset", "reference_model", "callbacks", "phase", "model", "optimizers")
        if k in settings
    }
    extra.setdefault("train_dataset", data())
    if "model" not in extra:
        extra["model"] = (build if family in FAMILY_NAMES else stateful)(family, dtype=dtype)
    return ReFINETrainer(args=ReFINEConfig(**{**defaults, **settings}), **extra)


def test_weights_too_coarse_for_the_learning_rate_are_said(tmp_path):
    coarse = dict(dtype=torch.bfloat16, bf16=True, objective="ntp")
    with pytest.warns(UserWarning, match="trained weights are in bfloat16, .*round"):
        trainer(tmp_path, learning_rate=1e-6, **coarse)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer(tmp_path, learning_rate=1.0, **coarse)
        trainer(tmp_path, learning_rate=1e-6, **{**coarse, "dtype": torch.float32})


def weights(t: ReFINETrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in t.model.named_parameters()}


def assert_close(a: dict, b: dict, atol: float = 1e-9) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("settings", [
    {"objective": "ntp"},
    {"schedule": "snapshot", "num_generations": 2, "advantage_scale": "global", "baseline": "leave_one_out"},
    {"preset": "context", "local_window": 8},
    {"schedule": "reprefill"},
    {"schedule": "fused"},
    {"preset": "expected", "reward_funcs": "prefix_match", "local_window": 8},
])  # fmt: skip
def test_one_batch_of_8_equals_8_batches_of_1(tmp_path, settings):
    settings = {**settings, "max_steps": 2}
    big = trainer(tmp_path / "a", per_device_train_batch_size=8, **settings)
    small = trainer(tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=8, **settings)
    big.train()
    small.train()
    assert_close(weights(big), weights(small))
    a, b = (t.state.log_history[0] for t in (big, small))
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    assert a["loss_ntp"] == pytest.approx(b["loss_ntp"], rel=1e-6)


@pytest.mark.parametrize("settings", [
    {"objective": "ntp"},
    {"schedule": "snapshot", "num_generations": 2, "advantage_scale": "global", "baseline": "leave_one_out"},
    {"preset": "expected", "reward_funcs": "prefix_match", "local_window": 8, "gradient_checkpointing": True},
])  # fmt: skip
def test_a_run_by_segments_is_the_run_in_one_piece(tmp_path, settings):
    """Also micro-batch by micro-batch, and with blocks that are computed again inside the segments."""
    settings = {**settings, "max_steps": 2}
    whole = trainer(tmp_path / "a", per_device_train_batch_size=8, **{**settings, "gradient_checkpointing": False})
    parts = trainer(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4, segment_tokens=17, **settings)
    whole.train()
    parts.train()
    assert_close(weights(whole), weights(parts))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_ntp_objective_is_plain_cross_entropy(tmp_path, family):
    t = trainer(tmp_path, family, objective="ntp", max_steps=1, train_dataset=data(4, mixed=False))
    reference = build(family).train()
    ids = torch.tensor([t.train_dataset[i]["input_ids"] for i in range(4)])
    loss = reference(ids, labels=ids).loss
    t.train()
    assert t.state.log_history[0]["loss"] == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize("settings", [
    {"steps_per_generation": 1},
    {"steps_per_generation": 1, "schedule": "fused"},
    {"steps_per_generation": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
])  # fmt: skip
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, settings):
    straight = trainer(tmp_path / "a", max_steps=6, **settings)
    straight.train()
    first = trainer(tmp_path / "b", max_steps=6, save_strategy="steps", save_steps=2, **settings)
    first.train()
    (tmp_path / "b" / "checkpoint-6" / "trainer_state.json").unlink()  # as if the last save had been cut off
    (tmp_path / "b" / "checkpoint-4" / "trainer_state.json").unlink()
    again = trainer(tmp_path / "b", max_steps=6, save_strategy="no", **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert_close(weights(again), weights(straight), atol=1e-12)


@pytest.mark.parametrize("content", ["", '{"best_metric": null, "epo', "[]"])
def test_a_newest_checkpoint_that_cannot_be_read_is_passed_over(tmp_path, content):
    straight = trainer(tmp_path / "a", max_steps=4)
    straight.train()
    trainer(tmp_path / "b", max_steps=4, save_strategy="steps", save_steps=2).train()
    (tmp_path / "b" / "checkpoint-4" / "trainer_state.json").write_text(content)
    with pytest.warns(UserWarning, match="checkpoint-4 is not complete .*; the one before it is taken"):
        assert RunFolder(tmp_path / "b").last_complete().path.name == "checkpoint-2"
    again = trainer(tmp_path / "b", max_steps=4)
    with pytest.warns(UserWarning, match="checkpoint-4 is not complete"):
        again.train(resume_from_checkpoint=True)
    assert_close(weights(again), weights(straight), atol=1e-12)


SEALED = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "rollouts.process0.safetensors",
          "dealing.json", "settings.json", "training_args.bin")  # fmt: skip
WAITING = {"steps_per_generation": 3, "schedule": "snapshot", "train_dataset": data(32)}


@pytest.fixture(scope="module")
def sealed_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sealed")
    trainer(folder, max_steps=4, save_strategy="steps", save_steps=2, **WAITING).train()
    return folder


@pytest.mark.parametrize("harm", ["cut off", "emptied", "one byte changed", "removed"])
@pytest.mark.parametrize("name", SEALED)
def test_any_damage_to_the_newest_checkpoint_is_noticed(tmp_path, sealed_run, name, harm):
    shutil.copytree(sealed_run, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-4" / name
    content = file.read_bytes()
    if harm == "removed":
        file.unlink()
    else:
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.write_bytes({"cut off": content[:middle], "emptied": b"", "one byte changed": changed}[harm])
    with pytest.warns(UserWarning, match=f"checkpoint-4 is not complete .{name}.*; the one before it is taken"):
        assert RunFolder(tmp_path / "run").last_complete().path.name == "checkpoint-2"
    if harm == "cut off" and name == SEALED[0]:
        with pytest.raises(RefineError, match=f"cannot resume from .*checkpoint-4: {name} has .* bytes"):
            trainer(tmp_path / "run", max_steps=4).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_a_seal_that_is_cut_off_and_folders_of_other_names(tmp_path, sealed_run):
    shutil.copytree(sealed_run, tmp_path / "run")
    seal = tmp_path / "run" / "checkpoint-4" / "sealed.json"
    seal.write_text(seal.read_text()[:40])
    (tmp_path / "run" / "checkpoint-best").mkdir()
    with pytest.warns(UserWarning, match="sealed.json is empty or cut off"):
        assert RunFolder(tmp_path / "run").last_complete().path.name == "checkpoint-2"
    seal.unlink()
    with pytest.warns(UserWarning, match="no sealed.json, which is written last"):
        assert RunFolder(tmp_path / "run").last_complete().path.name == "checkpoint-2"
    (tmp_path / "run" / "checkpoint-4" / "dealing.json").unlink()  # as other programs write checkpoints
    assert RunFolder(tmp_path / "run").last_complete().path.name == "checkpoint-4"
    for name in ("optimizer.pt", "model.safetensors", "rng_state.pth"):
        file = tmp_path / "run" / "checkpoint-4" / name
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.warns(UserWarning, match=f"checkpoint-4 is not complete .{name} cannot be read"):
            assert RunFolder(tmp_path / "run").last_complete().path.name == "checkpoint-2"
        file.write_bytes(content)


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    t = trainer(tmp_path_factory.mktemp("alone"), max_steps=4, **WAITING)
    t.train()
    return weights(t)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("name", SEALED[:6])
def test_training_goes_on_from_before_the_damage(tmp_path, sealed_run, left_alone, name, sealed):
    """Also where no seal says that a file was cut off; the rollouts that wait in the checkpoint before are learned from."""
    shutil.copytree(sealed_run, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint-4"
    content = (newest / name).read_bytes()
    (newest / name).write_bytes(content[: len(content) // 2])
    for other in () if sealed else ("sealed.json", "dealing.json"):
        (newest / other).unlink()
    again = trainer(tmp_path / "run", max_steps=4, **WAITING)
    with pytest.warns(UserWarning, match="checkpoint-4 is not complete") as said:
        again.train(resume_from_checkpoint=True)
    assert [str(w.message).partition(" (")[0] for w in said] == ["checkpoint-4 is not complete"]
    assert again._begun_at == 2 and again.state.global_step == 4
    assert all(torch.equal(w, left_alone[n]) for n, w in weights(again).items())


def test_pickles_in_a_checkpoint_are_not_run(tmp_path, sealed_run):
    """What `torch.load` reads on resume may hold tensors and plain values, and no code."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        folder = tmp_path / name / "checkpoint-4"
        shutil.copytree(sealed_run / "checkpoint-4", folder)
        torch.save({"state": Touch(str(tmp_path / "touched"))}, folder / name)
        (folder / "sealed.json").unlink()
        (folder / "dealing.json").unlink()
        t = trainer(tmp_path / name, max_steps=6, **WAITING)
        with pytest.raises(RefineError, match=f"{name} cannot be read: Weights only load failed"):
            t.train(resume_from_checkpoint=str(folder))
    assert not (tmp_path / "touched").exists()


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_shards_that_are_not_made_are_missed(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch --use_fsdp` does
    with pytest.warns(UserWarning, match="FSDP was asked for, but .*: every process holds the whole model"):
        trainer(tmp_path)


def test_a_checkpoint_of_other_steps_is_refused(tmp_path):
    trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    with pytest.raises(
        RefineError, match=r"1 gradient_accumulation_steps x 4 a batch = 4 examples a step, and this run has .* = 2"
    ):
        trainer(tmp_path, per_device_train_batch_size=2).train(resume_from_checkpoint=True)
    trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2).train(resume_from_checkpoint=True)


def test_rollouts_that_wait_in_packed_examples_are_not_dealt_out_anew(tmp_path):
    rows = Dataset.from_list([{"input_ids": list(range(1, 61)), "lengths": [25, 35]}] * 8)
    settings = {"train_dataset": rows, "steps_per_generation": 2, "max_steps": 2}
    trainer(tmp_path, save_strategy="steps", save_steps=1, **settings).train()
    other = trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings)
    with pytest.raises(RefineError, match="they are not whole batches"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_several_steps_learn_from_one_batch_of_rollouts(tmp_path):
    t = trainer(tmp_path, steps_per_generation=4, max_steps=4, learning_rate=0.3, lambda_ntp=0.0, lambda_rl=5.0)
    t.train()
    logs = [h for h in t.state.log_history if "approx_kl" in h]
    assert abs(logs[0]["approx_kl"]) < 1e-12 < logs[1]["approx_kl"]
    assert max(h["clip_fraction"] for h in logs) > 0
    assert sum("seconds_generation" in h for h in logs) == 1


def test_every_figure_is_logged_each_step(tmp_path):
    t = trainer(tmp_path, max_steps=1, schedule="fused", log_completions=True, reward_funcs=["cosine", "exact_match"])
    t.train()
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    for name in (
        "loss loss_ntp loss_policy reward_cosine reward_cosine_std reward_exact_match reward_exact_match_std reward_group_std "
        "groups_without_spread advantage_min advantage_max clip_fraction approx_kl entropy entropy_at_positions grad_norm "
        "tokens_per_second seconds_select seconds_rollout seconds_backward_and_forward skipped_steps"
    ).split():
        assert math.isfinite(record[name]), name
    completion = json.loads((tmp_path / "completions.jsonl").read_text().splitlines()[0])
    assert set(completion) == {"step", "position", "prefix", "truth", "rollout", "reward", "advantage"}


def test_validation_figures_equal_a_computation_by_hand(tmp_path):
    rows = data(5)
    t = trainer(tmp_path, eval_dataset=rows, per_device_eval_batch_size=2)
    metrics = t.evaluate()
    nll = correct = entropy = count = 0.0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor(row["input_ids"])
            log_p = t.model(ids[None]).logits[0, :-1].log_softmax(-1)
            nll -= float(log_p.gather(-1, ids[1:, None]).sum())
            correct += int((log_p.argmax(-1) == ids[1:]).sum())
            entropy -= float((log_p.exp() * log_p).sum())
            count += len(ids) - 1
    assert metrics["eval_loss"] == pytest.approx(nll / count, rel=1e-6)
    assert metrics["eval_accuracy"] == pytest.approx(correct / count)
    assert metrics["eval_entropy"] == pytest.approx(entropy / count, rel=1e-6)
    assert 0 <= metrics["eval_greedy_match"] <= 1 and -1 <= metrics["eval_cosine"] <= 1
    assert metrics["eval_greedy_match"] == t.evaluate()["eval_greedy_match"]


def test_best_model_is_loaded_at_the_end(tmp_path):
    t = trainer(tmp_path, max_steps=4, eval_dataset=data(4), eval_strategy="steps", eval_steps=2, save_strategy="steps",
                save_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False,
                save_total_limit=1)  # fmt: skip
    t.train()
    assert t.state.best_model_checkpoint is not None
    assert t.evaluate()["eval_loss"] == pytest.approx(t.state.best_metric, rel=1e-4)


def test_counted_positions_are_those_selected():
    from refine_nsp.config import NSPConfig
    from refine_nsp.nsp.records import Batch
    from refine_nsp.nsp.selection import count_positions, select_positions

    config = NSPConfig(positions_per_sequence=4, rollout_length=5)
    batch = Batch.of(torch.zeros(6, 200, dtype=torch.long), torch.tensor([200, 90, 41, 30, 26, 12]))
    chosen = select_positions(torch.zeros(6, 200), batch, torch.rand(6, 4, dtype=torch.float64), config)
    assert count_positions(batch.lengths, config).tolist() == (chosen >= 0).sum(-1).tolist()


def test_gradient_checkpointing_and_bf16_run(tmp_path):
    plain = trainer(tmp_path / "a", max_steps=2)
    checkpointed = trainer(tmp_path / "b", max_steps=2, gradient_checkpointing=True,
                           gradient_checkpointing_kwargs={"use_reentrant": False})  # fmt: skip
    plain.train()
    checkpointed.train()
    assert_close(weights(plain), weights(checkpointed))
    for family in FAMILY_NAMES:
        for schedule in ("snapshot", "fused"):
            t = trainer(tmp_path / family, family, dtype=torch.float32, bf16=True, max_steps=2, schedule=schedule)
            t.train()
            assert t.guard.skipped == 0 and math.isfinite(t.state.log_history[0]["loss"])


def test_lora_trains_only_its_adapters(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = build("delta_net", dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    args = ReFINEConfig(output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none",
                        min_prefix=5, positions_per_sequence=2, max_length=64, learning_rate=1e-2, disable_tqdm=True)  # fmt: skip
    ReFINETrainer(model=model, args=args, train_dataset=data()).train()
    moved = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved and all("lora" in n for n in moved)
    for name, p in model.get_base_model().named_parameters():
        clean = name.replace(".base_layer", "")
        if clean in before:
            assert torch.equal(p.detach(), before[clean])
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()


def test_steps_without_a_finite_gradient_are_skipped_and_end_the_run(tmp_path):
    t = trainer(tmp_path, max_steps=10, max_skipped_steps=3)
    before = weights(t)
    with torch.no_grad():
        t.model.lm_head.weight[5, 3] = math.nan
    with pytest.raises(ValueError, match="not finite in 3 steps in a row"):
        t.train()
    assert t.guard.skipped == 3
    after = weights(t)
    assert all(torch.equal(after[n], before[n]) for n in before if n != "lm_head.weight")


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_ctrl_c_and_sigterm_save_a_checkpoint_and_stop(tmp_path, number, ends):
    from transformers import TrainerCallback

    class Press(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    t = trainer(tmp_path / "a", max_steps=5, callbacks=[Press()])
    with pytest.raises(ends) as stop:
        t.train()
    assert signal.getsignal(number) is before
    assert number == signal.SIGINT or stop.value.code == 143
    assert RunFolder(tmp_path / "a").last_complete().path.name == "checkpoint-3"
    again = trainer(tmp_path / "a", max_steps=5)
    again.train(resume_from_checkpoint=True)
    straight = trainer(tmp_path / "b", max_steps=5)
    straight.train()
    assert_close(weights(again), weights(straight), atol=1e-12)


def test_a_failed_save_leaves_nothing_half_written(tmp_path, monkeypatch):
    t = trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(t, "_save_rng_state", full)
    with pytest.raises(ValueError, match="No space left"):
        t.train()
    assert not list(Path(tmp_path).glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective": "sft"}, "objective"),
        ({"schedule": "fused", "steps_per_generation": 2}, "schedule='snapshot'"),
        (
            {"schedule": "fused", "advantage_scale": "global", "gradient_accumulation_steps": 2},
            "one scale for the 2 micro-batches",
        ),
        ({"steps_per_generation": 0}, "steps_per_generation"),
        ({"rollout_length": 0}, "rollout_length"),
        ({"positions_per_sequence": 40}, "too many for max_length"),
        ({"preset": "contex"}, "did you mean 'context'"),
        ({"max_length": 3}, "cannot hold a rollout"),
    ],
)
def test_bad_settings_are_named(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, **settings)
