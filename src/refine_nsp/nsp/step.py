"""This is the page of the paper: one step of ReFINE, in the order of section 3.

Each line hands a frozen record to the next, and every record remembers the `Work` it was made for. The same step without rollouts is in
`closed_form.py`; `module.py` chooses between them by the settings.
"""

from refine_nsp.nsp.advantage import compare
from refine_nsp.nsp.forward import run
from refine_nsp.nsp.objective import learn
from refine_nsp.nsp.records import Rollouts, StepResult, Work
from refine_nsp.nsp.rewards import judge
from refine_nsp.nsp.rollouts import sample
from refine_nsp.nsp.selection import select


def refine(work: Work) -> StepResult:
    """Take one step on policy: everything comes from one pass over the sequences."""
    forward = run(work)
    prefixes = forward.states(select(forward))  # 3.1 positions, and the states there
    sampled = sample(forward, prefixes)  # 3.2 rollouts
    judged = judge(forward, sampled)  # 3.3 rewards
    rollouts = compare([judged], work)[0]  # 3.4 advantages
    return learn(forward, prefixes, rollouts)  # 3.4 losses


def first_pass(works: list[Work]) -> list[Rollouts]:
    """Make the rollouts of several steps by the policy as it is, compared with each other together; call it without gradients."""
    judged = []
    for work in works:
        forward = run(work)
        sampled = sample(forward, forward.states(select(forward)))
        judged.append(judge(forward, sampled))
    return compare(judged, works[0])


def second_pass(work: Work, rollouts: Rollouts) -> StepResult:
    """Learn from rollouts of a first pass, made by this policy or an earlier one."""
    forward = run(work, rollouts.positions)
    return learn(forward, forward.states(rollouts.positions), rollouts)
