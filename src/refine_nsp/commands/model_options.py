"""Options that several commands share: which model to load, and test-time training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.models.load import load_model
from refine_nsp.training.test_time import TestTimeConfig, TestTimeTrainer

DEFAULT_MODEL = "refine-nsp/tiny-delta-net"


@dataclass
class ModelArguments:
    """Which model to train, and how.

    Attributes:
        model_name_or_path: a shipped model, a folder or a hub name.
        tokenizer_name: another tokenizer than the model's.
        dtype: of the weights (float32, bfloat16); default: the checkpoint's.
        use_peft: train LoRA adapters only.
        lora_r, lora_alpha: their rank and scale.
        lora_target_modules: linear layers to adapt.
    """

    model_name_or_path: str = DEFAULT_MODEL
    tokenizer_name: str | None = None
    dtype: str | None = None
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_target_modules: list[str] | None = None

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer comes from."""
        return self.tokenizer_name or self.model_name_or_path


def build_model(arguments: ModelArguments) -> Any:
    """The model, with LoRA adapters when asked for."""
    model = load_model(arguments.model_name_or_path, dtype=arguments.dtype)
    if not arguments.use_peft:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RefineError("use_peft needs PEFT: pip install 'refine-nsp[lora]'") from error
    targets = arguments.lora_target_modules or "all-linear"
    return get_peft_model(model, LoraConfig(r=arguments.lora_r, lora_alpha=arguments.lora_alpha, target_modules=targets))


@dataclass
class TestTimeArguments:
    """Test-time training before each answer.

    Attributes:
        ttt: `refine` or `ntp`: adapt to each prompt before answering it, restore afterwards. Default: no adaptation.
        ttt_steps: optimizer steps on a prompt.
        ttt_learning_rate, ttt_optimizer: of those steps (`adamw` or `sgd`).
        ttt_scope: restore after each `example`, after each `batch` of ttt_batch_size prompts, or `never`.
        ttt_parameters: `all`, `fast_weights` (only the projections that write and read them) or `lora` (prompts side by side).
        ttt_batch_size: prompts adapted together where their weights allow.
        ttt_reward: `exact_match` (the paper), `cosine`, `hybrid`, or a dotted path.
        ttt_positions, ttt_rollout_length, ttt_num_generations, ttt_lambda_rl: of ReFINE on the prompt.
        ttt_seed: of its positions and rollouts.
    """

    __test__ = False

    ttt: str | None = None
    ttt_steps: int = 1
    ttt_learning_rate: float = 1e-6
    ttt_optimizer: str = "adamw"
    ttt_scope: str = "example"
    ttt_parameters: str = "all"
    ttt_batch_size: int = 8
    ttt_reward: str = "exact_match"
    ttt_positions: int = 8
    ttt_rollout_length: int = 5
    ttt_num_generations: int = 1
    ttt_lambda_rl: float = 0.4
    ttt_seed: int = 0

    def config(self, method: str) -> TestTimeConfig:
        """The library's settings. RefineError for a value out of range."""
        if self.ttt_batch_size < 1:
            raise RefineError(f"ttt_batch_size must be at least 1, got {self.ttt_batch_size}")
        nsp = NSPConfig.preset(
            "test_time", schedule="fused", reward=self.ttt_reward, positions_per_sequence=self.ttt_positions,
            rollout_length=self.ttt_rollout_length, num_generations=self.ttt_num_generations, lambda_rl=self.ttt_lambda_rl,
        )  # fmt: skip
        return TestTimeConfig(
            method=method, scope=self.ttt_scope, steps=self.ttt_steps, learning_rate=self.ttt_learning_rate,
            optimizer=self.ttt_optimizer, parameters=self.ttt_parameters, nsp=nsp, seed=self.ttt_seed,
        )  # fmt: skip

    def trainer(self, model: Any) -> tuple[TestTimeTrainer | None, int]:
        """The trainer (None without --ttt), and how many prompts it takes together."""
        if self.ttt is None:
            return None, 1
        trainer = TestTimeTrainer(model, self.config(self.ttt))
        together = trainer.side_by_side() or self.ttt_scope != "example"
        return trainer, self.ttt_batch_size if together else 1


def positional_model(argv: Sequence[str]) -> list[str]:
    """`COMMAND MODEL flags` as flags only."""
    words = list(argv)
    if words and not words[0].startswith("-"):
        return ["--model_name_or_path", *words]
    return words
