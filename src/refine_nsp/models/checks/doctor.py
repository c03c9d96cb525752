"""Ask a model all of `lines.py`, and judge the differences by the model's own rounding.

An error e is the largest difference of a number between the two readings, over the size (root mean square) of what was expected. The
yardstick is the model's rounding r: the same distance between what was expected in the model's own precision and in float64, on a copy in
which casts to float32 are suspended. A line holds where

    e <= 10 r (r counted as at least 8 units of rounding)      in the model's own precision, and
    e <= 1e-8                                                  in float64, where only a fault is left.

A line that is not asked in float64 (`quick` asks one alone; saving and kernels make no sense there), or that compares a model's own
answers, takes the rounding of the first that was asked there, and holds where e <= 100 r. Gradients hold there where e <= 0.05 at least:
their rounding grows with depth far beyond that of values, and one that is lost is off by more than its size. Without a copy in float64 (it
does not fit into memory, or the model cannot run in it), r is taken to be 8 units of rounding, and the same holds. Where a model does not
run with its casts suspended, they stay, and 1e-8 is 1e-4.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from time import monotonic
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from refine_nsp.errors import RefineError, first_line
from refine_nsp.models.checks.equalities import Broken, NotApplicable, Pair, Probe
from refine_nsp.models.checks.lines import LINES, Line
from refine_nsp.models.checks.precision import float64_problem, float64_throughout, in_dtype, largest
from refine_nsp.models.checks.ways import Ways, quiet, ways_of

FACTOR = 10.0  # errors may be so many times the model's own rounding
LEAST_UNITS = 8  # and its rounding counts as at least so many units of its precision
EXACT = 1e-8  # in float64
EXACT_BUT_CASTS = 1e-4  # in float64, where a model's own casts to float32 stay
LOOSE_FACTOR = 100.0  # where the rounding is another line's
LOOSE_GRADIENT = 0.05  # and of gradients at least this share: 0.002 was seen of rounding, in 30 layers whose values round to 4e-6
TOKENS, QUICK_TOKENS, ROWS = 96, 20, 3
QUICK_IN_FLOAT64 = ("continuation",)
CHUNKS = ("sliding_window", "attention_chunk_size", "mamba_chunk_size", "chunk_size", "lact_chunk_size", "window_size")

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """Says what came of one check; its name, title, means and mend are the `Line`'s."""

    name: str
    title: str
    status: Literal["holds", "fails", "skipped"]  # skipped where the check does not apply
    error: float | None = None  # in the model's own precision, as a share of what was expected
    rounding: float | None = None  # the yardstick for it
    error_in_float64: float | None = None  # on the copy; None where there is none
    why: str = ""  # why it was skipped, or what failed in words
    means: str = ""
    mend: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Lists what was found of a model."""

    model: str
    dtype: str
    findings: list[Finding]
    notes: list[str]  # what the figures leave open
    seconds: float

    @property
    def failed(self) -> list[Finding]:
        """List what does not hold."""
        return [f for f in self.findings if f.status == "fails"]

    def as_json(self) -> dict[str, object]:
        """Return it all in plain values; a figure that is not finite is None."""
        findings = [
            {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in asdict(f).items()}
            for f in self.findings
        ]
        return asdict(self) | {"findings": findings, "holds": not self.failed}


def diagnose(
    module: nn.Module, ways: Ways | None = None, *, quick: bool = False, vocab_size: int | None = None, tokens: int | None = None,
    only: Sequence[str] = (), progress: Callable[[str], None] | None = None,
) -> Diagnosis:  # fmt: skip
    """Try a model on a few random tokens and say what holds of it.

    Args:
        module: any module. One of transformers needs nothing else; it is left as it was.
        ways: how it is called; by default as transformers calls its models.
        quick: leave out the dearer checks, read fewer tokens, and ask one line alone in float64.
        vocab_size: ids are below it; by default the configuration's.
        tokens: length of the sequences. only: names of lines; by default all. progress: hears the title of every check before it runs.

    Raises:
        RefineError: a module whose ways of calling are not known, or that cannot be called at all.
    """
    if ways is None:
        if not isinstance(module, PreTrainedModel):
            raise RefineError(
                f"{type(module).__name__} is no model of transformers, so how it is called is not known; pass ways=Ways(...)"
            )
        ways = ways_of(module)
    vocab_size = vocab_size if vocab_size is not None else _vocabulary(module)
    began, length = monotonic(), tokens or (QUICK_TOKENS if quick else TOKENS)
    if length < 16:
        raise RefineError(f"tokens={length} are too few for a prefix and what follows it; expected 16 or more")
    training = module.training
    probe = Probe(module.eval(), ways, _ids(module, vocab_size, length), length * 3 // 5, 2 if quick else max(2, length // 8))
    try:
        with quiet(), warnings.catch_warnings(), torch.random.fork_rng(), torch.no_grad():
            warnings.simplefilter("ignore")
            _call_once(probe)
            copies = Copies(probe, quick)
            findings = _ask_all(
                copies, [line for line in LINES if not only or line.name in only], progress or (lambda title: None)
            )
    finally:
        module.train(training)
    dtype = str(_dtype(module)).removeprefix("torch.")
    return Diagnosis(type(module).__name__, dtype, findings, _notes(module, length, copies), monotonic() - began)


def _ask_all(copies: Copies, lines: Sequence[Line], progress: Callable[[str], None]) -> list[Finding]:
    """Ask every line, and say of a failure which earlier one it comes with."""
    findings: list[Finding] = []
    for line in lines:
        progress(line.title)
        left_out = copies.quick and not line.quick
        found = Finding(line.name, line.title, "skipped", why="left out by quick") if left_out else copies.ask(line)
        roots = [f.title for f in findings if f.name in line.follows and f.status == "fails"]
        if found.status == "fails" and roots:
            found = replace(found, why="; ".join(x for x in (found.why, f"so does: {roots[0]}") if x))
        findings.append(found)
    return findings


class Copies:
    """Asks a model and its copies in other precisions; the float64 copy is made once, where it fits."""

    problem: str | None = None  # why there is no copy in float64
    suspended = True  # whether casts to float32 are suspended in float64; not where a model then mixes precisions

    def __init__(self, probe: Probe, quick: bool = False) -> None:
        self.own, self.dtype, self.quick = probe.of(probe.module), _dtype(probe.module), quick
        self.rounding: float | None = None  # of the first line that was asked in float64
        self.exact: Probe | None = None
        if self.dtype == torch.float64:
            self.suspended = self._runs(self.own) is None
            return
        self.own, self.problem = probe, float64_problem(probe.module)
        if self.problem is None:
            try:
                exact = probe.of(in_dtype(probe.module, torch.float64))
            except RuntimeError as error:
                self.problem = f"it cannot be copied ({first_line(error)})"
                return
            if self._runs(exact) is not None:
                self.suspended, exact = False, exact.of(exact.module)
                self.problem = self._runs(exact)
            self.exact = exact if self.problem is None else None

    def _runs(self, probe: Probe) -> str | None:
        """Say why a model does not run in float64; None if it does."""
        try:
            self._in_float64(lambda p: p.run(), probe)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # foreign code's, of any kind
            return f"it does not run in float64 ({type(error).__name__}: {first_line(error)})"
        return None

    def _in_float64(self, compare: Callable[[Probe], T], probe: Probe) -> T:
        with float64_throughout() if self.suspended else nullcontext():
            return compare(probe)

    def ask(self, line: Line) -> Finding:
        """Run one check and judge it."""
        try:
            if line.in_bfloat16:
                with suppress(Broken):
                    line.compare(self.own)  # where it does not apply, no copy is made
                own = line.compare(self.own.of(in_dtype(self.own.module, torch.bfloat16)))
            else:
                own = self._in_float64(line.compare, self.own) if self.dtype == torch.float64 else line.compare(self.own)
        except (NotApplicable, Broken, RefineError) as said:
            return _said(line, said)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # foreign code's, of any kind: that it fails is what was asked
            return _said(line, Broken(f"it fails with {type(error).__name__}: {first_line(error)}"))
        if own is None:
            return Finding(line.name, line.title, "holds")
        exact, why = None, ""
        if line.in_float64 and self.exact is not None and (not self.quick or line.name in QUICK_IN_FLOAT64):
            try:
                exact = self._in_float64(line.compare, self.exact)
            except (NotApplicable, Broken, RefineError) as said:
                return _said(line, said)
            except Exception as error:  # it runs in its own precision, which is what counts
                why = f"not in float64 ({type(error).__name__}: {first_line(error)})"
        return self._judge(line, own, exact, why)

    def _judge(self, line: Line, own: Pair, exact: Pair | None, why: str) -> Finding:
        error, least = largest(*own), LEAST_UNITS * torch.finfo(self.dtype).eps
        if exact is not None and not line.answers:
            rounding, factor = max(least, largest(exact[0], own[0])), FACTOR
            self.rounding = rounding if self.rounding is None else self.rounding
        else:
            rounding, factor = self.rounding or least, LOOSE_FACTOR
            rounding = max(rounding, LOOSE_GRADIENT / factor) if line.gradients else rounding
        in_float64 = error if self.dtype == torch.float64 else None if exact is None else largest(*exact)
        limit = EXACT if self.suspended else EXACT_BUT_CASTS
        holds = (error <= factor * rounding or self.dtype == torch.float64) and (in_float64 is None or in_float64 <= limit)
        if not holds and in_float64 is not None and in_float64 <= limit:
            why = "exact in float64: only the precision is at fault"
        if not math.isfinite(error):
            why = "NaN or infinity in what was found"
        found = Finding(line.name, line.title, "holds" if holds else "fails", error, rounding, in_float64, why)
        return found if holds else replace(found, means=line.means, mend=line.mend)


def _said(line: Line, said: Exception) -> Finding:
    """Say that a check does not apply, or that what it asks for does not hold."""
    if isinstance(said, Broken):
        return Finding(line.name, line.title, "fails", why=str(said), means=line.means, mend=line.mend)
    why = f"refused: {first_line(said)}" if isinstance(said, RefineError) else str(said)
    return Finding(line.name, line.title, "skipped", why=why)


def _call_once(probe: Probe) -> None:
    """Raise a RefineError where a model does not answer at all, or not with numbers for every token."""
    name = type(probe.module).__name__
    try:
        values = probe.run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # foreign code's, of any kind
        said = f"{type(error).__name__}: {first_line(error)}"
        raise RefineError(f"{name} cannot be called with ids alone ({said}); in Python say how by Ways(run=...)") from error
    if not isinstance(values, Tensor) or values.shape[:2] != probe.ids.shape:
        shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise RefineError(f"{name} returned {shape} for ids {list(probe.ids.shape)}; expected values [B, T, V]")
    if not bool(values.isfinite().all()):
        raise RefineError(f"{name} returns NaN or infinity for random tokens; nothing can be compared")


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _vocabulary(module: nn.Module) -> int:
    config = vars(module).get("config")
    if config is None:
        raise RefineError(f"{type(module).__name__} has no config; pass vocab_size")
    return int(config.get_text_config(decoder=True).vocab_size)


def _ids(module: nn.Module, vocab_size: int, length: int) -> Tensor:
    """Draw [B, T] ids, none of them among the first, where special tokens are, if there are enough others."""
    least, rows = 4 if vocab_size > 8 else 0, ROWS if length > QUICK_TOKENS else 2
    ids = torch.randint(least, vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    return ids.to(next((p.device for p in module.parameters()), torch.device("cpu")))


def _notes(module: nn.Module, length: int, copies: Copies) -> list[str]:
    """Say what the figures leave open."""
    notes = [f"no float64: {copies.problem}"] if copies.problem else []
    if not copies.suspended and not copies.problem:
        notes.append("its casts to float32 stay in float64, since it does not run without them")
    config = vars(module).get("config")
    fields = {} if config is None else config.get_text_config(decoder=True).to_dict()
    longer = {name: fields[name] for name in CHUNKS if isinstance(fields.get(name), int) and fields[name] >= length}
    if longer:
        notes.append(f"sequences of {length} tokens do not reach {', '.join(f'{n}={v}' for n, v in longer.items())}")
    return notes
