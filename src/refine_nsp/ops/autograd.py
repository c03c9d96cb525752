"""Type autograd functions with hand-written backward passes, which torch leaves untyped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from refine_nsp.ops.precision import without_autocast

F = TypeVar("F", bound=Callable[..., Any])
Gradients = tuple[Tensor | None, ...]  # one for each argument of `forward`


class Context(FunctionCtx):
    """Carries what a `forward` keeps for its `backward`; it stands in annotations alone, torch makes its own."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    kept: Any  # what is no tensor: a shape, a dtype or a number

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors for the backward pass; None is kept too, whatever torch's own annotation says."""


def by_hand(backward: F) -> F:
    """Declare a hand-written backward pass: it has no derivative of its own, and autocast does not change it."""
    return cast(F, once_differentiable(without_autocast(backward)))
