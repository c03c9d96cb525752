"""Transfer: each layer's memory learns what the teacher's attention gives, exactly as a naive form says, and nothing else is trained."""

import pytest
import torch
from safetensors.torch import load_file

from refine_nsp.errors import RefineError
from refine_nsp.estimate.counter import Counter
from refine_nsp.models import with_states
from refine_nsp.models.convert import convert
from refine_nsp.models.load import load_model
from refine_nsp.nsp.records import Batch
from refine_nsp.training.phases import MicroBatch
from refine_nsp.training.teacher import teacher_of
from refine_nsp.training.transfer import Transfer, layer_errors
from tests.models.families import build
from tests.models.test_convert import MEMORY, SOURCES, WINDOW, awake, saved, source_of, with_our_tables
from tests.models.transformers_models import float64_throughout
from tests.training.test_distillation import LENGTHS, ids_of, trainer
from tests.training.test_memory_rate import is_memory
from tests.training.test_trainer import assert_close, data, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*has no tokenizer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher, and the student that it was converted to, in float64."""
    made = tmp_path_factory.mktemp("transfer")
    convert(saved(made / "teacher"), made / "student", MEMORY)
    return made


def transfers(made, run, **settings):
    return trainer(made, run, **{"objective": "transfer", **settings})


def naive_errors(source, student, ids, lengths) -> torch.Tensor:
    """[L, B], row by row without pads: transformers' own hidden states, then each layer's attention and mixer called by hand."""
    errors = torch.zeros(source.config.num_hidden_layers, len(ids), dtype=torch.float64)
    for b, n in enumerate(lengths.tolist()):
        x = source.model.embed_tokens(ids[b : b + 1, :n])
        tables = source.model.rotary_emb(x, torch.arange(n)[None])
        mask = torch.full((n, n), -torch.inf, dtype=x.dtype).triu(1)[None, None]
        for i, (layer, own) in enumerate(zip(source.model.layers, student.model.layers, strict=True)):
            wanted = layer.self_attn(layer.input_layernorm(x), attention_mask=mask, position_embeddings=tables)[0]
            given, _ = own.attn(own.attn_norm(x.detach()), None, None, torch.zeros(1, dtype=torch.long))
            errors[i, b] = (given - wanted.detach()).square().sum() / wanted.detach().square().sum()
            x = x + wanted
            x = x + layer.mlp(layer.post_attention_layernorm(x))
    return errors


@pytest.mark.parametrize("kind", SOURCES)
def test_loss_and_gradients_are_those_of_the_naive_form(tmp_path, kind):
    convert(saved(tmp_path / "teacher", SOURCES[kind]()), tmp_path / "student", MEMORY)
    with float64_throughout():
        source = with_our_tables(source_of(SOURCES[kind]()))
        student, ids = awake(load_model(tmp_path / "student")), ids_of()
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(is_memory(name))
        expected = naive_errors(source, student, ids, LENGTHS)
        (expected.mean(0) * LENGTHS).sum().div(LENGTHS.sum()).backward()
        gradients = {name: p.grad for name, p in student.named_parameters()}
        student.zero_grad()
        teacher = teacher_of(with_states(source, check_states=False))
        found = layer_errors(student, teacher, Batch.of(ids, LENGTHS))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        phase, batch = Transfer(None, teacher), MicroBatch(Batch.of(ids, LENGTHS))
        batch.totals = phase.count(batch)
        loss, metrics = phase.loss(student, batch)
        loss.backward()
    assert float(metrics["worst_layer_error"]) == pytest.approx(float(expected.detach().mean(1).max()))
    for name, parameter in student.named_parameters():
        if is_memory(name):
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-8, atol=1e-12, msg=name)
        else:
            assert parameter.grad is None


@torch.no_grad()
def test_within_the_window_there_is_nothing_to_learn(folder):
    with float64_throughout():
        source = with_our_tables(source_of(SOURCES["llama"]()))
        teacher, student = teacher_of(with_states(source, check_states=False)), load_model(folder / "student")
        near = layer_errors(student, teacher, Batch.of(ids_of(length=WINDOW)))
        far = layer_errors(student, teacher, Batch.of(ids_of()))
    assert near.max() < 1e-12 and far.min() > 1e-6


def test_the_memory_alone_is_trained_and_comes_nearer(folder, tmp_path):
    t = transfers(folder, tmp_path, max_steps=24, train_dataset=data(4), eval_dataset=data(4), learning_rate=1e-2)
    before, first = weights(t), t.evaluate()
    t.train()
    for name, parameter in t.model.named_parameters():
        assert torch.equal(before[name], parameter.detach()) != is_memory(name), name
    after = t.evaluate()
    assert after["eval_transfer"] < first["eval_transfer"] and "eval_loss" in after
    logs = [x["loss_transfer"] for x in t.state.log_history if "loss_transfer" in x]
    assert logs[-1] < logs[0]


def test_one_batch_of_8_equals_8_batches_of_1(folder, tmp_path):
    one = transfers(folder, tmp_path / "1", max_steps=2, per_device_train_batch_size=8)
    many = transfers(folder, tmp_path / "8", max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    one.train(), many.train()
    assert_close(weights(one), weights(many))


def test_a_resumed_run_equals_the_uninterrupted_one(folder, tmp_path):
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2, gradient_checkpointing=True)
    whole = transfers(folder, tmp_path, **settings)
    whole.train()
    resumed = transfers(folder, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_close(weights(whole), weights(resumed))
    with pytest.raises(RefineError, match=r"objective was 'transfer', now 'distill'"):
        trainer(folder, tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    saved_weights = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert not any("teacher" in name for name in saved_weights)


def test_activations_of_one_layer_at_a_time_are_held(tmp_path):
    """Four layers more cost what their attention was given and gave, two tensors each, not their mixers' activations."""
    peaks = []
    for layers in (2, 6):
        config = SOURCES["llama"]()
        config.num_hidden_layers = layers
        source = source_of(config)
        source.save_pretrained(tmp_path / f"t{layers}")
        convert(tmp_path / f"t{layers}", tmp_path / f"s{layers}", MEMORY)
        student = load_model(tmp_path / f"s{layers}", dtype="float32")
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(is_memory(name))
        teacher = teacher_of(load_model(tmp_path / f"t{layers}", dtype="float32"))
        phase, batch = Transfer(None, teacher), MicroBatch(Batch.of(ids_of(4, 400)))
        batch.totals = phase.count(batch)
        with Counter() as counter:
            phase.loss(student, batch)[0].backward()
        peaks.append(max(counter.peaks.values()))
    held = 4 * 2 * 4 * 400 * config.hidden_size * 4
    gradients = 2 * 4 * sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert peaks[1] - peaks[0] < 1.5 * held + gradients, (peaks, held, gradients)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"teacher": None}, "objective='transfer' needs a teacher"),
        (
            {"context_scores": "teacher", "selection": "context_kl"},
            "context_scores='teacher' is not read by objective='transfer'",
        ),
        ({"neftune_noise_alpha": 1.0}, "neftune_noise_alpha=1.0 is for embeddings"),
        ({"carry_states": True}, "carry_states"),
        ({"lambda_context": 2.0}, "nothing reads lambda_context=2.0"),
        ({"max_length": WINDOW}, "is not longer than the window"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_with_it_are_refused(folder, tmp_path, settings, said):
    with pytest.raises(RefineError, match=said):
        transfers(folder, tmp_path, **settings)


def test_models_that_do_not_go_with_it_are_refused(folder, tmp_path):
    with pytest.raises(RefineError, match="no parameter is the memory's alone"):
        transfers(folder, tmp_path, student=build("delta_net"))
    other = load_model(folder / "student")
    other.config.num_hidden_layers = 7
    with pytest.raises(RefineError, match="has num_hidden_layers=2 where the student has 7"):
        transfers(folder, tmp_path, student=other)
    with pytest.raises(RefineError, match="is a fast-weight model already"):
        transfers(folder, tmp_path, teacher=str(folder / "student"))
