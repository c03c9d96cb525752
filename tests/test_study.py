"""The study: prompts of the right length and with their answers, parts that share no paragraph, matched entropies; whole
and resumed in the slow test."""

import dataclasses
import gzip
import itertools
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from benchmarks.study import carried, measuring, schedule, tables, twice
from benchmarks.study import material as m
from benchmarks.study.controls import LongCE
from benchmarks.study.jobs import Job, Study, chosen, settings_of
from benchmarks.study.records import pack, unpack
from benchmarks.study.schedule import stages
from benchmarks.study.settings import ARMS, EXPECTED, NTP, SCALES, TRIALS

import refine_nsp
from refine_nsp import NSPConfig, ReFINEConfig
from refine_nsp.errors import RefineError
from refine_nsp.evaluation.run import claim_folder
from refine_nsp.models.generation import prefill
from refine_nsp.nsp.context import context_divergence
from refine_nsp.nsp.records import Batch
from refine_nsp.training.phases import MicroBatch
from refine_nsp.training.test_time import TestTimeConfig, TestTimeTrainer
from tests.children import run_script

SCALE = SCALES["smoke"]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model():
    return refine_nsp.load("refine-nsp/tiny-delta-net")[0]


@pytest.fixture(scope="module")
def material():
    """All that is measured on, and of what is trained on every eighth module, since encoding the whole library takes long."""
    library = m.standard_library
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "standard_library", lambda held_out: library(held_out)[:: 1 if held_out else 8])
        return m.prepare(SCALE, refine_nsp.load("refine-nsp/tiny-delta-net")[1], m.Files())


def test_questions_hold_their_answer_once_and_fit(material):
    for q in m.questions(material, "report", "standard library", 512, 8):
        assert 450 < len(q.prompt) <= 512
        text = material.tokenizer.decode(q.prompt)
        name = text.rsplit(" =", 1)[0].rsplit(" ", 1)[1]
        assert text.count(f" {name} = {q.reference};") == 1 and text.endswith(f"What is {name}?\nAnswer: {name} =")


def test_parts_share_no_paragraph_and_windows_do_not_overlap_between_them(material):
    parts = [{tuple(p) for p in rows} for rows in material.paragraphs["standard library"].values()]
    assert all(parts) and not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    choose, report = ({tuple(r.tolist()) for r in material.windows[p]} for p in ("choose", "report"))
    assert not choose & report


@pytest.mark.slow
def test_an_adaptation_that_changes_nothing_gives_the_same_answers(model, material):
    """Sampled ones too: test-time training is compared with none on the same draws."""
    scale = dataclasses.replace(SCALE, qa_prompts=12, test_time_prompts=12)
    rows = material.paragraphs["standard library"]
    two = dataclasses.replace(material, paragraphs={"one": rows, "another": rows})
    adapter = TestTimeTrainer(model, TestTimeConfig(objective="ntp", learning_rate=1e-12))
    found = measuring.adapted_figures(model, two, scale, "report", 7, adapter)
    plain = measuring.qa_figures(model, two, scale, 7)
    for name in ("standard", "published"):
        assert found[name] == [x for figures in plain.values() for x in figures[name]]


def test_forced_figures_equal_a_whole_forward(model, material):
    asked = m.questions(material, "report", "standard library", 256, 3)
    hidden, cache = prefill(model, [q.prompt for q in asked])
    nll, entropy = measuring.forced(model, hidden, cache, [q.answer for q in asked], 0.7)
    for i, q in enumerate(asked):
        with torch.no_grad():
            logits = model(torch.tensor([q.prompt + q.answer])).logits[0, len(q.prompt) - 1 : -1] / 0.7
        log_p = logits.log_softmax(-1)
        torch.testing.assert_close(nll[i], -log_p.gather(-1, torch.tensor(q.answer)[:, None])[:, 0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(entropy[i], -(log_p.exp() * log_p).sum(-1), rtol=1e-3, atol=1e-4)


def test_matching_temperature(model, material):
    asked = m.questions(material, "choose", "standard library", 256, 6)
    entropy_at = measuring.answer_entropy(model, asked)
    assert entropy_at(0.8) < entropy_at(1.0)
    assert measuring.matching_temperature(entropy_at, entropy_at(0.8)) == pytest.approx(0.8, abs=1e-3)


def test_every_arm_of_a_seed_sees_the_same_rows(material):
    shorter, longer = (m.mid_rows(SCALE, material, 0, steps)["input_ids"] for steps in (2, 3))
    assert longer[: len(shorter)] == shorter


def study_at(folder, **changes):
    return Study(str(folder), dataclasses.replace(SCALE, **changes), m.Files())


def finish(study, job, **figures):
    path = study.path(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures))


# --- what is decided beforehand ---------------------------------------------------------------------------------------


def test_every_arm_has_the_same_budget_of_trials():
    assert {len(arm.trials) for arm in ARMS.values()} == {TRIALS}
    for arm in ARMS.values():
        for settings in arm.trials:
            given = {k: v for k, v in settings.items() if k != "gamma"}
            assert ReFINEConfig(output_dir="x", report_to="none", **arm.settings, **given).learning_rate == given["learning_rate"]


def test_settings_are_chosen_by_recall_within_a_limit_on_text_loss(tmp_path):
    study = study_at(tmp_path)
    for arm in (NTP, EXPECTED):
        for i, settings in enumerate(ARMS[arm].trials):
            worse = {0: 0.5, 1: 0.03, 2: 0.01}.get(i, 0.019) if arm == EXPECTED else 0.1 * i
            finish(
                study,
                Job("trial", (arm, i)),
                settings=settings,
                text_loss=2.0 + worse,
                tokens={0: 0.9, 1: 0.8, 2: 0.7}.get(i, 0.6),
            )
    assert chosen(study, NTP) == ARMS[NTP].trials[0]
    assert chosen(study, EXPECTED) == ARMS[EXPECTED].trials[2]  # the two that recall more cost too much text
    for i, settings in enumerate(ARMS[EXPECTED].trials):
        finish(study, Job("trial", (EXPECTED, i)), settings=settings, text_loss=3.0 - 0.1 * i, tokens=1.0 - 0.1 * i)
    assert chosen(study, EXPECTED) == ARMS[EXPECTED].trials[-1]  # all cost too much: the least


def test_stages_need_only_earlier_ones(tmp_path):
    planned = stages(study_at(tmp_path, families=("DeltaNet", "LaCT")))
    names = [j.name for stage in planned for j in stage]
    assert len(names) == len(set(names))
    at = {j.name: i for i, stage in enumerate(planned) for j in stage}
    assert at["trial-NTP-0"] < at["mid-LaCT-NTP-0"] and at["far-LaCT"] < at["base-LaCT-0"]
    assert at["mid-DeltaNet-expected_K_3-0"] < at["mid-DeltaNet-NTP_same_wall_time-0"]
    assert at["mid-LaCT-expected_K_3-1"] < at["sharpen-LaCT-NTP-1"]
    assert at["mid-DeltaNet-NTP-0"] < at["post-NTP-0-SFT"] < at["rate-expected"] < at["ttt-NTP-0-SFT-expected"]
    assert "mid-LaCT-paper-0" not in at


def test_shards_do_every_job_once_and_wait_for_each_other(tmp_path, monkeypatch):
    done = []

    class Pool:
        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *failure):
            pass

        def submit(self, run, study, job):
            finish(study, job)
            done.append(job.name)
            future = Future()
            future.set_result(None)
            return future

    monkeypatch.setattr(schedule, "ProcessPoolExecutor", Pool)
    study, planned = study_at(tmp_path), [[Job("a", (i,)) for i in range(5)], [Job("b", (i,)) for i in range(3)]]
    assert not schedule.run_all(study, planned, 1, (1, 2))
    assert done == ["a-0", "a-2", "a-4"]  # the next stage needs what the other shard has not done
    assert schedule.run_all(study, planned, 1, (2, 2)) is False and done[3:] == ["a-1", "a-3", "b-1"]
    assert schedule.run_all(study, planned, 1, (1, 2)) and done[6:] == ["b-0", "b-2"]
    assert schedule.read_shard("2/3") == (2, 3)
    for wrong in ("0/3", "4/3", "2", "a/b"):
        with pytest.raises(RefineError, match="i/n"):
            schedule.read_shard(wrong)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_the_primary_outcome_counts_needles_of_long_prompts_alone():
    ruler = {
        "niah_single_1": {"512": 1.0, "1024": 0.5, "2048": 0.1},
        "niah_multivalue": {"1024": 0.2, "2048": 0.0},
        "qa_1": {"1024": 1.0},
    }
    assert tables.needles({"ruler": ruler}) == pytest.approx((0.3 + 0.1) / 2)
    assert tables.questions({"ruler": ruler}) == 1.0


def test_holm():
    assert tables.holm({"a": 0.01, "b": 0.04}) == {"a": 0.02, "b": 0.04}
    assert tables.holm({"a": 0.03, "b": 0.02}) == {"b": 0.04, "a": 0.04}  # never less than a smaller one's
    assert tables.holm({"a": 0.7, "b": 0.6}) == {"b": 1.0, "a": 1.0}


def test_far_tokens_are_those_the_context_score_is_greatest_at(model, material):
    windows = material.windows["report"][:2]
    at = measuring.far_tokens(model, windows, W=32)
    counted = sum(map(len, at))
    assert counted == round(0.05 * 2 * (windows.shape[1] - 1))
    assert all(t >= 64 for row in at for t in row)
    found = measuring.figures_at(model, windows, at)
    with torch.no_grad():
        log_p = model(windows).logits.log_softmax(-1)
    picked = [(log_p[i, t], windows[i, t + 1]) for i, row in enumerate(at) for t in row]
    assert found["loss"] == pytest.approx(-sum(float(p[x]) for p, x in picked) / counted, abs=1e-4)
    assert found["accuracy"] == pytest.approx(sum(float(p.argmax() == x) for p, x in picked) / counted, abs=1e-6)


def test_long_ce_weighs_tokens_by_their_gain(model, material):
    config = NSPConfig(selection="context_gain", local_window=32, local_span=4)
    rows = material.windows["report"][:2]
    batch = MicroBatch(Batch.of(rows), totals={"targets": rows.numel() - 2})
    loss, metrics = LongCE(config, gamma=5.0).loss(model, batch)
    with torch.no_grad():
        hidden = model.model(rows, use_cache=False).last_hidden_state
        gain = context_divergence(model, batch.sequences, hidden, config, gain=True)[:, :-1]
        nll = -model(rows).logits[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
    assert float(loss) == pytest.approx(float((gain.exp().clamp(max=5.0) * nll).mean()), rel=1e-5)
    assert float(metrics["loss_ntp"]) == pytest.approx(float(nll.mean()), rel=1e-5)
    assert float(gain.exp().max()) > 5.0  # so that the bound binds somewhere


def test_what_the_plan_names_and_the_tables_lack_is_said(tmp_path):
    study = study_at(tmp_path)
    everything = [job for stage in stages(study) for job in stage]
    for job in everything:
        finish(study, job)
    assert tables.not_run_yet(study) == ""
    study.path(Job("mid", ("DeltaNet", "paper", 1))).unlink()
    study.path(Job("sharpen", ("LaCT", NTP, 0))).unlink()
    study.path(Job("rate", ("expected",))).unlink()
    assert tables.not_run_yet(study) == "Planned and not run yet: the arm paper; LaCT at equal entropy; test time.\n"
    assert "paper" not in tables.Results(study, "DeltaNet").arms() and EXPECTED in tables.Results(study, "DeltaNet").arms()


def test_no_tables_before_the_test_is_complete(tmp_path):
    flags = ["--scale", "smoke", "--so_far", "--output_dir", str(tmp_path)]
    code, said = run_script(ROOT / "benchmarks" / "paper_tables.py", flags, tmp_path / "log.txt")
    assert code == 1 and "mid-LaCT-NTP-0" in said and "Traceback" not in said


def test_packed_figures_are_those_of_the_jobs_and_packing_again_changes_nothing(tmp_path):
    study, job = study_at(tmp_path / "a"), Job("mid", ("DeltaNet", NTP, 0))
    claim_folder(tmp_path / "a", settings_of(study))
    finish(study, job, loss=0.1 + 0.2)
    pack(tmp_path / "a", tmp_path / "all.json.gz")
    unpack(tmp_path / "all.json.gz", tmp_path / "b")
    assert study_at(tmp_path / "b").result(job) == {"loss": 0.1 + 0.2}
    pack(tmp_path / "b", tmp_path / "again.json.gz")
    assert (tmp_path / "again.json.gz").read_bytes() == (tmp_path / "all.json.gz").read_bytes()


def test_packed_figures_of_other_settings_or_other_files_are_refused(tmp_path):
    claim_folder(tmp_path / "a", settings_of(study_at(tmp_path / "a")))
    pack(tmp_path / "a", tmp_path / "all.json.gz")
    claim_folder(tmp_path / "b", settings_of(study_at(tmp_path / "b", mid_steps=7)))
    with pytest.raises(RefineError, match="other settings"):
        unpack(tmp_path / "all.json.gz", tmp_path / "b")
    (tmp_path / "text.gz").write_text("no figures")
    with pytest.raises(RefineError, match="damaged or something else"):
        unpack(tmp_path / "text.gz", tmp_path / "c")


def test_the_document_of_the_study_is_what_its_kept_figures_give(tmp_path):
    records = ROOT / "benchmarks" / "study" / "records" / "medium.json.gz"
    unpack(records, tmp_path)
    scale, names = SCALES["medium"], json.loads((tmp_path / "settings.json").read_text())
    files = m.Files(**{f.name: names[f.name] for f in dataclasses.fields(m.Files)})
    study = Study(str(tmp_path), scale, files)
    tables.write_results(study, "medium", tmp_path / "results.md")
    carried.write(carried.RECORD, tmp_path / "results.md")
    written, kept = ((p.read_text().split("\n## ", 1)[1]) for p in (tmp_path / "results.md", ROOT / "docs" / "results.md"))
    assert written == kept


def test_the_section_of_carried_states_pairs_whole_seeds_and_is_written_once(tmp_path):
    """A seed counts when all of its arms are there: here the second, in which `carried` is .2 below `windows` beyond W, as in the first."""
    record, document, jobs = tmp_path / "record.gz", tmp_path / "results.md", {}
    for base in carried.BASES:
        jobs[carried.name_of("base", base)] = {"one_pass": [[3.0] * 8], "windows": [[2.5] * 8], "growth": 2.0}
        for seed, arm in itertools.product((0, 1), carried.ARMS):
            losses = [2.0 + seed, *[2.0 + seed - 0.2 * (arm == carried.CARRIED)] * 7]
            jobs[carried.name_of("train", base, arm, seed)] = {"one_pass": [losses] * 2, "growth": 1.0, "seconds": 1.0}
    jobs[carried.name_of("train", "LaCT", carried.CARRIED, 2)] = jobs[carried.name_of("train", "LaCT", carried.CARRIED, 0)]
    settings = {"steps": 48, "lanes": 8, "window": 1024, "span": 8, "needles": 4, "made": {"python": "3"}}
    document.write_text("# Results\n\n\n## The test\n\nx\n\n\n## Reading twice\n\ny\n")
    for _ in range(2):
        record.write_bytes(gzip.compress(json.dumps({"settings": settings, "jobs": jobs}).encode()))
        carried.write(record, document)
    written = document.read_text()
    assert re.findall("^## (.*)", written, re.M) == ["The test", "Carried states", "Reading twice"] and written.endswith(
        "\n\ny\n"
    )
    assert (
        "| W to 8W | carried - windows | -0.200 ± 0.000 *" in written
        and "| within W | carried - windows | +0.000 ± 0.000 |" in written
    )
    assert "nats, 2 seeds" in written and "RULER" not in written and (tmp_path / "results" / carried.PICTURE).exists()
    record.write_bytes(gzip.compress(json.dumps({"settings": settings, "jobs": {}}).encode()))
    with pytest.raises(RefineError, match="no seed has all of its arms"):
        carried.write(record, document)


def test_the_section_of_reading_twice_pairs_prompts_and_is_written_once(tmp_path):
    def scores(one, two):
        return {f"{task} {n}": [one, two, 0.0] for task in ("niah_single_1", "vt") for n in (1024, 2048)}

    plain = {twice.ONCE: scores(0.0, 1.0), twice.TWICE: {cell: x[:2] for cell, x in scores(1.0, 1.0).items()}}
    adapted = {
        way: {c: x[:1] for c, x in scores(0.0, 0.0).items() if "niah" in c} for way in (twice.ADAPTED, twice.ADAPTED_TWICE)
    }
    notes = twice.notes_of("a.txt", 1e-4, {"LaCT": (3.0, 1.0, 2.0)})
    document = tmp_path / "results.md"
    document.write_text("# Results\n\n\n## The test\n\nx\n\n\n## Earlier bases\n\nLast.\n")
    for found in ({"DeltaNet": plain | adapted, "LaCT": plain}, {"DeltaNet": plain | adapted, "LaCT": plain | adapted}):
        twice.keep(found, notes, tmp_path / "record.gz")
        twice.write(tmp_path / "record.gz", document)
    written = document.read_text()
    assert re.findall("^## (.*)", written, re.M) == ["The test", "Reading twice", "Earlier bases"]
    assert written.startswith("# Results\n\n\n## The test\n\nx\n\n\n## Reading") and written.endswith(
        "\n\n\n## Earlier bases\n\nLast.\n"
    )
    # Three prompts were read once and two twice, so two are compared: 0 and 1 against 1 and 1.
    assert "| LaCT | 2048 | needles (1) | 50.0 ± 50.0 | 100.0 ± 0.0 | +50.0 (-100.0 to +100.0) |" in written
    assert (
        "2 prompts a cell (seed 42, essays: a.txt)" in written
        and "LaCT 3.00 to adapt, 1.00 to answer, 2.00 read twice" in written
    )
    assert written.count("Reading twice next to test-time training") == 1
    with pytest.raises(RefineError, match="no answer yet"):
        twice.keep({"DeltaNet": {twice.ONCE: plain[twice.ONCE]}}, notes, tmp_path / "record.gz")


@pytest.mark.slow
def test_the_whole_study_and_that_nothing_is_done_twice(tmp_path):
    command = [sys.executable, "benchmarks/paper_tables.py", "--scale", "smoke", "--models", "DeltaNet"]
    command += ["--workers", "1", "--output_dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=1500)
    results = (tmp_path / "smoke" / "results.md").read_text()
    for title in (
        "decided beforehand",
        "greedy",
        "sampled as published",
        "Test-time training",
        "expected - CE at the same weights",
    ):
        assert title in results
    assert (tmp_path / "smoke" / "results" / "deltanet_arms.svg").exists()
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "smoke" / "jobs").glob("*.json")}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    assert {p: p.stat().st_mtime_ns for p in files} == files
    # Of a study whose figures alone were kept, the models are trained again, and give the same figures.
    shutil.rmtree(tmp_path / "smoke" / "models")
    again = [tmp_path / "smoke" / "jobs" / f"{name}.json" for name in ("sharpen-DeltaNet-NTP-1", "sharpen_answers-1")]
    before = [path.read_text() for path in again]
    for path in again:
        path.unlink()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    assert [path.read_text() for path in again] == before
    assert json.loads((tmp_path / "smoke" / "settings.json").read_text())["scale"]["seeds"] == SCALE.seeds
