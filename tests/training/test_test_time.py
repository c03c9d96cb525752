"""Test-time training: it changes what it should, restores every bit whatever happens, and prompts side by side are prompts alone."""

import pytest
import torch

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.nsp.module import ReFINEStep
from refine_nsp.training.test_time import BatchLoRA, TestTimeConfig, TestTimeTrainer, chosen_parameters, linear_layers
from tests.models.families import build

FAMILIES = ["delta_net", "gated_deltanet", "lact_swiglu"]
SHORT = {"min_prefix": 4, "positions_per_sequence": 2, "rollout_length": 3}
LOCAL = {**SHORT, "local_window": 6}
NSP = NSPConfig.preset("test_time", **SHORT)
# What a prompt can be adapted by: settings of a TestTimeConfig.
METHODS = {
    "ntp": {"objective": "ntp"},
    "refine": {},
    "expected": {"nsp": NSPConfig.preset("expected", **LOCAL)},
    "closed form, selected": {"nsp": NSPConfig.preset("expected", token_weights="selected", local_span=2, **SHORT)},
}


def config(**settings):
    return TestTimeConfig(**{"learning_rate": 1e-2, "nsp": NSP, **settings})


def prompt(length=60, seed=0):
    return torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(seed))


def bits(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parameters", ["all", "fast_weights", "lora"])
@pytest.mark.parametrize("method", ["ntp", "refine", "expected"])
def test_outputs_change_inside_and_every_bit_is_back_outside(family, parameters, method):
    model = build(family).eval()
    before, ids = bits(model), prompt()
    flags = [p.requires_grad for p in model.parameters()]
    plain = model(ids[None]).logits
    ttt = TestTimeTrainer(model, config(parameters=parameters, steps=2, **METHODS[method]))
    with ttt.adapt(ids) as adapted:
        assert adapted is model and not model.training
        assert (model(ids[None]).logits - plain).abs().max() > 1e-6
        generated = model.generate(ids[None], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert generated.shape[1] == 63
    assert same(model, before)
    assert [p.requires_grad for p in model.parameters()] == flags and all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(model(ids[None]).logits, plain, rtol=0, atol=0)
    assert len(ttt.last.losses) == 2 and ttt.last.extra_bytes > 0


@pytest.mark.parametrize("problem", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("parameters", ["all", "lora"])
def test_an_exception_or_ctrl_c_inside_restores_too(problem, parameters):
    model = build("delta_net").eval()
    before = bits(model)
    with pytest.raises(problem), TestTimeTrainer(model, config(parameters=parameters)).adapt(prompt()):
        raise problem
    assert same(model, before)
    assert not any(m._forward_hooks for m in model.modules())


def test_ctrl_c_while_adapting_restores(monkeypatch):
    model = build("delta_net").eval()
    before, step = bits(model), torch.optim.AdamW.step

    def interrupted(self, *args, **kwargs):
        step(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(KeyboardInterrupt), TestTimeTrainer(model, config()).adapt(prompt()):
        raise AssertionError("never reached")
    assert same(model, before) and not model.training


def test_ntp_on_the_prompt_lowers_its_loss():
    model = build("delta_net").eval()
    ttt = TestTimeTrainer(model, config(objective="ntp", steps=8))
    with ttt.adapt(prompt()):
        pass
    assert ttt.last.losses[-1] < ttt.last.losses[0] - 0.1


def test_the_same_prompt_is_adapted_to_alike_and_prompts_leave_no_trace():
    model, ids = build("delta_net").eval(), prompt()
    ttt = TestTimeTrainer(model, config())
    outputs = []
    for other in (None, prompt(80, 7)):
        if other is not None:
            with ttt.adapt(other):
                pass
        with ttt.adapt(ids):
            outputs.append(model(ids[None]).logits)
    assert torch.equal(*outputs)


def test_only_the_fast_weights_projections_change():
    model = build("delta_net").eval()
    before = bits(model)
    chosen = {id(p) for p in chosen_parameters(model, "fast_weights")}
    with TestTimeTrainer(model, config(parameters="fast_weights")).adapt(prompt()):
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) != (id(p) in chosen), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["ntp", "refine", "closed form, selected"])
def test_prompts_side_by_side_are_prompts_alone(family, method):
    model = build(family).eval()
    prompts = [prompt(60, 1), prompt(47, 2), prompt(33, 3)]
    ttt = TestTimeTrainer(model, config(parameters="lora", steps=3, **METHODS[method]))
    with ttt.adapt(prompts):
        ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        together = model(ids, lengths=torch.tensor([len(p) for p in prompts])).logits
    for row, p in zip(together, prompts, strict=True):
        with ttt.adapt(p):
            alone = model(p[None]).logits[0]
        torch.testing.assert_close(row[: len(p)], alone, rtol=1e-7, atol=1e-9)


def test_what_scores_rows_together_takes_prompts_one_by_one():
    """Local windows are rows of their own, which adapters of the prompts' rows do not fit."""
    for nsp in (METHODS["expected"]["nsp"], NSPConfig.preset("context", **LOCAL)):
        ttt = TestTimeTrainer(build("delta_net").eval(), config(parameters="lora", nsp=nsp))
        assert not ttt.side_by_side()
        with pytest.raises(RefineError, match="give them one by one"), ttt.adapt([prompt(60, 1), prompt(47, 2)]):
            pass


def test_adapting_by_the_closed_form_raises_the_expected_reward():
    model, ids = build("delta_net").eval(), prompt(120)
    nsp = NSPConfig.preset("expected", lambda_ntp=0.0, **LOCAL)

    def reward() -> float:
        return float(ReFINEStep(model, nsp)(ids[None]).metrics["expected_reward"])

    before = reward()
    with TestTimeTrainer(model, config(steps=6, nsp=nsp)).adapt(ids):
        assert reward() > 1.5 * before > 0
    assert reward() == before


def test_scope_batch_shares_one_update_and_never_goes_on():
    model = build("delta_net").eval()
    before, prompts = bits(model), [prompt(60, 1), prompt(47, 2)]
    with TestTimeTrainer(model, config(scope="batch")).adapt(prompts):
        assert not same(model, before)
    assert same(model, before)
    never = TestTimeTrainer(model, config(scope="never"))
    with never.adapt(prompts):
        pass
    once = bits(model)
    assert not same(model, before)
    with never.adapt(prompts):
        pass
    assert not same(model, once)


def test_what_is_kept_is_stated():
    model = build("delta_net").eval()
    everything = TestTimeTrainer(model, config(optimizer="sgd"))
    some = TestTimeTrainer(model, config(optimizer="sgd", parameters="fast_weights"))
    for ttt in (everything, some):
        with ttt.adapt(prompt()):
            pass
    assert everything.last.extra_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert 0 < some.last.extra_bytes < everything.last.extra_bytes


def test_adapters_rows_must_be_multiples():
    model = build("delta_net").eval()
    with BatchLoRA(linear_layers(model), 3, 2, 4.0, 0).attached(), pytest.raises(ValueError, match="no multiple of 3"):
        model(torch.zeros(2, 5, dtype=torch.long))


def test_bad_input_is_refused_by_name():
    model = build("delta_net")
    with pytest.raises(RefineError, match="refine needs 8"), TestTimeTrainer(model, config()).adapt(prompt(5)):
        pass
    with pytest.raises(RefineError, match="weights of its own"), TestTimeTrainer(model, config()).adapt([prompt(), prompt()]):
        pass
    with pytest.raises(RefineError, match="got str"), TestTimeTrainer(model, config()).adapt("text"):
        pass
    with pytest.raises(RefineError, match=r"parameters='lor' is not one of .*did you mean"):
        TestTimeConfig(parameters="lor")
    with pytest.raises(RefineError, match="steps must be at least 1"):
        TestTimeConfig(steps=0)
    with pytest.raises(RefineError, match="belong to their prompt"):
        TestTimeConfig(parameters="lora", scope="never")
