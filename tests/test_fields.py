"""Settings of every kind: each is declared with who reads it, and what nothing reads is refused in Python, files and flags alike."""

from dataclasses import MISSING, dataclass, fields, replace

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments

from refine_nsp.cli import main
from refine_nsp.commands.estimate import EstimateArguments
from refine_nsp.commands.evaluate import RunArguments
from refine_nsp.commands.generate import GenerateArguments
from refine_nsp.commands.inspect import InspectArguments
from refine_nsp.commands.shared import ModelArguments, TestTimeArguments
from refine_nsp.commands.ttt import PromptArguments
from refine_nsp.config import NSPConfig
from refine_nsp.errors import RefineError
from refine_nsp.evaluation.arguments import EvaluationArguments
from refine_nsp.fields import Reader, SettingError, check_read, default_of, is_known, live, setting, told
from refine_nsp.training import DataArguments, ReFINEConfig
from refine_nsp.training.answers import AnswerArguments
from refine_nsp.training.nested import PostTrainingConfig
from refine_nsp.training.test_time import TestTimeConfig

OURS = [NSPConfig, ReFINEConfig, PostTrainingConfig, TestTimeConfig, DataArguments, AnswerArguments, EvaluationArguments, ModelArguments,
        TestTimeArguments, RunArguments, PromptArguments, InspectArguments, EstimateArguments, GenerateArguments]  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    draw: str = setting("sample", card=True)
    tau: float = setting(1.0, read_by=Reader("draw='sample'", lambda s: s.draw == "sample"), common=True)
    widths: list[int] = setting(default_factory=lambda: [3], also="validation", read_by=Reader("never", lambda s: False))

    def __post_init__(self) -> None:
        check_read(self)


def test_what_nothing_reads_is_named_with_what_would_read_it():
    with pytest.raises(
        SettingError, match=r"^nothing reads tau=2.0 \(it needs draw='sample'\); leave it out, or set what reads it$"
    ) as e:
        Drawing(draw="greatest", tau=2.0)
    assert e.value.names == ("tau",)
    assert Drawing(draw="greatest", tau=1.0) == Drawing(draw="greatest")  # the default does no harm
    assert Drawing(widths=[5]).widths == [5]  # validation reads it
    assert live(Drawing()) == {"draw", "tau"} and live(Drawing("greatest")) == {"draw"}
    assert told(Drawing, "card") == ("draw",) and told(Drawing, "common") == ("tau",)
    with pytest.raises(RefineError, match="nothing reads tau"):
        replace(Drawing(tau=2.0), draw="greatest")


def test_conditions_join_and_only_those_that_fail_are_said():
    both = Reader("a", lambda s: s[0]) & Reader("b", lambda s: s[1]) & Reader("c", lambda s: s[2])
    assert (
        both((True, True, True))
        and both.missing((True, False, True)) == ["b"]
        and both.missing((False, True, False)) == ["a", "c"]
    )


@pytest.mark.parametrize("cls", OURS)
def test_every_setting_of_ours_is_declared_with_who_reads_it(cls):
    theirs = {f.name for f in fields(TrainingArguments)} if issubclass(cls, TrainingArguments) else set()
    assert [f.name for f in fields(cls) if not is_known(f) and f.name not in theirs] == []
    settings = cls(output_dir="x", use_cpu=True) if theirs else cls()
    for f in fields(cls):
        if is_known(f):
            assert f.metadata["read_by"](settings) in (True, False) and f.metadata["read_by"].words
            assert default_of(f) is not MISSING
            assert set(f.metadata) <= {"help"}  # all that argparse is shown


def test_transformers_own_class_is_left_alone_and_its_parser_reads_ours():
    assert not any(is_known(f) for f in fields(TrainingArguments))
    names = ["--output_dir", "x", "--use_cpu", "True", "--max_length", "77", "--seed", "3"]
    (args,) = HfArgumentParser((ReFINEConfig,)).parse_args_into_dataclasses(names)
    assert (args.max_length, args.seed, args.learning_rate) == (77, 3, 1e-6)


REFUSED = [
    (ReFINEConfig, {"preset": "expected", "steps_per_generation": 2}, "steps_per_generation=2 (it needs estimator='sampled')"),
    (ReFINEConfig, {"preset": "expected", "log_completions": True}, "log_completions=True (it needs estimator='sampled')"),
    (ReFINEConfig, {"num_completions_to_print": 3}, "num_completions_to_print=3 (it needs log_completions)"),
    (ReFINEConfig, {"context_scores": "cached"}, "context_scores='cached' (it needs context scores"),
    (ReFINEConfig, {"clip_low": 0.1}, "clip_low=0.1 (it needs rollouts sampled beforehand (steps_per_generation above 1"),
    (ReFINEConfig, {"objective": "ntp", "estimator": "closed_form", "tau": 2.0}, "tau=2.0 (it needs estimator='sampled' or"),
    (TestTimeConfig, {"lora_r": 4}, "lora_r=4 (it needs parameters='lora')"),
    (TestTimeConfig, {"nsp": NSPConfig.preset("expected"), "seed": 1}, "seed=1 (it needs positions or adapters that are drawn"),
    (DataArguments, {"streaming": True, "dataset_num_proc": 2}, "dataset_num_proc=2 (it needs streaming=False)"),
    (DataArguments, {"streaming": True, "validation_fraction": 0.1}, "validation_fraction=0.1 (it needs streaming=False)"),
    (DataArguments, {"validation_dataset": "x", "validation_fraction": 0.1}, "validation_fraction=0.1 (it needs no validation_dataset)"),
    (DataArguments, {"validation_fraction": 0, "validation_windows": 3}, "validation_windows=3 (it needs validation"),
    (DataArguments, {"validation_fraction": 0, "split_seed": 3}, "split_seed=3 (it needs a validation_fraction above 0)"),
    (AnswerArguments, {"dataset_name": "x", "ruler_length": 512}, "ruler_length=512 (it needs prompts built from squad or hotpotqa)"),
    (AnswerArguments, {"squad": "x", "question_column": "q"}, "question_column='q' (it needs prompts that are given"),
    (ModelArguments, {"lora_r": 4}, "lora_r=4 (it needs use_peft)"),
    (TestTimeArguments, {"ttt_batch_size": 2}, "ttt_batch_size=2 (it needs test-time training, by ttt=refine or ntp)"),
    (InspectArguments, {"max_tokens": 9}, "max_tokens=9 (it needs a text to look at, by file)"),
    (EstimateArguments, {"sharded": True}, "sharded=True (it needs num_processes above 1)"),
    (GenerateArguments, {"greedy": True, "temperature": 0.5, "top_k": 3}, "temperature=0.5, top_k=3 (they need sampling, without greedy)"),
    (EvaluationArguments, {"tasks": ["ntp"], "samples": 3}, "samples=3 (it needs the task ruler, or one of it)"),
    (EvaluationArguments, {"tasks": ["niah"], "squad": "x"}, "squad='x' (it needs the task qa_1)"),
    (EvaluationArguments, {"tasks": ["vt"], "essays": "x", "depths": [0.5]}, "depths=[0.5] (it needs the task niah"),
    (EvaluationArguments, {"tasks": ["continuation"], "bucket": 64}, "bucket=64 (it needs the task ntp)"),
    (EvaluationArguments, {"tasks": ["niah"], "protocol": "published"}, "protocol='published' (it needs the task qa_1 or qa_2 or"),
    (EvaluationArguments, {"tasks": ["ntp"], "longbench": "x"}, "longbench='x' (it needs the task longbench, or one of it)"),
    (EvaluationArguments, {"tasks": ["prompts"], "seed": 1}, "seed=1 (it needs prompts that are generated"),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "settings", "said"), REFUSED, ids=lambda x: x.__name__ if isinstance(x, type) else None)
def test_settings_without_a_reader_are_refused(cls, settings, said):
    own = {"output_dir": "x", "use_cpu": True} if issubclass(cls, TrainingArguments) else {}
    with pytest.raises(RefineError) as refused:
        cls(**own, **settings)
    assert str(refused.value).startswith("nothing reads ") and said in str(refused.value)


def test_the_control_of_a_comparison_takes_the_methods_settings():
    settings = {"output_dir": "x", "use_cpu": True, "preset": "context", "steps_per_generation": 2, "context_scores": "cached"}
    assert ReFINEConfig(objective="ntp", **settings).nsp == replace(ReFINEConfig(**settings).nsp, schedule="auto")


def test_inspecting_a_model_alone_takes_no_settings_of_positions(capsys):
    assert main(["inspect", "refine-nsp/tiny-delta-net", "--selection", "entropy"]) == 1
    line = capsys.readouterr().err
    assert "nothing reads selection='entropy' (needs a text to look at, by file)" in line and line.count("\n") == 1


@pytest.mark.parametrize("command", ["midtrain", "estimate"])
def test_files_and_flags_are_refused_as_python_is(tmp_path, capsys, command):
    said = "nothing reads num_generations=8 (it needs estimator='sampled')"
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"preset": "likelihood", "num_generations": 8}))
    for words in (["--config", str(file)], ["--preset", "likelihood", "--num_generations", "8"]):
        assert main([command, *words]) == 1
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1
    assert main([command, "--preset", "context", "--estimator", "closed_form"]) == 1
    line = capsys.readouterr().err
    assert "The preset context sets num_generations" in line and "take another preset (expected, likelihood)" in line
