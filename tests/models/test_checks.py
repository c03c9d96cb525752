"""The doctor: a healthy model passes, and each fault that was put into one is caught by the line that is meant for it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from refine_nsp.cli import main
from refine_nsp.errors import RefineError
from refine_nsp.models import with_states
from refine_nsp.models.checks import Ways, diagnose, doctor, equalities
from refine_nsp.models.checks.lines import LINES
from refine_nsp.models.checks.precision import largest
from tests.models.families import build
from tests.models.transformers_models import CONFIGS, plain

V, D = 32, 8
# transformers reads `cu_seq_lens_*` in FlashAttention alone, and its layers drop the cache when they are checkpointed.
OF_TRANSFORMERS = {"packed_cu_seqlens", "checkpointing_cache"}


class Toy(nn.Module):
    """A state that decays and takes in tokens. `fault` names what is done wrong."""

    def __init__(self, fault=""):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.ModuleDict({"0": nn.Embedding(V, D)})  # named as a layer is
        self.head = nn.Linear(D, V)
        self.fault, self.checkpointed = fault, False
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def forward(self, ids, state=None, mask=None, starts=None, caching=False):
        B, T = ids.shape
        x = self.first["0"](ids)
        if mask is not None and self.fault != "a pad gets in":
            x = x * mask[:, -T:, None]
        if self.fault == "rows leak":
            x = x + 0.1 * x.mean(0, keepdim=True)
        if self.fault == "the batch size counts":
            x = x * (1 + 0.1 * B)
        if self.fault == "a single token is scaled" and T == 1:
            x = 1.001 * x
        s = x.new_zeros(B, D) if state is None else state.to(x.dtype)
        if self.fault == "the state is detached":
            s = s.detach()
        if self.fault == "gradients round" and s.requires_grad:
            s.register_hook(lambda g: 1.001 * g)
        if self.fault == "the state is rounded":
            s = s.bfloat16().to(x.dtype)
        outputs = []
        for t in range(T):
            if starts is not None and t in starts and self.fault != "marks are ignored":
                s = torch.zeros_like(s)
            keep = 0.9 if mask is None else 1 - 0.1 * mask[:, t - T, None].to(x.dtype)
            s = keep * s + x[:, t]
            outputs.append(s)
        h = torch.stack(outputs, 1)
        if self.checkpointed and self.training and self.fault == "checkpointing forgets":
            h = h.detach() + 0 * h
        head = checkpoint(self.head, h, use_reentrant=False) if self.checkpointed and self.training else self.head(h)
        if self.fault == "chance":
            head = head + 1e-3 * torch.rand_like(head)
        kept = s.float() if s.dtype == torch.bfloat16 and self.fault != "states are bfloat16" else s
        return head, (None if self.checkpointed and self.training and self.fault == "checkpointing drops the cache" else kept)


def follow(module, ids, cache, seen, mask):
    forgetful = module.fault == "the cache is forgotten" or (module.fault == "several tokens forget" and ids.shape[1] > 1)
    return module(ids, None if forgetful else cache, mask)


def toy_generate(module, ids, count, use_cache):
    tokens, logits, state, x = [], [], None, ids
    for _ in range(count):
        values, state = module(x, state if use_cache and module.fault != "generate forgets" else None)
        logits.append(values[:, -1])
        tokens.append(logits[-1].argmax(-1, keepdim=True))
        x = tokens[-1] if use_cache else torch.cat([ids, *tokens], 1)
    return torch.cat(tokens, 1), torch.stack(logits, 1)


def toy_save(module, folder: Path):
    tensors = dict(module.state_dict())
    if module.fault == "a parameter is not saved":
        del tensors["head.bias"]
    save_file(tensors, folder / "model.safetensors")


def toy_load(module, folder: Path):
    again = Toy(module.fault)
    nn.init.zeros_(again.head.bias)
    again.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return again


WAYS = Ways(
    run=lambda module, ids: module(ids)[0],
    masked=lambda module, ids, mask: module(ids, mask=mask)[0],
    packed={
        way: lambda module, ids, lengths: module(ids, starts=[sum(lengths[:i]) for i in range(len(lengths))])[0]
        for way in ("position_ids", "cu_seqlens", "collator")
    },
    follow=follow,
    unaided=follow,
    generate=toy_generate,
    states=lambda cache: {"recurrent": cache},
    leaves=lambda cache: cache.detach().requires_grad_(),
    checkpoint=lambda module, on: setattr(module, "checkpointed", on),
    save=toy_save,
    load=toy_load,
)
FAULTS = {
    "a pad gets in": {"left_padding", "pads_content", "padded_continuation"},
    "rows leak": {"rows", "batch_size", "right_padding", "left_padding", "padded_continuation"},
    "the batch size counts": {"batch_size", "padded_continuation"},
    "a single token is scaled": {"single_tokens", "generation", "states"},
    "the state is detached": {"recurrence", "gradient"},
    "the state is rounded": {"continuation", "single_tokens", "states", "generation", "positions", "gradient"},
    "marks are ignored": {"packed_position_ids", "packed_cu_seqlens", "packed_collator"},
    "the cache is forgotten": {"continuation", "positions", "single_tokens", "states", "gradient", "recurrence"},
    "several tokens forget": {"continuation", "positions", "states", "gradient", "recurrence"},
    "generate forgets": {"generation"},
    "checkpointing forgets": {"checkpointing"},
    "checkpointing drops the cache": {"checkpointing_cache"},
    "a parameter is not saved": {"save_and_load"},
    "states are bfloat16": {"state_precision"},
}


def failures(found):
    return {f.name for f in found.failed}


# --- what is found ----------------------------------------------------------------------------------------------------
def test_a_healthy_module_of_any_kind_passes_and_only_kernels_are_not_asked():
    found = diagnose(Toy(), WAYS, vocab_size=V)
    assert not found.failed
    assert [f.name for f in found.findings if f.status == "skipped"] == ["kernels"]
    assert all(f.error_in_float64 < 1e-12 for f in found.findings if f.error_in_float64 is not None)
    assert found.as_json()["holds"] is True


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught_by_its_line_and_by_those_that_cannot_hold_without(fault):
    assert failures(diagnose(Toy(fault), WAYS, vocab_size=V)) == FAULTS[fault]


def test_a_failing_line_says_what_it_means_and_what_to_do_and_what_it_comes_from():
    found = {f.name: f for f in diagnose(Toy("several tokens forget"), WAYS, vocab_size=V).failed}
    assert found["continuation"].means and found["continuation"].mend
    assert "so does: a prefix" in found["gradient"].why


def test_a_model_that_only_reads_is_not_asked_the_rest():
    found = {
        f.name: f for f in diagnose(Toy(), Ways(run=WAYS.run, missing={"follow": "it takes no cache"}), vocab_size=V).findings
    }
    assert found["continuation"].why == "it takes no cache"
    assert found["rows"].status == "holds"
    assert not any(f.status == "fails" for f in found.values())


def test_errors_are_judged_by_the_model_s_own_rounding():
    """bfloat16 errs a thousand times more than float32 and passes; the same error in float32 is a fault."""
    assert not diagnose(Toy().bfloat16(), WAYS, vocab_size=V).failed
    assert "continuation" in failures(diagnose(Toy("the state is rounded"), WAYS, vocab_size=V))
    assert "batch_size" in failures(diagnose(Toy("chance"), WAYS, vocab_size=V))


def test_without_a_copy_in_float64_the_figures_say_so(monkeypatch):
    monkeypatch.setattr(doctor, "float64_problem", lambda module: "a float64 copy needs 9.0 GiB of 1.0 free")
    found = diagnose(Toy(), WAYS, vocab_size=V)
    assert not found.failed and found.notes == ["no float64: a float64 copy needs 9.0 GiB of 1.0 free"]
    assert all(f.error_in_float64 is None for f in found.findings)
    monkeypatch.undo()
    assert "continuation" in failures(diagnose(Toy("the cache is forgotten"), WAYS, vocab_size=V))


def test_a_module_that_does_not_run_without_its_casts_keeps_them():
    class Casts(Toy):
        def forward(self, *args, **kwargs):
            values, state = super().forward(*args, **kwargs)
            narrow = values.to(torch.float32)
            if narrow.dtype != torch.float32:
                raise RuntimeError("expected float32")
            return narrow, state

    found = diagnose(Casts(), WAYS, vocab_size=V)
    assert not found.failed and found.notes == ["its casts to float32 stay in float64, since it does not run without them"]


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_a_model_in_float64_is_its_own_yardstick(name):
    """Also one whose layers compute in float32 whatever the weights are."""
    found = diagnose(plain(name), only=["continuation", "single_tokens", "states", "left_padding", "batch_size"])
    assert not found.failed and all(f.error < 1e-10 for f in found.findings)


@pytest.mark.parametrize("name", ["llama", "mamba2"])
def test_models_of_transformers_are_called_as_they_are(name):
    found = diagnose(plain(name, dtype=torch.float32))
    packed = {f"packed_{way}" for way in ("position_ids", "cu_seqlens", "collator")} if name == "mamba2" else set()
    assert failures(found) == OF_TRANSFORMERS | packed


@pytest.mark.parametrize("name", ["delta_net", "llama"])
def test_models_with_states_hold_throughout(name):
    model = build(name, dtype=torch.float32) if name == "delta_net" else with_states(plain(name, dtype=torch.float32))
    assert not diagnose(model).failed


def test_a_wrapped_model_of_transformers_is_caught_too():
    class LetsPadsIn(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs):
            return super().forward(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache, **kwargs)

    torch.manual_seed(0)
    found = failures(diagnose(LetsPadsIn(CONFIGS["llama"]())))
    assert {"left_padding", "pads_content", "padded_continuation", "packed_position_ids", "packed_collator"} <= found
    assert not found & {"continuation", "right_padding", "rows", "gradient"}


def test_weights_the_mode_of_training_and_chance_are_left_as_they_were():
    model = plain("llama", dtype=torch.float32).train()
    before, chance = {name: x.clone() for name, x in model.state_dict().items()}, torch.get_rng_state()
    diagnose(model, only=["continuation", "gradient", "checkpointing", "checkpointing_cache"])
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), chance)
    assert model.training and not model.is_gradient_checkpointing and all(p.grad is None for p in model.parameters())


def test_kernels_are_asked_where_they_could_run(monkeypatch):
    (found,) = diagnose(Toy(), WAYS, vocab_size=V, only=["kernels"]).findings
    assert found.why.endswith("are not installed") or "CUDA" in found.why
    monkeypatch.setattr(equalities, "find_spec", lambda name: name)
    (found,) = diagnose(Toy(), WAYS, vocab_size=V, only=["kernels"]).findings
    assert found.why == "the model is not on a CUDA device, where kernels run"


def test_quick_asks_less():
    found = diagnose(Toy(), WAYS, vocab_size=V, quick=True)
    assert {f.name for f in found.findings if f.why == "left out by quick"} == {line.name for line in LINES if not line.quick}
    assert [f.name for f in found.findings if f.error_in_float64 is not None] == ["continuation"]
    assert {"continuation"} <= failures(diagnose(Toy("the cache is forgotten"), WAYS, vocab_size=V, quick=True))


def test_rounding_of_gradients_is_not_taken_for_a_fault_where_float64_is_not_asked():
    def fails(fault: str, quick: bool) -> bool:
        return "gradient" in failures(diagnose(Toy(fault), WAYS, vocab_size=V, quick=quick))

    assert fails("the state is detached", quick=True)
    assert fails("gradients round", quick=False) and not fails("gradients round", quick=True)


def test_what_is_not_a_number_fails_and_is_no_number_in_json():
    broken = replace(WAYS, masked=lambda module, ids, mask: module(ids)[0] * float("nan"))
    (found,) = diagnose(Toy(), broken, vocab_size=V, only=["left_padding"]).findings
    assert found.status == "fails" and found.why == "NaN or infinity in what was found"
    said = diagnose(Toy(), broken, vocab_size=V, only=["left_padding"]).as_json()
    assert json.loads(json.dumps(said, allow_nan=False))["findings"][0]["error"] is None


def test_distances_are_shares_of_a_tensor_s_size():
    x = {"a": torch.full((4,), 2.0), "b": torch.zeros(3)}
    assert largest(x, {"a": torch.tensor([2.0, 2.0, 2.0, 3.0]), "b": torch.zeros(3)}) == 0.5
    assert largest(x, {"a": x["a"], "b": torch.tensor([0.0, float("nan"), 0.0])}) == float("inf")


# --- models at loading ------------------------------------------------------------------------------------------------
def test_a_head_that_bends_its_logits_is_refused_under_any_name():
    with pytest.raises(RefineError, match="it caps its logits"):
        with_states(plain("recurrent_gemma"))


def test_mamba_2_has_states_in_bfloat16_too():
    model = with_states(plain("mamba2", dtype=torch.bfloat16))
    ids = torch.arange(24).view(2, 12)
    assert model(ids, lengths=torch.tensor([12, 7])).logits.dtype == torch.bfloat16


# --- the command, and bad input ---------------------------------------------------------------------------------------
def test_the_command_says_what_holds_and_exits_by_it(tmp_path, capsys):
    assert main(["check", "refine-nsp/tiny-delta-net", "--quick", "--tokens", "16", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["holds"] and said["dtype"] == "float32" and said["name"] == "refine-nsp/tiny-delta-net"
    assert [f["name"] for f in said["findings"]] == [line.name for line in LINES]

    plain("llama", dtype=torch.float32).save_pretrained(tmp_path)
    assert main(["check", str(tmp_path), "--only", "packed_cu_seqlens", "rows"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "fails: packed documents, by cu_seq_lens alone = apart" in said
    assert "for training: marks that are read by" in said and "what to do: pass position_ids too" in said
    assert main(["check", str(tmp_path), "--only", "packed_cu_seqlens", "rows", "--with_states"]) == 0


def test_bad_input_is_said_in_one_line(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}))
    assert main(["check", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "cannot be called without code of its own" in said and said.count("\n") == 1
    assert main(["check", "--only", "row"]) == 1
    assert "no check 'row' (did you mean 'rows'?)" in capsys.readouterr().err
    for module, settings, words in (
        (Toy(), {}, "no model of transformers, so how it is called is not known"),
        (Toy(), {"ways": WAYS}, "has no config; pass vocab_size"),
        (Toy(), {"ways": WAYS, "vocab_size": V, "tokens": 4}, "tokens=4 are too few"),
        (Toy(), {"ways": replace(WAYS, run=lambda m, ids: ids[:, 0]), "vocab_size": V}, "expected values"),
        (Toy(), {"ways": replace(WAYS, run=lambda m, ids: m(ids, wrong=1)), "vocab_size": V}, "cannot be called with ids alone"),
        (Toy(), {"ways": replace(WAYS, run=lambda m, ids: F.one_hot(ids) / 0 * 0.0), "vocab_size": V}, "NaN or infinity"),
    ):
        with pytest.raises(RefineError, match=words):
            diagnose(module, **settings)
