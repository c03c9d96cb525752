"""The small-scale study: prompts of the right length and with their answers, parts that share no paragraph, matched entropies; whole
and resumed in the slow test."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.small_scale import material as m
from benchmarks.small_scale import measuring
from benchmarks.small_scale.jobs import Study
from benchmarks.small_scale.schedule import stages
from benchmarks.small_scale.settings import SCALES

import refine_nsp
from refine_nsp.models.generation import Decoding, prefill
from refine_nsp.training.test_time import TestTimeConfig, TestTimeTrainer

SCALE = SCALES["smoke"]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model():
    return refine_nsp.load("refine-nsp/tiny-delta-net")[0]


@pytest.fixture(scope="module")
def material():
    return m.prepare(SCALE, refine_nsp.load("refine-nsp/tiny-delta-net")[1], None, None)


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


@pytest.mark.parametrize(("task", "asked"), [("S", 1), ("MK", 1), ("MQ", 4), ("MV", 4)])
def test_needles(material, task, asked):
    for n in m.needles(material, task, 256, 8, 4, seed=0):
        assert len(n.prompt) == 256 and len(n.answers) == asked == len(n.following) + 1
        text = material.tokenizer.decode(n.prompt)
        assert all(material.tokenizer.decode(a) + ";" in text for a in n.answers)


def test_values_found_count_once(model, material, monkeypatch):
    """An oracle that names each asked value in turn finds all; one that repeats the first finds one of four."""
    needles = m.needles(material, "MV", 256, 8, 3, seed=0)
    turns = iter(range(100))
    given = {}

    def oracle(model, hidden, cache, requests, *args, **kwargs):
        turn = next(turns)
        return [n.answers[0 if given.get("same") else turn % 4] for n in needles]

    monkeypatch.setattr(measuring, "decode", oracle)
    read = prefill(model, [n.prompt for n in needles])
    assert measuring.in_turn(model, needles, *read, Decoding()) == [1.0] * 3
    given["same"] = True
    assert all(x in (0.25, 0.5) for x in measuring.in_turn(model, needles, *read, Decoding()))


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


def test_stages_need_only_earlier_ones(tmp_path):
    planned = stages(Study(str(tmp_path), SCALE, None, None), ["DeltaNet", "LaCT"], ["DeltaNet"])
    names = [j.name for stage in planned for j in stage]
    assert len(names) == len(set(names))
    at = {j.name: i for i, stage in enumerate(planned) for j in stage}
    assert at["mid-LaCT-NTP-0"] < at["mid-LaCT-NTP_same_wall_time-0"]
    assert at["mid-LaCT-NTP-0"] < at["post-LaCT-NTP-0-SFT"] < at["rate-LaCT-ntp"] < at["ttt-LaCT-NTP-0-SFT-ntp"]


@pytest.mark.slow
def test_the_whole_study_and_that_nothing_is_done_twice(tmp_path):
    command = [sys.executable, "benchmarks/paper_tables.py", "--scale", "smoke", "--models", "DeltaNet", "--ablations"]
    command += ["--workers", "1", "--output_dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=1500)
    results = (tmp_path / "smoke" / "results.md").read_text()
    for title in ("greedy", "sampled as published", "test-time training", "needles", "differences to NTP"):
        assert title in results
    assert (tmp_path / "smoke" / "results" / "deltanet_arms.svg").exists()
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "smoke" / "jobs").glob("*.json")}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    assert {p: p.stat().st_mtime_ns for p in files} == files
    assert json.loads((tmp_path / "smoke" / "settings.json").read_text())["scale"]["seeds"] == SCALE.seeds
