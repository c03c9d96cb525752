"""List the jobs in stages that need only earlier ones, and deal them out to processes and machines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from refine_nsp.errors import RefineError
from refine_nsp.progress import step_progress

from . import jobs
from .jobs import Job, Study
from .settings import ARMS, MAIN, POST, POST_AFTER, PRIMARY, SAME_TIME, SHARPENED, STARTS, TEST_TIME


def seeds_of(study: Study, arm: str) -> range:
    """List the seeds that an arm is trained with."""
    return range(study.scale.seeds if arm in PRIMARY else study.scale.other_seeds)


def arms_of(family: str) -> list[str]:
    """List the arms that a base is trained by, besides NTP for the same wall time."""
    return list(ARMS if family == MAIN else PRIMARY)


def stages(study: Study) -> list[list[Job]]:
    """List the stages: the primary test first, then what is only described.

    Seed by seed within a stage, so that whatever the machine does meets all arms alike.
    """
    s = study.scale
    first = [Job("far", (f,)) for f in s.families]
    bases = [Job("base", (f, seed)) for seed in range(s.seeds) for f in s.families]
    sharpened = [Job("sharpen", (f, arm, seed)) for seed in range(s.seeds) for f in s.families for arm in SHARPENED]
    others = [arm for arm in ARMS if arm not in PRIMARY]
    same_time = [Job("mid", (MAIN, SAME_TIME, seed)) for seed in seeds_of(study, SAME_TIME)]
    post_seeds = range(s.post_seeds)
    posts = [Job("post", (start, seed, v)) for seed in post_seeds for start, after in POST_AFTER.items() for v in after]
    rates = [Job("rate", (method,)) for method in TEST_TIME]
    answers = [Job("sharpen_answers", (seed,)) for seed in post_seeds]
    adapted = [
        Job("ttt", (start, seed, v, method))
        for seed in post_seeds
        for method in TEST_TIME
        for start in STARTS
        for v in ("none", *POST)
    ]
    return [
        first + trials(PRIMARY), mids(study, PRIMARY) + bases, sharpened,
        [*trials(others), Job("cost", (MAIN,))], mids(study, others) + same_time,
        [*posts, Job("post_cost", ())], rates + answers, adapted,
    ]  # fmt: skip


def trials(arms: Sequence[str]) -> list[Job]:
    return [Job("trial", (arm, i)) for arm in arms for i in range(len(ARMS[arm].trials))]


def mids(study: Study, arms: Sequence[str]) -> list[Job]:
    """List the mid-training jobs of these arms on the bases that have them."""
    return [
        Job("mid", (f, arm, seed))
        for seed in range(study.scale.seeds)
        for f in study.scale.families
        for arm in arms_of(f)
        if arm in arms and seed in seeds_of(study, arm)
    ]


def unfinished(study: Study) -> set[Job]:
    """Select the jobs that have left no figures yet."""
    return {job for stage in stages(study) for job in stage if not study.path(job).exists()}


def run_all(study: Study, planned: Sequence[Sequence[Job]], workers: int, shard: tuple[int, int] = (1, 1)) -> bool:
    """Run every job of this shard that has no result yet, stage by stage; return whether all stages are complete.

    A job that fails stops the run after those under way. With several shards a stage can wait for jobs of others: then it stops.
    """
    index, count = shard
    mine = [[job for i, job in enumerate(stage) if i % count == index - 1] for stage in planned]
    log = study.folder("log.txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers: they share the cores
    context = get_context("spawn")
    done = sum(study.path(job).exists() for stage in mine for job in stage)
    with step_progress(sum(map(len, mine)), done, "jobs") as progress:
        for stage, own in zip(planned, mine, strict=True):
            missing = [job for job in own if not study.path(job).exists()]
            with ProcessPoolExecutor(workers, mp_context=context, initializer=quiet, initargs=(str(log),)) as pool:
                try:
                    for finished in as_completed([pool.submit(jobs.run, study, job) for job in missing]):
                        finished.result()
                        progress.advance(0)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)  # those not begun; leaving the block waits for the others
                    raise
            if not all(study.path(job).exists() for job in stage):
                return False
    return True


def read_shard(text: str) -> tuple[int, int]:
    """Read a shard such as `2/3`, the second of three. Raises RefineError for anything else."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise RefineError(f"--shard {text!r}: expected i/n with 1 <= i <= n, as in 2/3")
    return int(index), int(count)


def quiet(log: str) -> None:
    """Send what a worker prints to the log."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
