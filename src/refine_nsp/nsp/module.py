"""The step as one module, so that a model in any wrapper takes it in one forward call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.models.protocols import CausalModel
from refine_nsp.nsp.advantage import compare
from refine_nsp.nsp.forward import run
from refine_nsp.nsp.records import Batch, Draws, Generators, Learning, Normalizer, Rollouts, Sampled, StepResult
from refine_nsp.nsp.rewards import judge, resolve_reward
from refine_nsp.nsp.step import first_pass, learn, one_step, second_pass


class ReFINEStep(nn.Module):
    """A ReFINE step on a batch, as the forward of one module (so DDP, FSDP and PEFT wrappers see one call).

    Args:
        model: a causal model of this package, wrapped or not.
        config: see `NSPConfig`.
        reference_model: frozen model for the KL term; needed when `config.kl_coef` > 0.

    Raises:
        RefineError: an unknown reward, or a KL term without a reference model.
    """

    def __init__(self, model: nn.Module, config: NSPConfig | None = None, reference_model: CausalModel | None = None) -> None:
        super().__init__()
        self.model = model
        self.config = config if config is not None else NSPConfig()
        self.reference_model = reference_model
        if self.config.kl_coef > 0 and reference_model is None:
            raise RefineError(f"kl_coef={self.config.kl_coef} needs a reference_model")
        for reward in self.config.rewards:
            resolve_reward(reward)

    def forward(
        self,
        input_ids: Tensor,
        lengths: Tensor | None = None,
        generator: Generators = None,
        ntp_normalizer: Normalizer = None,
        policy_normalizer: Normalizer = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        scores: Tensor | None = None,
    ) -> StepResult:
        """Select, sample, judge, and return the losses; or, with `estimator="closed_form"`, the losses alone.

        Args:
            input_ids: [B, T] long, right-padded. lengths: [B] long, None: all T real.
            generator: CPU generator of all the randomness (one block of uniforms, row b for sequence b), or one a sequence.
            ntp_normalizer, policy_normalizer: what the sums over targets and rollout tokens are divided by; default: their counts
                in this batch. A trainer that accumulates gradients passes the counts of the whole accumulation; a tensor [B] divides
                each sequence's sum by its own.
            columns: other columns of the dataset, B values each, for rewards that ask for them.
            scores: [B, T] context scores d known beforehand, instead of a pass over local windows.
        """
        batch = self._batch(input_ids, lengths, columns, scores)
        learning = Learning(ntp_normalizer, policy_normalizer, self.reference_model)
        draws = Draws.of(batch, self.config, generator)
        rollouts = None
        if self.config.samples_first:
            rollouts = compare([self.model(step=lambda m: first_pass(m, batch, self.config, draws))], self.config)[0]
        return self.model(step=lambda m: one_step(m, batch, self.config, draws, learning, rollouts))

    def sample(
        self,
        input_ids: Tensor,
        lengths: Tensor | None = None,
        generator: Generators = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        scores: Tensor | None = None,
    ) -> Rollouts:
        """Rollouts of the current policy, without gradients: what several optimizer steps can learn from (`learn`)."""
        return self.sample_all([self._batch(input_ids, lengths, columns, scores)], [generator])[0]

    def sample_all(
        self,
        batches: Sequence[Batch],
        generators: Sequence[Generators],
        sum_over: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Rollouts]:
        """Those of several batches, each by its generators, compared with each other together.

        sum_over: adds a tensor up over all processes, where several sample for one step (`compute_advantages`).
        """
        if not self.config.samples_rollouts:
            raise RefineError(f"estimator={self.config.estimator!r} samples no rollouts; only estimator='sampled' does")
        judged = []
        for batch, generator in zip(batches, generators, strict=True):
            draws = Draws.of(batch, self.config, generator)
            judged.append(self.model(step=lambda m, b=batch, d=draws: first_pass(m, b, self.config, d)))
        return compare(judged, self.config, sum_over)

    def learn(
        self,
        input_ids: Tensor,
        rollouts: Rollouts,
        lengths: Tensor | None = None,
        ntp_normalizer: Normalizer = None,
        policy_normalizer: Normalizer = None,
    ) -> StepResult:
        """Losses on rollouts that `sample` returned, ratio to the policy that sampled them clipped."""
        batch = self._batch(input_ids, lengths)
        learning = Learning(ntp_normalizer, policy_normalizer, self.reference_model)
        return self.model(step=lambda m: second_pass(m, batch, rollouts, self.config, learning))

    def score(
        self,
        input_ids: Tensor,
        positions: Tensor,
        rollouts: Tensor,
        lengths: Tensor | None = None,
        old_log_probs: Tensor | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> StepResult:
        """The step with given positions [B, P] (-1: none) and rollouts [B, P, N, K], so that anyone can check it.

        Args:
            old_log_probs: [B, P, N, K] of the sampling policy; None: the current policy's own (ratio 1).
        """
        batch = self._batch(input_ids, lengths, columns)
        check_rollouts(positions, rollouts, batch)
        return self.model(step=lambda m: self._score(m, batch, positions, rollouts, old_log_probs))

    def _score(self, model: CausalModel, batch: Batch, positions: Tensor, tokens: Tensor, old: Tensor | None) -> StepResult:
        c, shape = self.config, tokens.shape
        forward = run(model, batch, c, positions=positions)
        prefixes = forward.states(positions)
        own = forward.replay(prefixes, tokens, c.temperature, need_hidden=True)
        assert own.hidden is not None
        given = Sampled(
            positions=positions,
            tokens=tokens,
            log_probs=own.log_probs.detach() if old is None else old,
            hidden=own.hidden.view(*shape, -1),
            num_positions=int((positions >= 0).sum()),
        )
        rollouts = compare([judge(forward, given, c)], c)[0]
        return learn(forward, prefixes, rollouts, c, Learning(reference=self.reference_model))

    def _batch(
        self,
        input_ids: Tensor,
        lengths: Tensor | None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        scores: Tensor | None = None,
    ) -> Batch:
        """RefineError also when no sequence could hold a rollout."""
        batch, c = Batch.of(input_ids, lengths, columns, scores), self.config
        if max(batch.sizes) < c.rollout_length + 1:
            raise RefineError(
                f"the longest sequence has {max(batch.sizes)} tokens; a rollout of K={c.rollout_length} needs at least K + 1 "
                f"= {c.rollout_length + 1} (and min_prefix={c.min_prefix} before a position)"
            )
        return batch


def check_rollouts(positions: Tensor, rollouts: Tensor, batch: Batch) -> None:
    """RefineError unless positions are [B, P], rollouts [B, P, N, K], and every continuation lies inside its sequence."""
    if rollouts.ndim != 4 or positions.shape != rollouts.shape[:2] or positions.shape[0] != len(batch.lengths):
        raise RefineError(
            f"expected positions [B, P] and rollouts [B, P, N, K] for B={len(batch.lengths)}, got {tuple(positions.shape)} and "
            f"{tuple(rollouts.shape)}"
        )
    K, positions = rollouts.shape[-1], positions.cpu()
    late = (positions + K > batch.lengths[:, None] - 1) & (positions >= 0)
    if bool(late.any()):
        raise RefineError(f"position {int(positions[late][0])} leaves no {K} true tokens after it: t + K <= length - 1")
