"""What decides a tiny base: its sizes, and the phases of its pretraining."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PretrainPhase:
    """`steps` of `tokens_per_step` tokens in rows of `length`; recall documents are `recall_share` of rows, `dense` facts."""

    steps: int
    length: int
    recall_share: float
    dense: float
    answer_weight: float


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides the base model. `recipes/pretrain_tiny.yaml` is the shipped one.

    Attributes:
        model_type: `delta_net` or `lact_swiglu`.
        num_heads: of the delta rule, or of LaCT's attention and fast weights.
        window: LaCT's attention window and chunk, in tokens; short, so that what is further away must be in the fast weights.
    """

    output_dir: str = "runs/pretrain"
    seed: int = 0
    model_type: str = "delta_net"
    vocab_size: int = 2048
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_heads: int = 2
    intermediate_size: int = 384
    window: int = 64
    tokens_per_step: int = 4096
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    save_steps: int = 250
    log_steps: int = 50
    phases: list[PretrainPhase] = field(
        default_factory=lambda: [
            PretrainPhase(300, 128, 0.6, 1.0, 4.0),
            PretrainPhase(500, 256, 0.4, 0.6, 2.0),
            PretrainPhase(1000, 512, 0.3, 0.3, 1.0),
        ]
    )

    @property
    def total_steps(self) -> int:
        return sum(p.steps for p in self.phases)
