"""Type autograd functions with hand-written backward passes, which torch leaves untyped."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.function import FunctionCtx

Gradients = tuple[Tensor | None, ...]  # one for each argument of `forward`


class Context(FunctionCtx):
    """Carries what a `forward` keeps for its `backward`; it stands in annotations alone, torch makes its own."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors for the backward pass; None is kept too, whatever torch's own annotation says."""
