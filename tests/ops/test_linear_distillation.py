"""Distillation by blocks of logits is the naive form, forward and backward."""

import pytest
import torch

from refine_nsp.ops import linear_distillation as rooms
from refine_nsp.ops.linear_distillation import Lesson, linear_distillation, naive_linear_distillation


def case(V: int, teacher_V: int, ntp: bool, n: int = 37, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype)

    student = normal(n, 8).requires_grad_(), normal(V, 8).requires_grad_()
    weights = torch.rand(2, n, generator=g, dtype=dtype)
    weights[:, 5] = 0.0
    targets = torch.randint(0, min(V, teacher_V), (n,), generator=g)
    return student, Lesson(normal(n, 6), normal(teacher_V, 6), targets, weights[0], weights[1] if ntp else None)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(rooms, "block_tokens", lambda vocabulary, device: 16)


@pytest.mark.parametrize("ntp", [True, False])
@pytest.mark.parametrize(("V", "teacher_V"), [(11, 11), (11, 14), (14, 11)])
def test_blocks_are_the_naive_form(V, teacher_V, ntp):
    """Also where one of the two vocabularies is padded."""
    (hidden, weight), lesson = case(V, teacher_V, ntp)
    fast, naive = linear_distillation(hidden, weight, lesson), naive_linear_distillation(hidden, weight, lesson)
    torch.testing.assert_close(fast.loss, naive.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(fast.kl, naive.kl, rtol=1e-11, atol=1e-14)
    assert (fast.nll is None) == (naive.nll is None) == (not ntp)
    if ntp:
        torch.testing.assert_close(fast.nll, naive.nll, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(3 * fast.loss, (hidden, weight)), torch.autograd.grad(3 * naive.loss, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def test_a_frozen_head_or_no_gradient_at_all_will_do():
    (hidden, weight), lesson = case(11, 11, True)
    whole = torch.autograd.grad(linear_distillation(hidden, weight, lesson).loss, hidden)[0]
    frozen = torch.autograd.grad(linear_distillation(hidden, weight.detach(), lesson).loss, hidden)[0]
    torch.testing.assert_close(frozen, whole, rtol=0, atol=0)
    with torch.no_grad():
        assert not linear_distillation(hidden, weight, lesson).loss.requires_grad


def test_a_student_that_is_its_teacher_diverges_nowhere():
    (hidden, weight), lesson = case(11, 11, False, dtype=torch.float32)
    same = Lesson(hidden.detach(), weight.detach(), lesson.targets, lesson.kl_weights)
    found = linear_distillation(hidden, weight, same)
    assert float(found.kl.abs().max()) < 1e-6
    assert float(torch.autograd.grad(found.loss, hidden)[0].abs().max()) < 1e-6


def test_autocast_multiplies_both_in_half_precision_and_adds_wide():
    (hidden, weight), lesson = case(11, 11, True, dtype=torch.float32)
    wide = linear_distillation(hidden, weight, lesson)
    with torch.autocast("cpu", torch.bfloat16):
        half = linear_distillation(hidden, weight, lesson)
    assert half.loss.dtype == half.kl.dtype == torch.float32
    torch.testing.assert_close(half.loss, wide.loss, rtol=0.05, atol=0.05)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(half.loss, (hidden, weight)))
