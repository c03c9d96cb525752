"""Memory that runs out: one line that names the part of the step and what to lower, still found by those who try smaller batches."""

import pytest
import torch
from accelerate.utils.memory import should_reduce_batch_size

from refine_nsp.errors import RefineError
from refine_nsp.evaluation.run import REMEDIES
from refine_nsp.ops.memory import PARTS, OutOfMemory, part
from refine_nsp.training.remedies import TEST_TIME, TRAINING, VALIDATION

CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.00 GiB is free."


def cuda() -> None:
    raise torch.OutOfMemoryError(CUDA)


def cpu() -> None:
    torch.empty(2**46, dtype=torch.uint8)  # 64 TiB


@pytest.mark.parametrize(("asks", "words"), [(cuda, ("CUDA out of memory.", "20.00 GiB")), (cpu, ("65536.00 GiB",))])
def test_the_innermost_part_is_named_in_one_line(asks, words):
    with pytest.raises(RefineError) as caught, part("optimizer"), part("rollouts"):
        asks()
    text = str(caught.value)
    assert "\n" not in text and "In the rollouts" in text and "num_generations" in text and all(w in text for w in words)
    assert isinstance(caught.value, torch.OutOfMemoryError) and should_reduce_batch_size(caught.value)


@pytest.mark.parametrize(("whole", "remedies"), [("validation", VALIDATION), ("evaluation", REMEDIES)])
def test_where_nothing_is_learned_advice_for_training_is_not_given(whole, remedies):
    with pytest.raises(OutOfMemory) as caught, part("optimizer", TRAINING | REMEDIES), part(whole, remedies), part("forward"):
        cuda()
    assert f"In {PARTS[whole][0]}" in str(caught.value) and remedies[whole] in str(caught.value)
    assert "gradient_checkpointing" not in str(caught.value) and "20.00 GiB" in str(caught.value)


@pytest.mark.parametrize("name", ["forward", "context", "logits", "rollouts", "backward", "optimizer"])
def test_whoever_runs_the_whole_says_what_helps(name):
    for remedies in (TRAINING, TEST_TIME):
        with pytest.raises(OutOfMemory) as caught, part("optimizer", remedies), part("forward"), part(name):
            cuda()
        assert f"In {PARTS[name][0]}" in str(caught.value) and str(caught.value).endswith(f": {remedies[name]}")


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match=r"^shapes differ$") as caught, part("forward"):
        raise RuntimeError("shapes differ")
    assert not isinstance(caught.value, RefineError)
