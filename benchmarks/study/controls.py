"""Define objectives that only the study needs, as controls of the closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from refine_nsp import NSPConfig
from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.nsp.context import context_divergence
from refine_nsp.nsp.next_token import next_tokens
from refine_nsp.nsp.records import Metrics
from refine_nsp.ops.linear_cross_entropy import linear_cross_entropy
from refine_nsp.training.phases import MicroBatch, NextToken


class LongCE(NextToken):
    """Weigh the cross-entropy of a token by how much likelier far context makes it: min(p(x | all before) / p(x | last W), gamma).

    Fang et al. (2024, arXiv 2410.23771) weigh it so, except that here a token that far context makes less likely weighs 1, not less.
    """

    def __init__(self, config: NSPConfig, gamma: float) -> None:
        super().__init__(config)
        self.gamma = gamma

    def loss(self, model: FastWeightForCausalLM, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        hidden = model.model(batch.input_ids, lengths=batch.lengths, use_cache=False).last_hidden_state
        gain = context_divergence(model, batch.sequences, hidden.detach(), self.config, gain=True)
        weights = gain.exp().clamp(max=self.gamma) * batch.target_mask / batch.totals["targets"]
        loss, stats = linear_cross_entropy(
            hidden.flatten(0, 1), model.lm_head.weight, next_tokens(batch.sequences), weights.flatten()
        )
        ntp = (stats.nll.view(weights.shape) * batch.target_mask).sum() / batch.totals["targets"]
        return loss, {"loss_ntp": ntp, "mean_weight": torch.as_tensor(weights.sum())}


CONTROLS = {"long_ce": LongCE}
