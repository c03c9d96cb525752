"""Options that several commands share: which model to load, and test-time training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, cast

from torch import nn

from refine_nsp.commands.options import Settings
from refine_nsp.config import NSPConfig, check_choices
from refine_nsp.errors import RefineError
from refine_nsp.models.adapters import new_adapters, peft
from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.models.load import adapters_of, load_adapter, load_model
from refine_nsp.training.arguments import ReFINEConfig
from refine_nsp.training.settings import check_machine
from refine_nsp.training.test_time import TestTimeConfig, TestTimeTrainer

DEFAULT_MODEL = "refine-nsp/tiny-delta-net"


@dataclass
class ModelArguments:
    """Which model to train, and how.

    Attributes:
        model_name_or_path: a shipped model, a folder or a hub name.
        tokenizer_name: another tokenizer than the model's.
        dtype: of the weights (float32, bfloat16); default: float32 with bf16 or fp16 (autocast), else the checkpoint's.
        use_peft: train LoRA adapters only; those of model_name_or_path where it holds some, else new ones.
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

    def __post_init__(self) -> None:
        for name in ("lora_r", "lora_alpha"):
            if (value := getattr(self, name)) < 1:
                raise RefineError(f"{name} must be at least 1, got {value}")
        for field in fields(self) if not self.use_peft else ():
            if field.name.startswith("lora_") and (value := getattr(self, field.name)) != field.default:
                raise RefineError(
                    f"{field.name}={value!r} is for adapters, and this run trains all weights; add --use_peft, or leave it out"
                )

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer comes from."""
        return self.tokenizer_name or self.model_name_or_path


def build_model(arguments: ModelArguments, args: ReFINEConfig) -> nn.Module:
    """The model to train, in the dtype that suits `args`, wrapped by PEFT when LoRA adapters are asked for; new ones drawn by its seed."""
    check_machine(args)
    dtype = args.weights_dtype(arguments.dtype)
    if not arguments.use_peft:
        return load_model(arguments.model_name_or_path, dtype=dtype)
    if not adapters_of(arguments.model_name_or_path):
        return with_adapters(load_model(arguments.model_name_or_path, dtype=dtype), arguments, args.seed)
    model = load_adapter(arguments.model_name_or_path, dtype=dtype)
    own = model.peft_config["default"]
    if (own.r, own.lora_alpha) != (arguments.lora_r, arguments.lora_alpha) or arguments.lora_target_modules:
        warnings.warn(
            f"use_peft goes on with the adapters of {arguments.model_name_or_path}: lora_r={own.r}, lora_alpha={own.lora_alpha} and their "
            "layers stay; for new ones on what it learned, make a plain model of it first: refine-nsp export",
            stacklevel=2,
        )
    return model


def with_adapters(model: nn.Module, arguments: ModelArguments, seed: int) -> nn.Module:
    """New LoRA adapters on a model, which alone are trained."""
    targets = arguments.lora_target_modules or "all-linear"
    config = peft().LoraConfig(r=arguments.lora_r, lora_alpha=arguments.lora_alpha, target_modules=targets)
    return cast(nn.Module, new_adapters(model, config, seed))


@dataclass
class TestTimeArguments:
    """Test-time training before each answer; its settings are those of `TestTimeConfig` and `NSPConfig`, under the prefix `ttt_`.

    Attributes:
        ttt: `refine` or `ntp`: adapt to each prompt before answering it, restore afterwards. Default: no adaptation.
        ttt_batch_size: prompts adapted together where their weights allow.
    """

    __test__ = False

    ttt: Literal["refine", "ntp"] | None = None
    ttt_batch_size: int = 8

    def __post_init__(self) -> None:
        check_choices(self)
        if self.ttt_batch_size < 1:
            raise RefineError(f"ttt_batch_size must be at least 1, got {self.ttt_batch_size}")


TEST_TIME = (
    TestTimeArguments,
    Settings(TestTimeConfig, prefix="ttt_", skip=("objective",), nsp=Settings(NSPConfig, prefix="ttt_", preset="test_time")),
)


def test_time_trainer(
    model: FastWeightForCausalLM, ttt: TestTimeArguments, config: TestTimeConfig
) -> tuple[TestTimeTrainer | None, int]:
    """The trainer (None without --ttt), and how many prompts it takes together."""
    if ttt.ttt is None:
        return None, 1
    trainer = TestTimeTrainer(model, replace(config, objective=ttt.ttt))
    together = trainer.side_by_side() or config.scope != "example"
    return trainer, ttt.ttt_batch_size if together else 1


def check_unused(ttt: TestTimeArguments, config: TestTimeConfig) -> None:
    """RefineError for settings of test-time training without it."""
    if ttt.ttt is not None:
        return
    usual, method = TestTimeConfig(), NSPConfig.preset("test_time")
    pairs = [
        (f.name, getattr(config, f.name), getattr(usual, f.name)) for f in fields(config) if f.name not in ("nsp", "objective")
    ]
    pairs += [(f.name, getattr(config.nsp, f.name), getattr(method, f.name)) for f in fields(method)]
    changed = [f"ttt_{name}={value!r}" for name, value, default in pairs if value != default]
    changed += [f"ttt_batch_size={ttt.ttt_batch_size}"] if ttt.ttt_batch_size != TestTimeArguments().ttt_batch_size else []
    if changed:
        raise RefineError(f"{changed[0]} changes nothing without test-time training; add --ttt refine (or ntp), or leave it out")


def positional_model(argv: Sequence[str]) -> list[str]:
    """`COMMAND MODEL flags` as flags only."""
    words = list(argv)
    if words and not words[0].startswith("-"):
        return ["--model_name_or_path", *words]
    return words
