"""transformers' layers with another package's kernels in the place of their own code: called only where they can run."""

import inspect
import sys
import types
import warnings

import pytest
import torch
from transformers.integrations import hub_kernels

from refine_nsp.config import NSPConfig
from refine_nsp.models import with_states
from refine_nsp.models.borrowed import layer_kernels
from refine_nsp.models.borrowed.by_reference import ByReference
from refine_nsp.nsp.module import ReFINEStep
from refine_nsp.ops import kernels
from tests.models.transformers_models import RECURRENT, plain, skip_if_old

DELTA_RULES = ["qwen3_next", "qwen3_5", "olmo_hybrid", "kimi_linear"]


class KernelCalled(RuntimeError):
    """As Triton's driver fails without a device."""


@pytest.fixture
def substituted(monkeypatch):
    """A function that makes a model of which every function with a known kernel has a stand-in that raises, put there by transformers."""

    def make(name: str):
        model = plain(name, dtype=torch.float32)
        skip_if_old(model)
        file = sys.modules[type(model).__module__]
        for attribute, function in list(vars(file).items()):
            if not (inspect.isfunction(function) and "wrapped" in function.__code__.co_name):
                continue
            known = inspect.getclosurevars(function).nonlocals
            if "implementation" in known:
                stand_in(monkeypatch, known["package"], known["func_name"])
                put_in = hub_kernels.use_kernel_func_from_hub_with_fallback(known["func_name"], known["package"])
                monkeypatch.setattr(file, attribute, put_in(known["torch_function"]))
        return model

    return make


def stand_in(monkeypatch, package: str, name: str) -> None:
    """A package with the function `name` where transformers looks for it."""
    path = [package, *hub_kernels._KERNELS_INTERNAL_PATH_MAPPINGS.get(name, "").split(".")]
    path = [part for part in path if part]
    for end in range(1, len(path) + 1):
        dotted = ".".join(path[:end])
        if not isinstance(sys.modules.get(dotted), types.ModuleType) or "stand_in" not in vars(sys.modules[dotted]):
            module = types.ModuleType(dotted)
            module.stand_in = True
            monkeypatch.setitem(sys.modules, dotted, module)
            if end > 1:
                setattr(sys.modules[".".join(path[: end - 1])], path[end - 1], module)

    def kernel(x, *args, **kwargs):
        raise KernelCalled(name)

    kernel.__name__, kernel.__module__ = name, ".".join(path)
    setattr(sys.modules[".".join(path)], name, kernel)


def step(model) -> torch.Tensor:
    """The loss of a step, gradients taken."""
    ids = torch.randint(0, 64, (2, 30), generator=torch.Generator().manual_seed(1))
    config = NSPConfig(positions_per_sequence=2, rollout_length=3, min_prefix=5, schedule="fused")
    loss = ReFINEStep(model.train(), config)(ids, generator=torch.Generator().manual_seed(0)).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("name", RECURRENT)
def test_on_a_cpu_no_kernel_is_called(name, substituted):
    without = with_states(plain(name, dtype=torch.float32))
    expected = step(without)
    model = substituted(name)
    with pytest.raises(KernelCalled):
        model(torch.tensor([[1, 2, 3]]))  # transformers alone
    model = with_states(model)
    assert isinstance(model.model.state_method, ByReference)
    assert torch.equal(step(model), expected)
    assert ", on a CUDA device " in model.model.kernels and "(causal_conv1d)" in model.model.kernels
    assert ", on a CUDA device " not in without.model.kernels


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Kernels that take tensors of this CPU, as far as ops/kernels.py can tell."""

    def there(gated: str | None = None) -> None:
        chosen = kernels.Kernels("torch" if kernels.wanted() == "torch" else "fla", "a stand-in", "cpu", gated)
        monkeypatch.setattr(kernels, "interpreted", lambda: True)
        monkeypatch.setattr(kernels, "chosen", lambda: chosen)

    return there


@pytest.mark.parametrize("name", DELTA_RULES)
def test_a_delta_rule_runs_on_its_kernel_where_that_runs_and_not_where_it_was_turned_off(
    name, substituted, as_on_a_device, monkeypatch
):
    model, ids = with_states(substituted(name)), torch.tensor([[1, 2, 3]])
    monkeypatch.setenv(kernels.VARIABLE, "torch")
    as_on_a_device()
    assert bool(model(ids).logits.isfinite().all()) and model.model.state_method is not None
    monkeypatch.delenv(kernels.VARIABLE)
    as_on_a_device()
    with pytest.raises(KernelCalled, match=r"chunk_(gated_delta_rule|kda)"):
        model(ids)
    assert bool(model.double()(ids).logits.isfinite().all())  # of which the kernels know nothing


def test_a_gated_rule_that_would_be_wrong_is_named_and_not_run(substituted, as_on_a_device):
    kernels._say_once.cache_clear()
    model, ids = with_states(substituted("qwen3_5")), torch.tensor([[1, 2, 3]])
    as_on_a_device(gated="its Triton computes it wrongly")
    with pytest.warns(UserWarning, match="its Triton computes it wrongly"):
        model(ids)
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        model(ids)
    with pytest.raises(KernelCalled, match="chunk_kda"):  # a rule of another kind, which is not concerned
        with_states(substituted("kimi_linear"), check_states=False)(ids)


def test_packed_sequences_are_left_to_what_can_keep_them_apart():
    """The layers' own code would mix them: transformers refuses that, or the kernel refuses its device."""

    def own(x, **ignored):
        return x

    def kernel(x, cu_seqlens=None):
        raise KernelCalled

    def function(x, cu_seqlens=None):
        return kernel(x, cu_seqlens)

    kernel.__module__, function.__wrapped__ = "fla.ops", own
    call = layer_kernels.deciding(function, kernel)
    x = torch.zeros(1, 2, 1, 4)
    assert call(x) is x
    with pytest.raises(KernelCalled):
        call(x, cu_seqlens=torch.tensor([0, 1, 2]))
