"""Test-time training (paper, section 3.5) adapts the weights on the prompt alone, answers, and restores them.

Only what changes is copied, once, and copied back bit by bit, also after an exception or Ctrl-C. The published code never restores:
later prompts are answered with weights trained on earlier ones (`scope="never"` does that).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from refine_nsp.config import NSPConfig, Objective, check_choices
from refine_nsp.errors import RefineError
from refine_nsp.fields import Reader, check_read, setting
from refine_nsp.models.protocols import CausalModel
from refine_nsp.nsp.records import Batch
from refine_nsp.nsp.schedule import Needs, with_schedule
from refine_nsp.ops.memory import part
from refine_nsp.training.answers import pad
from refine_nsp.training.phases import PHASES, MicroBatch
from refine_nsp.training.remedies import TEST_TIME

Prompt = Tensor | Sequence[int] | Sequence[Tensor] | Sequence[Sequence[int]]  # token ids of one prompt or of several
OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
PUBLISHED_PROMPTS = 4  # the published code takes two optimizer steps on a batch of eight prompts, each on so many

ADAPTERS = Reader("parameters='lora'", lambda c: c.parameters == "lora")
DRAWN = Reader(
    "positions or adapters that are drawn (estimator='sampled', token_weights='selected' or parameters='lora')",
    lambda c: c.nsp.selects or c.parameters == "lora",
)


@dataclass(frozen=True)
class TestTimeConfig:
    """Say how a model is adapted to a prompt.

    Attributes:
        objective: `refine`, or `ntp`: the cross-entropy on the prompt alone.
        scope: restore after each `example`, after each `batch` (its prompts share one update), or `never`. Default: `example`; with
            `published` among the settings of ReFINE `never`, and an optimizer step for every four prompts of a batch.
        steps: optimizer steps on a prompt.
        learning_rate, optimizer, max_grad_norm: settings of those steps (`adamw` or `sgd`).
        weight_decay: their weight decay. Default: 0; with `published` 0.01.
        parameters: `all`; `fast_weights`: only the projections that write and read the fast weights; `lora`: adapters on all linear
            layers, by which several prompts are adapted side by side.
        lora_r, lora_alpha: rank and scale of the adapters.
        nsp: settings of ReFINE; the paper's test-time preset by default.
        seed: seeds positions and rollouts; the same prompt is always adapted alike.

    Raises:
        RefineError: a value is out of range; the message names it.
    """

    __test__ = False  # pytest would take it for a test by its name

    objective: Objective = setting("refine")
    scope: Literal["example", "batch", "never"] | None = setting(None, common=True)
    steps: int = setting(1, common=True)
    learning_rate: float = setting(1e-6, common=True)
    optimizer: Literal["adamw", "sgd"] = setting("adamw")
    weight_decay: float | None = setting(None)
    max_grad_norm: float = setting(1.0)
    parameters: Literal["all", "fast_weights", "lora"] = setting("all", common=True)
    lora_r: int = setting(8, read_by=ADAPTERS)
    lora_alpha: float = setting(16.0, read_by=ADAPTERS)
    nsp: NSPConfig = setting(default_factory=lambda: NSPConfig.preset("test_time"))
    seed: int = setting(0, read_by=DRAWN, common=True)

    def __post_init__(self) -> None:
        check_choices(self)
        published = self.nsp.published
        for name, value in (("scope", "never" if published else "example"), ("weight_decay", 0.01 if published else 0.0)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_read(self)
        if self.objective == "refine" and self.nsp.kl_coef > 0:
            raise RefineError(
                f"kl_coef={self.nsp.kl_coef} needs a frozen reference model, which test time has not; leave it at 0"
            )
        for name in ("steps", "lora_r"):
            if getattr(self, name) < 1:
                raise RefineError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0 or not self.max_grad_norm > 0:
            raise RefineError(f"learning_rate and max_grad_norm must be positive, got {self.learning_rate}, {self.max_grad_norm}")
        if self.parameters == "lora" and self.scope == "never":
            raise RefineError("adapters belong to their prompt, so parameters='lora' cannot go with scope='never'")


@dataclass
class Adaptation:
    """Record what an adaptation cost."""

    seconds: float
    extra_bytes: int  # kept in addition to the model: copies or adapters, and the optimizer's state
    losses: list[float]  # by step


class BatchLoRA:
    """Give every prompt of a batch a low-rank adapter of its own on each of the linear layers: y += (alpha / r) * x A_b B_b.

    B starts at 0, so the model starts unchanged (Hu et al., 2021). A is the same for every prompt, drawn from `seed`: a prompt's
    adaptation does not depend on what else is in the batch. Rows may be multiples of the prompts (snapshots and rollouts are expanded
    row-major), so row r belongs to prompt r // (rows / B). PEFT trains one adapter for a whole batch.
    """

    def __init__(self, layers: Sequence[nn.Linear], prompts: int, rank: int, alpha: float, seed: int) -> None:
        self.prompts, self.scale, self.layers = prompts, alpha / rank, layers
        generator = torch.Generator().manual_seed(seed)
        self.down: list[nn.Parameter] = []
        self.up: list[nn.Parameter] = []
        for layer in self.layers:
            bound = 1 / math.sqrt(layer.in_features)
            a = (torch.rand(layer.in_features, rank, generator=generator) * 2 - 1) * bound
            self.down.append(nn.Parameter(a.to(layer.weight).expand(prompts, -1, -1).clone()))
            self.up.append(nn.Parameter(layer.weight.new_zeros(prompts, rank, layer.out_features)))

    def parameters(self) -> list[nn.Parameter]:
        """List all adapters' tensors, each [B, ...]."""
        return [*self.down, *self.up]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Put the adapters on their layers, and take them off again afterwards, whatever happened."""
        handles = [layer.register_forward_hook(partial(self._add, i)) for i, layer in enumerate(self.layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, i: int, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add what adapter i makes of a layer's input to what the layer makes of it."""
        x = args[0]
        if x.shape[0] % self.prompts:
            raise ValueError(f"{x.shape[0]} rows are no multiple of {self.prompts} prompts")
        rows = x.reshape(self.prompts, -1, x.shape[-1])
        return output + self.scale * (rows @ self.down[i] @ self.up[i]).view_as(output)


class TestTimeTrainer:
    """Adapt a causal model of this package, not wrapped, to prompts: `with ttt.adapt(ids): model.generate(...)`. `last` is its cost."""

    __test__ = False

    def __init__(self, model: CausalModel, config: TestTimeConfig | None = None) -> None:
        self.model = model
        self.config = config if config is not None else TestTimeConfig()
        self.last: Adaptation | None = None
        nsp = self.config.nsp
        if nsp.published:  # its code samples the rollouts of all prompts before the first step
            nsp = with_schedule(nsp, Needs(beforehand=True))
        self.phase = PHASES[self.config.objective](nsp)
        self._kept_optimizer: torch.optim.Optimizer | None = None  # kept for the next prompt by scope="never"

    def shortest(self) -> int:
        """Count the tokens that a prompt needs to be adapted to."""
        return self.phase.shortest

    @contextmanager
    def adapt(self, prompt: Prompt) -> Iterator[CausalModel]:
        """Adapt the model to a prompt, or to several at once, and restore it at the end (but for scope "never").

        Args:
            prompt: token ids [T], as a list or tensor, or a list of prompts. Several prompts have an adapter each with
                parameters="lora" (row b of what is run inside belongs to prompt b); with scope="batch" or "never" they share one
                update; otherwise they must come one by one.

        Raises:
            RefineError: a prompt is too short for a position, or several come where each would need weights of its own.
        """
        rows = as_rows(prompt)
        c = self.config
        for row in rows:
            if len(row) < self.shortest():
                raise RefineError(f"a prompt of {len(row)} tokens cannot be adapted to: {c.objective} needs {self.shortest()}")
        if len(rows) > 1 and c.scope == "example" and not self.side_by_side():
            raise RefineError(
                f"{len(rows)} prompts at once: with scope='example' and parameters={c.parameters!r} each needs weights of its own; "
                "give them one by one, or use parameters='lora' (positions not by context, no global scale), or scope='batch'"
            )
        with self._adapters(rows) if c.parameters == "lora" else self._own_weights(rows):
            yield self.model

    def side_by_side(self) -> bool:
        """Tell whether several prompts can each have weights of their own: their losses must not touch each other."""
        return self.config.parameters == "lora" and self.phase.rows_apart

    @contextmanager
    def _own_weights(self, rows: list[Tensor]) -> Iterator[None]:
        """Train the chosen weights on prompts that share one update, and put them back afterwards unless they are kept for good."""
        chosen = chosen_parameters(self.model, self.config.parameters)
        saved = [] if self.config.scope == "never" else [p.detach().clone() for p in chosen]
        try:
            self._train(rows, chosen, saved, shared=True)
            yield
        finally:
            with torch.no_grad():
                for p, before in zip(chosen, saved, strict=False):
                    p.copy_(before)

    @contextmanager
    def _adapters(self, rows: list[Tensor]) -> Iterator[None]:
        """Train adapters on prompts, one each or one for all, and take them off afterwards."""
        c = self.config
        apart = c.scope == "example"
        adapters = BatchLoRA(linear_layers(self.model), len(rows) if apart else 1, c.lora_r, c.lora_alpha, c.seed)
        with adapters.attached():
            self._train(rows, adapters.parameters(), adapters.parameters(), shared=not apart)
            yield

    def _optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        c = self.config
        assert c.weight_decay is not None
        made = self._kept_optimizer or OPTIMIZERS[c.optimizer](parameters, lr=c.learning_rate, weight_decay=c.weight_decay)
        self._kept_optimizer = made if c.scope == "never" else None
        return made

    @part("optimizer", TEST_TIME)
    def _train(self, rows: list[Tensor], parameters: Sequence[nn.Parameter], kept: Sequence[Tensor], shared: bool) -> None:
        """Make the optimizer steps, and note in `last` what they cost, with the tensors `kept` in addition to the model. With `shared` one
        update serves all rows; otherwise each row has its own, and the loss and gradient norm of each are apart."""
        model, c, start = self.model, self.config, time.perf_counter()
        optimizer = self._optimizer(parameters)
        # The published code takes its cross-entropy alone in one step on the whole batch.
        dealt = c.nsp.published and shared and self.phase.samples
        size = PUBLISHED_PROMPTS if dealt else len(rows)
        sequences = [Batch.of(*pad(rows[at : at + size], model.device)) for at in range(0, len(rows), size)]
        generators = [[torch.Generator().manual_seed(c.seed) for _ in batch.sizes] for batch in sequences]
        wanted = {p: p.requires_grad for p in model.parameters()}
        training = model.training
        losses = []
        try:
            model.requires_grad_(False)
            for p in parameters:
                p.requires_grad_(True)
            optimizer.zero_grad(set_to_none=True)
            for _ in range(c.steps):
                for batch in self._micro_batches(sequences, generators, shared):
                    model.train()
                    with torch.enable_grad():
                        loss, _ = self.phase.loss(model, batch)
                        with part("backward"):
                            loss.backward()
                    clip_gradients(parameters, c.max_grad_norm, shared)
                    with part("optimizer"):
                        optimizer.step()
                        optimizer.zero_grad(set_to_none=True)
                    losses.append(float(loss.detach()))
        finally:
            optimizer.zero_grad(set_to_none=True)
            for p, flag in wanted.items():
                p.requires_grad_(flag)
            model.train(training)
        moments = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        self.last = Adaptation(time.perf_counter() - start, nbytes([*kept, *moments]), losses)

    def _micro_batches(
        self, sequences: Sequence[Batch], generators: Sequence[Sequence[torch.Generator]], shared: bool
    ) -> list[MicroBatch]:
        """Prepare and count the batches, one for each optimizer step; losses are divided by what all rows hold, or a row's by its own."""
        batches = [MicroBatch(s, g) for s, g in zip(sequences, generators, strict=True)]
        self.model.eval()
        with torch.no_grad():
            self.phase.prepare(cast(nn.Module, self.model), batches)
        for batch in batches:
            if shared:
                batch.totals = {name: float(n) or 1.0 for name, n in self.phase.count(batch).items()}
            else:
                batch.totals = {name: n.to(self.model.device) for name, n in self.phase.count_by_sequence(batch).items()}
        return batches


def as_rows(prompt: Prompt) -> list[Tensor]:
    """Return token ids [T] (or [1, T]), or several of these, as a list of long tensors. RefineError for anything else."""
    if isinstance(prompt, str) or not isinstance(prompt, Tensor | Sequence):
        raise RefineError(f"a prompt is token ids (a list or a tensor), or a list of prompts; got {type(prompt).__name__}")
    alone = prompt.ndim != 2 if isinstance(prompt, Tensor) else bool(prompt) and isinstance(prompt[0], int)
    rows = [torch.as_tensor(row) for row in ([prompt] if alone else prompt)]
    if not rows or any(r.ndim != 1 or r.is_floating_point() for r in rows):
        raise RefineError("a prompt is a list or tensor of token ids [T], or several of them")
    return [r.long() for r in rows]


def chosen_parameters(model: CausalModel, which: str) -> list[nn.Parameter]:
    """List a model's parameters: `all`, or those that write and read the fast weights, as each mixer names them."""
    if which == "all":
        return list(model.parameters())
    chosen = []
    for mixer in model.model.mixers:
        names = mixer.fast_weight_names
        assert isinstance(mixer, nn.Module)
        chosen += [p for name, p in mixer.named_parameters() if name.split(".")[0] in names]
    return chosen


def linear_layers(model: CausalModel) -> list[nn.Linear]:
    """List the linear layers of the blocks, without the head."""
    return [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float, shared: bool) -> None:
    """Clip the norm over all gradients, or the norm of each row b of adapters [B, ...] on its own."""
    if shared:
        nn.utils.clip_grad_norm_(parameters, max_norm)
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()  # [B]
    factor = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for g in grads:
        g.mul_(factor.view(-1, *[1] * (g.ndim - 1)))


def nbytes(tensors: Sequence[Tensor]) -> int:
    """Count the bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)
