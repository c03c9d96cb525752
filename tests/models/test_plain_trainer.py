"""transformers' own Trainer on our models: the loss it asks for, however a batch is accumulated."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.models.families import FAMILY_NAMES, build


def examples() -> list[dict[str, torch.Tensor]]:
    """Rows with very different numbers of targets, so that a mean of means is not the mean."""
    torch.manual_seed(0)
    rows = []
    for length in (4, 30, 12, 25):
        ids = torch.randint(1, 64, (30,))
        real = torch.arange(30) < length
        rows.append({"input_ids": ids, "attention_mask": real.long(), "labels": ids.where(real, torch.tensor(-100))})
    return rows


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_accumulated_gradients_are_those_of_one_batch(family, tmp_path):
    def trained(batch: int) -> dict[str, torch.Tensor]:
        model = build(family)
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=batch, gradient_accumulation_steps=4 // batch,
            learning_rate=1e-2, max_grad_norm=0.0, optim="sgd", train_sampling_strategy="sequential", report_to="none", use_cpu=True,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        Trainer(model=model, args=args, train_dataset=examples()).train()
        return model.state_dict()

    whole, one_by_one = trained(4), trained(1)
    for name, weight in whole.items():
        torch.testing.assert_close(one_by_one[name], weight, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_loss_is_the_mean_over_labels_that_are_not_masked(family):
    model, row = build(family), examples()[2]
    batch = {name: x[None] for name, x in row.items()}
    out = model(**batch)
    log_p = out.logits[0, :11].log_softmax(-1)
    expected = -log_p.gather(1, row["input_ids"][1:12, None]).mean()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(model(**batch, num_items_in_batch=44).loss, expected / 4)
    assert model(**batch, logits_to_keep=1).logits.shape == (1, 1, 64)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_evaluation_hands_the_logits_to_compute_metrics(family, tmp_path):
    seen = []
    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=3, report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(
        model=build(family), args=args, eval_dataset=examples(), compute_metrics=lambda p: seen.append(p.predictions.shape) or {}
    )
    assert trainer.evaluate()["eval_loss"] > 0
    assert seen == [(4, 30, 64)]
