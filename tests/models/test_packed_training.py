"""Other libraries' packed training of our models: TRL's `SFTTrainer`, and transformers' Trainer with its flattening collator.

Each step sees all documents, so the weights after two steps of plain gradient descent must be those of documents run one by one.
"""

import copy
import functools

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from refine_nsp.models.load import load
from tests.models.families import FAMILY_NAMES, build
from tests.models.transformers_models import float64_throughout, stateful

RATE = 0.05
LENGTHS = [21, 5, 33, 2, 17, 9]
SETTINGS = dict(
    max_steps=2, learning_rate=RATE, lr_scheduler_type="constant", optim="sgd", weight_decay=0.0, max_grad_norm=0.0, report_to="none",
    use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1, bf16=False,
)  # fmt: skip


def rows() -> list[dict[str, list[int]]]:
    """Documents, some with targets that do not count."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i, n in enumerate(LENGTHS):
        ids = torch.randint(4, 64, (n,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (n // 2) + ids[n // 2 :] if i % 2 else ids})
    return made


def weights(model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def by_hand(model) -> tuple[dict[str, Tensor], list[float]]:
    """Weights after two steps on the documents one by one, and the loss of each."""
    model, losses = copy.deepcopy(model).train(), []
    for _ in range(2):
        terms = []
        for row in rows():
            log_p = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
            targets = torch.tensor(row["labels"][1:])
            counts = targets != -100
            terms.append(-log_p[counts].gather(1, targets[counts, None]).flatten())
        loss = torch.cat(terms).mean()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= RATE * p.grad
        model.zero_grad()
    return weights(model), losses


@functools.cache
def expected_of(family: str, vocabulary: int = 64) -> tuple[dict[str, Tensor], list[float]]:
    """Make `by_hand` of a family's model, which is the same in every case."""
    return by_hand(build(family, vocab_size=vocabulary))


def assert_same(model, trainer, expected: tuple[dict[str, Tensor], list[float]], precision: float) -> None:
    trainer.train()
    found = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert found == pytest.approx(expected[1], rel=1e-4)  # rounded by the trainer
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, expected[0][name], rtol=0, atol=precision, msg=lambda m, n=name: f"{n}: {m}")


def cross_entropy(outputs, labels, num_items_in_batch=None):
    """A loss of one's own, which TRL gives the model's logits."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


def sft(model, folder, loss, **settings):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    args = trl.SFTConfig(output_dir=str(folder), gradient_checkpointing=False, **SETTINGS | settings)
    tokenizer = load("refine-nsp/tiny-delta-net")[1]  # to pad with; the rows are tokens already
    data = Dataset.from_list(rows())
    return trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, compute_loss_func=loss)


TRL_WAYS = {
    "packed": dict(packing=True, max_length=48, per_device_train_batch_size=3),
    "packed, accumulated": dict(packing=True, max_length=48, per_device_train_batch_size=1, gradient_accumulation_steps=3),
    "packed in columns of 8": dict(packing=True, max_length=48, per_device_train_batch_size=3, pad_to_multiple_of=8),
    "packed by splitting": dict(packing=True, packing_strategy="bfd_split", max_length=48, per_device_train_batch_size=3),
    "padding-free": dict(padding_free=True, max_length=None, per_device_train_batch_size=6),
    "padded": dict(max_length=48, per_device_train_batch_size=6),
}


# TRL's own head, which computes in float32 whatever the weights are; and the model's logits.
LOSSES = {"its own loss": (None, 1e-6), "a loss of logits": (cross_entropy, 1e-12)}
CASES = [("delta_net", way, "a loss of logits") for way in TRL_WAYS]
for other in FAMILY_NAMES[1:]:
    CASES += [(other, "packed, accumulated", "a loss of logits"), (other, "padding-free", "a loss of logits")]
CASES += [(family, "packed", "its own loss") for family in FAMILY_NAMES]


@pytest.mark.filterwarnings("ignore:`compute_loss_func`:FutureWarning")
@pytest.mark.parametrize(("family", "way", "loss"), CASES)
def test_trl_trains_packed_documents_as_documents_apart(tmp_path, family, way, loss):
    pytest.importorskip("trl", reason="TRL is not installed")
    model = build(family, vocab_size=512)
    function, precision = LOSSES[loss]
    assert_same(model, sft(model, tmp_path, function, **TRL_WAYS[way]), expected_of(family, 512), precision)


FLATTENED = [
    {}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}, {"return_flash_attn_kwargs": True, "return_seq_idx": True},
    {"return_position_ids": False, "return_seq_idx": True}, {"return_position_ids": False, "return_flash_attn_kwargs": True},
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "options"),
    [*(("delta_net", options) for options in FLATTENED), *((family, o) for family in FAMILY_NAMES[1:] for o in FLATTENED[:2])],
    ids=lambda x: x if isinstance(x, str) else ", ".join(x) or "default",
)
def test_the_flattening_collator_trains_as_documents_apart(tmp_path, family, options):
    model = build(family)
    args = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=6, **SETTINGS)
    trainer = Trainer(model=model, args=args, train_dataset=rows(), data_collator=DataCollatorWithFlattening(**options))
    assert_same(model, trainer, expected_of(family), precision=1e-12)


@pytest.mark.parametrize("name", ["qwen3_5", "bamba"])
def test_a_model_of_transformers_trains_as_documents_apart(tmp_path, name):
    """Where transformers' own recurrent layers would mix documents: in its Trainer, and with the head that TRL makes of the trunk."""
    pytest.importorskip("trl", reason="TRL is not installed")
    with float64_throughout():
        model = stateful(name)
        expected = by_hand(model)
        flattened = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
        args = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=6, **SETTINGS)
        same = copy.deepcopy(model)
        trainer = Trainer(model=same, args=args, train_dataset=rows(), data_collator=flattened)
        assert_same(same, trainer, expected, precision=1e-12)
        assert_same(model, sft(model, tmp_path, None, **TRL_WAYS["packed"]), expected, precision=1e-6)
