"""Cached context scores: those of the online run's first step, kept part by part, and never another model's, text's or setting's."""

import threading

import datasets
import pytest
import torch
from datasets import Dataset

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.training import scores
from refine_nsp.training.scores import scores_key, with_context_scores
from tests.models.families import build
from tests.training.test_trainer import assert_close, data, trainer, weights

CONFIG = NSPConfig(selection="context_kl", local_window=8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of our own, in parts of 4 rows."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(scores, "PART_ROWS", 4)
    return tmp_path / "cache" / "refine_nsp_context_scores"


@pytest.fixture
def scored(monkeypatch):
    """Rows that were scored, not read back; scoring stops at the row that `stop_at` names."""
    rows, original = [], scores.scores_of

    def count(row, *args):
        if len(rows) == count.stop_at:
            raise KeyboardInterrupt
        rows.append(row)
        return original(row, *args)

    count.stop_at, count.rows = None, rows
    monkeypatch.setattr(scores, "scores_of", count)
    return count


def packed_data() -> Dataset:
    g = torch.Generator().manual_seed(0)
    lengths = [[30, 25], [60], [21, 33]] * 3
    return Dataset.from_list(
        [{"input_ids": torch.randint(0, 64, (sum(n),), generator=g).tolist(), "lengths": n} for n in lengths]
    )


@pytest.mark.parametrize("rows", [data, packed_data], ids=["plain", "packed"])
@pytest.mark.parametrize("settings", [
    {"selection": "context_kl"},
    {"selection": "context_gain", "steps_per_generation": 2},
    {"preset": "expected", "reward_funcs": "prefix_match"},
    {"preset": "expected", "reward_funcs": "prefix_match", "token_weights": "context_gain"},
])  # fmt: skip
def test_the_first_step_is_that_of_the_online_run(tmp_path, rows, settings):
    online, cached = (
        trainer(tmp_path / name, context_scores=name, local_window=8, max_steps=1, train_dataset=rows(), **settings)
        for name in ("online", "cached")
    )
    assert [len(r["context_scores"]) for r in cached.train_dataset] == [len(r["input_ids"]) for r in cached.train_dataset]
    online.train()
    cached.train()
    assert_close(weights(online), weights(cached), atol=1e-12)
    for name in ("loss_ntp", "loss_policy"):
        assert online.state.log_history[0][name] == pytest.approx(cached.state.log_history[0][name], rel=1e-9, abs=1e-12)


def test_what_is_on_disk_is_not_scored_again(scored):
    model, rows = build("delta_net"), data(10)
    scored.stop_at = 6  # in the second part
    with pytest.raises(KeyboardInterrupt):
        with_context_scores(rows, model, CONFIG)
    assert not model.training
    scored.stop_at = None
    first = with_context_scores(rows, model, CONFIG)
    assert len(scored.rows) == 6 + 6  # the second part from its beginning, and the third; nothing of the first
    assert first["input_ids"][:] == rows["input_ids"][:]
    again = with_context_scores(rows, model, CONFIG)
    assert len(scored.rows) == 12 and again["context_scores"][:] == first["context_scores"][:]


def test_scoring_does_not_pickle_the_model(monkeypatch):
    def refuse(*args):
        raise AssertionError("datasets hashed the model")

    model = build("delta_net")
    monkeypatch.setattr(type(model), "__reduce_ex__", refuse)
    assert len(with_context_scores(data(6), model, CONFIG)) == 6


def test_another_model_text_or_setting_is_another_key():
    model, rows = build("delta_net"), data(10)
    key = scores_key(rows, model, CONFIG)
    assert key == scores_key(data(10), build("delta_net"), CONFIG)  # by content, not by object
    moved = build("delta_net")
    moved.config._name_or_path = "elsewhere"
    assert key == scores_key(rows, moved, CONFIG)
    with torch.no_grad():
        moved.lm_head.weight[0, 0] += 1e-6
    windowed = build("lact_swiglu", window_size=12), build("lact_swiglu", window_size=20)  # the same weights
    others = [
        scores_key(rows, moved, CONFIG),
        scores_key(rows, build("delta_net", dtype=torch.float32), CONFIG),
        scores_key(data(9), model, CONFIG),
        scores_key(rows, model, NSPConfig(selection="context_gain", local_window=8)),
        scores_key(rows, model, NSPConfig(selection="context_kl", local_window=9)),
        scores_key(rows, model, NSPConfig(selection="context_kl", local_window=8, local_span=3)),
        *(scores_key(rows, m, CONFIG) for m in windowed),
    ]
    assert len({key, *others}) == 1 + len(others)
    # What scores do not depend on shares them.
    assert key == scores_key(rows, model, NSPConfig(selection="context_kl", local_window=8, rollout_length=2, lambda_rl=1.0))


def test_rows_that_a_mixture_has_several_times_are_scored_once(tmp_path, scored):
    rows, settings = data(6), {"context_scores": "cached", "selection": "context_kl", "local_window": 8}
    plain = trainer(tmp_path / "a", train_dataset=rows, **settings).train_dataset["context_scores"][:]
    del scored.rows[:]
    order = [3, 0, 3, 5, 0, 3]
    again = trainer(tmp_path / "b", train_dataset=rows.select(order), **settings).train_dataset
    assert again["context_scores"][:] == [plain[i] for i in order] and len(scored.rows) == 3
    assert again["input_ids"][:] == [rows["input_ids"][i] for i in order]


def test_streams_and_settings_without_scores_are_refused():
    with pytest.raises(RefineError, match="use context_scores='online'"):
        with_context_scores(data(4).to_iterable_dataset(), build("delta_net"), CONFIG)
    with pytest.raises(RefineError, match="has nothing to keep: selection='entropy'"):
        with_context_scores(data(4), build("delta_net"), NSPConfig())


def test_processes_begin_with_parts_of_their_own_and_leave_none_out(scored):
    model, rows = build("delta_net"), data(10)  # parts of 4, 4 and 2 rows
    second = with_context_scores(rows, model, CONFIG, process=1, processes=2)
    order = [row["input_ids"] for row in scored.rows]
    assert order == [rows[i]["input_ids"] for i in (4, 5, 6, 7, 0, 1, 2, 3, 8, 9)]
    assert second["input_ids"][:] == rows["input_ids"][:]
    first = with_context_scores(rows, model, CONFIG, process=0, processes=2)
    assert len(scored.rows) == 10 and first["context_scores"][:] == second["context_scores"][:]


def test_scores_are_made_under_the_autocast_of_the_run(tmp_path, monkeypatch):
    """As its first step would make them online; and not taken for those of a run without."""
    seen, original = [], scores.with_context_scores
    monkeypatch.setattr("refine_nsp.training.scores.with_context_scores", lambda *args: seen.append(args[4]) or original(*args))
    kept = [
        trainer(
            tmp_path / str(bf16), dtype=torch.float32, bf16=bf16, context_scores="cached", selection="context_kl", local_window=8
        ).train_dataset[0]
        for bf16 in (True, False)
    ]
    assert seen == [torch.bfloat16, None] and kept[0]["context_scores"] != kept[1]["context_scores"]


def test_processes_that_have_not_all_of_the_weights_do_not_score(tmp_path, monkeypatch):
    monkeypatch.setattr("refine_nsp.training.scores.is_fsdp_enabled", lambda: True)
    with pytest.raises(RefineError, match=r"fsdp_cpu_ram_efficient_loading .* turn them off, or use context_scores='online'"):
        trainer(tmp_path, context_scores="cached", selection="context_kl", local_window=8)


def test_a_run_waits_for_another_that_scores_the_same(scored):
    """Two at once: every row is scored once, and both have all."""
    model, rows, found = build("delta_net"), data(10), []
    runs = [
        threading.Thread(target=lambda: found.append(with_context_scores(rows, model, CONFIG)["context_scores"][:])) for _ in "ab"
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(scored.rows) == 10 and len(found) == 2 and found[0] == found[1]
