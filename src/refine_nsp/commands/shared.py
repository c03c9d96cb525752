"""Share what several commands need: which model to load and train, test-time training, a prompt, and text from a file."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from refine_nsp.commands.grammar import Call, Settings
from refine_nsp.config import NSPConfig, check_choices, check_ranges
from refine_nsp.errors import RefineError
from refine_nsp.fields import Reader, check_read, setting
from refine_nsp.models.adapters import new_adapters, peft
from refine_nsp.models.load import adapters_of, check_vocabulary, load, load_adapter, load_model, load_tokenizer
from refine_nsp.models.protocols import CausalModel
from refine_nsp.processes import to_device
from refine_nsp.prompts.read_twice import encode_question
from refine_nsp.training.arguments import ReFINEConfig
from refine_nsp.training.settings import check_machine
from refine_nsp.training.test_time import TestTimeConfig, TestTimeTrainer

if TYPE_CHECKING:
    from peft import LoraConfig

DEFAULT_MODEL = "refine-nsp/tiny-delta-net"

ADAPTERS = Reader("use_peft", lambda a: a.use_peft)
ADAPTING = Reader("test-time training, by ttt=refine or ntp", lambda a: a.ttt is not None)


@dataclass
class ModelArguments:
    """Name the model to train, and how much of it is trained.

    Attributes:
        model_name_or_path: a shipped model, a folder or a hub name.
        tokenizer_name: another tokenizer than the model's.
        dtype: of the weights (float32, bfloat16); default: float32 with bf16 or fp16 (autocast), else the checkpoint's.
        use_peft: train LoRA adapters only; those of model_name_or_path where it holds some, else new ones.
        lora_r, lora_alpha: rank and scale of the adapters.
        lora_target_modules: linear layers to adapt.
    """

    model_name_or_path: str = setting(DEFAULT_MODEL, common=True)
    tokenizer_name: str | None = setting(None)
    dtype: str | None = setting(None)
    use_peft: bool = setting(False, common=True)
    lora_r: int = setting(16, read_by=ADAPTERS)
    lora_alpha: int = setting(32, read_by=ADAPTERS)
    lora_target_modules: list[str] | None = setting(None, read_by=ADAPTERS)

    def __post_init__(self) -> None:
        check_read(self)
        check_ranges(self, [(("lora_r", "lora_alpha"), lambda x: x >= 1, "must be at least 1")])


MODEL = Settings(ModelArguments, "model")


def load_to_train(arguments: ModelArguments, args: ReFINEConfig) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load the model to train, as `build_model` does, and its tokenizer. RefineError where they do not fit together."""
    model = build_model(arguments, args)
    tokenizer = load_tokenizer(arguments.tokenizer_name or arguments.model_name_or_path)
    check_vocabulary(model, tokenizer)
    return model, tokenizer


def build_model(arguments: ModelArguments, args: ReFINEConfig) -> nn.Module:
    """Load the model to train in the dtype that suits `args`, with LoRA adapters where they are asked for; its seed draws new ones."""
    check_machine(args)
    dtype = args.weights_dtype(arguments.dtype)
    if not arguments.use_peft:
        return load_model(arguments.model_name_or_path, dtype=dtype)
    if not adapters_of(arguments.model_name_or_path):
        return with_adapters(load_model(arguments.model_name_or_path, dtype=dtype), arguments, args.seed)
    model = load_adapter(arguments.model_name_or_path, dtype=dtype)
    own = cast("LoraConfig", model.peft_config["default"])
    if (own.r, own.lora_alpha) != (arguments.lora_r, arguments.lora_alpha) or arguments.lora_target_modules:
        warnings.warn(
            f"use_peft continues the adapters of {arguments.model_name_or_path}: lora_r={own.r}, lora_alpha={own.lora_alpha} and their "
            "layers stay; for new ones on what it learned, make a plain model of it first: refine-nsp export",
            stacklevel=2,
        )
    return model


def with_adapters(model: nn.Module, arguments: ModelArguments, seed: int) -> nn.Module:
    """Put new LoRA adapters on a model; they alone are trained."""
    targets = arguments.lora_target_modules or "all-linear"
    config = peft().LoraConfig(r=arguments.lora_r, lora_alpha=arguments.lora_alpha, target_modules=targets)
    return cast(nn.Module, new_adapters(model, config, seed))


def load_to_answer(name: str) -> tuple[CausalModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer onto the device that answers. RefineError where they do not fit together."""
    model, tokenizer = load(name)
    check_vocabulary(model, tokenizer)
    return to_device(model.eval()), tokenizer


def read_text(path: Path) -> str:
    """Read a UTF-8 file. RefineError when it is missing, empty or something else."""
    if not path.is_file():
        raise RefineError(f"no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RefineError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}") from error
    if not text.strip():
        raise RefineError(f"{path} is empty")
    return text


@dataclass
class ReadingArguments:
    """Say how a prompt is read.

    Attributes:
        question: a question about the prompt, put on a line behind it.
        read_twice: give the prompt twice before the question, or, without one, the whole prompt twice.
    """

    question: str | None = setting(None, common=True)
    read_twice: bool = setting(False, common=True)


def encode_reading(
    tokenizer: PreTrainedTokenizerBase, prompt: str, reading: ReadingArguments, source: str
) -> tuple[list[int], list[int]]:
    """Encode a prompt and its question. Return the tokens of one reading, and those to answer; they differ where it is read twice.

    Raises RefineError where the prompt or the question is empty, which says that prompts come from `source`.
    """
    if reading.question is not None and not reading.question.strip():
        raise RefineError("the question is empty: give --question some text, or leave it out")
    once, ids = encode_question(tokenizer, prompt, reading.question, reading.read_twice)
    if not ids or (reading.question is not None and not prompt.strip()):
        raise RefineError(f"the prompt is empty: give {source}{'' if reading.question is None else '; --question asks about it'}")
    return once, ids


@dataclass
class TestTimeArguments:
    """Test-time training before each answer; its settings are those of `TestTimeConfig` and `NSPConfig`, under the prefix `ttt_`.

    Attributes:
        ttt: `refine` or `ntp`: adapt to each prompt before answering it, restore afterwards. Default: no adaptation.
        ttt_batch_size: prompts adapted together where their weights allow.
    """

    __test__ = False

    ttt: Literal["refine", "ntp"] | None = setting(None, common=True)
    ttt_batch_size: int = setting(8, read_by=ADAPTING)

    def __post_init__(self) -> None:
        check_choices(self)
        check_read(self)
        check_ranges(self, [(("ttt_batch_size",), lambda x: x >= 1, "must be at least 1")])


GROUP = "test-time training"
METHOD = Settings(NSPConfig, GROUP, prefix="ttt_", preset="test_time")
TEST_TIME = (
    Settings(TestTimeArguments, GROUP),
    Settings(TestTimeConfig, GROUP, prefix="ttt_", skip=("objective",), nsp=METHOD),
)


def test_time_trainer(model: CausalModel, ttt: TestTimeArguments, config: TestTimeConfig) -> tuple[TestTimeTrainer | None, int]:
    """Return the trainer (None without --ttt), and how many prompts it takes together."""
    if ttt.ttt is None:
        return None, 1
    trainer = TestTimeTrainer(model, replace(config, objective=ttt.ttt))
    together = trainer.side_by_side() or config.scope != "example"
    return trainer, ttt.ttt_batch_size if together else 1


def check_unused(call: Call) -> None:
    """RefineError for settings of test-time training without it."""
    changed = [f"{name}={value!r}" for name, value in call.changed().items() if name.startswith("ttt_")]
    if changed and call.values["ttt"] is None:
        raise RefineError(f"{changed[0]} changes nothing without test-time training; add --ttt refine (or ntp), or leave it out")
