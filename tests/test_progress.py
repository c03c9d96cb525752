"""Loading and saving show their progress as all long work does, and only where it takes more than seconds."""

import pytest
import torch
from transformers.utils import logging

from refine_nsp import progress
from refine_nsp.models.load import load_model
from tests.models.families import build


@pytest.mark.filterwarnings("ignore:.*has no tokenizer")
@pytest.mark.parametrize("patience", [0.0, 60.0])
def test_weights_are_counted_as_they_are_loaded(tmp_path, monkeypatch, capsys, patience):
    model = build("delta_net", dtype=torch.float32)
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", patience)
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0.0)
    before = logging.set_tqdm_hook(progress.as_ours)
    try:
        model.save_pretrained(tmp_path, max_shard_size=40_000)
        loaded = load_model(tmp_path)
    finally:
        logging.set_tqdm_hook(before)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    said, weights = capsys.readouterr().err, len(model.state_dict())
    assert (f"loading weights: {weights}/{weights}" in said) == ("writing model shards: 2/" in said) == (patience == 0.0)
    assert "it/s" not in said
