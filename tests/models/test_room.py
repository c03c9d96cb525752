"""Weights that the machine has no memory for are refused before any is read, and only where that is known."""

import pytest
import torch

from refine_nsp.errors import RefineError
from refine_nsp.models import convert as conversion
from refine_nsp.models import room
from refine_nsp.models.load import load_config, load_model
from refine_nsp.training.teacher import load_teacher
from tests.models.families import build
from tests.models.test_convert import MEMORY, saved


def free(monkeypatch, number):
    for module in (room, conversion):
        monkeypatch.setattr(module, "memory_available", lambda: number)


@pytest.mark.filterwarnings("ignore:.*has no tokenizer")
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_too_little_memory_is_refused_before_a_weight_is_read(tmp_path, monkeypatch, shards):
    model = build("delta_net", dtype=torch.float32)
    numbers = sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path, **({"max_shard_size": 40_000} if shards else {}))
    assert (len(room.weight_files(str(tmp_path))) > 1) == shards
    free(monkeypatch, 3 * numbers)
    assert load_model(tmp_path, dtype="bfloat16").dtype == torch.bfloat16
    monkeypatch.setattr(type(model), "from_pretrained", lambda *args, **kwargs: pytest.fail("weights are read"))
    for load in (load_model, lambda name: load_teacher(str(name), None, model, torch.device("cpu"))):
        with pytest.raises(RefineError, match=r"take 0\.0 GB in memory, and 0\.0 GB are free: load them in bfloat16") as error:
            load(tmp_path)
        assert "\n" not in str(error.value)
    free(monkeypatch, numbers)
    with pytest.raises(RefineError, match="take a smaller model"):
        load_model(tmp_path, dtype="bfloat16")


def test_what_cannot_be_known_is_not_refused(tmp_path, monkeypatch):
    model = build("delta_net", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    free(monkeypatch, 1)
    room.check_room("nobody/no-such-model", config, None, ())
    room.check_room(str(tmp_path), config, None, ("device_map",))
    monkeypatch.setenv(room.PARTIAL_LOADING, "true")
    room.check_room(str(tmp_path), config, None, ())
    monkeypatch.delenv(room.PARTIAL_LOADING)
    (tmp_path / room.WEIGHTS).write_bytes(b"damaged")
    room.check_room(str(tmp_path), config, None, ())
    free(monkeypatch, None)
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).config.hidden_size == model.config.hidden_size


@pytest.mark.filterwarnings("ignore:.*has no tokenizer")
def test_a_conversion_needs_memory_for_one_weight(tmp_path, monkeypatch):
    source = saved(tmp_path / "source")
    free(monkeypatch, 1000)
    with pytest.raises(RefineError, match=r"the largest weight of .* as it is converted"):
        conversion.convert(source, tmp_path / "new", MEMORY)
    assert not (tmp_path / "new").exists()
