"""Which jobs there are, in stages that need only earlier ones, and how they are dealt out to processes."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from refine_nsp.progress import step_progress

from . import jobs
from .jobs import Job, Study
from .settings import ABLATIONS, MID, MID_OF_TABLE_4, POST, SAME_TIME, TEST_TIME


def stages(study: Study, families: list[str], ablation_families: list[str]) -> list[list[Job]]:
    """The longest first within a stage, so that no process is left waiting."""
    seeds = range(study.scale.seeds)
    starts = list(MID_OF_TABLE_4.values())
    mids = [Job("mid", (f, arm, s)) for f in families for arm in reversed(MID) for s in seeds]
    ablations = [Job("mid", (f, arm, s)) for f in ablation_families for arm in ABLATIONS for s in seeds]
    same_time = [Job("mid", (f, SAME_TIME, s)) for f in families for s in seeds]
    posts = [Job("post", (f, start, s, v)) for f in families for v in reversed(POST) for start in starts for s in seeds]
    rates = [Job("rate", (f, method)) for f in families for method in TEST_TIME]
    controls = [Job(kind, (f, s)) for kind in ("sharpen_text", "sharpen_answers") for f in families for s in seeds]
    adapted = [
        Job("ttt", (f, start, s, v, method))
        for f in families
        for method in reversed(TEST_TIME)
        for start in starts
        for v in ("none", *POST)
        for s in seeds
    ]
    return [mids + [Job("base", (f,)) for f in families], same_time + posts, rates + controls, adapted, ablations]


def run_all(study: Study, planned: list[list[Job]], workers: int) -> None:
    """Run every job that has no result yet; a job that fails stops the run after those under way."""
    total = sum(map(len, planned))
    done = [j for stage in planned for j in stage if study.folder("jobs", f"{j.name}.json").exists()]
    log = study.folder("log.txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers: they share the cores
    context = get_context("spawn")
    with step_progress(total, len(done), "jobs") as progress:
        for stage in planned:
            missing = [j for j in stage if j not in done]
            with ProcessPoolExecutor(workers, mp_context=context, initializer=quiet, initargs=(str(log),)) as pool:
                for finished in as_completed([pool.submit(jobs.run, study, job) for job in missing]):
                    finished.result()
                    progress.advance(0)


def quiet(log: str) -> None:
    """Of a worker: what it prints goes to the log."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
