"""flash-linear-attention's kernels under Triton's interpreter, on the CPU: what both need mended for it. Import before their kernels.

The interpreter takes the bits of a bfloat16 for numbers in products and sums: float16 stands for it here.
"""

import triton.runtime.autotuner as autotuner
import triton.runtime.interpreter as interpreter

_make, _patch = autotuner.Autotuner.__init__, interpreter._patch_lang_tensor


def _one_config(self, fn, arg_names, configs, *args, **kwargs):
    """Nothing is timed here, and without a device nothing can be."""
    _make(self, fn, arg_names, configs[:1], *args, **kwargs)


def _scalars(tensor, scope):
    """Newer numpys refuse int() of an array of one number."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


class _Index(int):
    def to(self, dtype):
        return self


def _counted(*bounds):
    """Compiled loop variables are tensors, which kernels cast; interpreted ones are plain numbers."""
    return map(_Index, range(*(x.__index__() for x in bounds)))


autotuner.Autotuner.__init__ = _one_config
interpreter._patch_lang_tensor = _scalars


def patch_loops():
    """In the module whose loops cast their variable."""
    from fla.ops.common import chunk_delta_h

    chunk_delta_h.range = _counted
