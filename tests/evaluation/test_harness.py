"""The lm-eval model beside lm-eval's own HFLM on the same weights: scores, texts, answers, settings, templates, devices."""

import json
import logging

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import refine_nsp
from refine_nsp.errors import RefineError
from refine_nsp.models import with_states
from tests.models.transformers_models import CONFIGS

harness = pytest.importorskip("refine_nsp.evaluation.harness", reason="lm-eval is not installed")
import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

MODELS = ("refine-nsp/tiny-delta-net", "refine-nsp/tiny-gated-deltanet", "refine-nsp/tiny-lact")
PAIRS = [
    ("Question: what?\nAnswer:", " this"), ("def f(x):", " return x"), ("def f(x): ", "return x"), ("", "import os"),
    ("import", " sys"), ("a" * 300, " b" * 40), ("x", " y" * 120),
]  # fmt: skip
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' and no_system is defined %}{{ raise_exception('no system') }}"
    "{% endif %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def loaded():
    return refine_nsp.load("refine-nsp/tiny-delta-net")


@pytest.fixture(scope="module")
def chatty(loaded):
    """A model with tokens for BOS, EOS and turns, and a function that makes its tokenizer by what is put around a text."""
    model, tokenizer = refine_nsp.load("refine-nsp/tiny-delta-net")
    model.resize_token_embeddings(2056, mean_resizing=False)

    def make(pattern):
        raw = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        raw.add_special_tokens(["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"])
        raw.post_processor = TemplateProcessing(single=pattern, special_tokens=[(s, raw.token_to_id(s)) for s in ("<s>", "</s>")])
        made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")
        made.chat_template = TEMPLATE
        return made

    model.generation_config.eos_token_id = make("$A").eos_token_id
    return model, make


def instances(kind, arguments):
    return [Instance(kind, {}, a, i, ("sky", 10 + i, 1)) for i, a in enumerate(arguments)]


def pair(model, tokenizer, **options):
    """Ours and lm-eval's own model on the same weights."""
    ours = harness.HarnessModel(model=model, tokenizer=tokenizer, batch_tokens=512, **options)
    return ours, HFLM(pretrained=model, tokenizer=tokenizer, **options)


def score(lm, pairs):
    return lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)


def rolling(lm, *texts):
    return lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(t,) for t in texts]))


def generate(lm, text, **settings):
    return lm.generate_until(instances("generate_until", [(text, settings)]), disable_tqdm=True)[0]


def assert_same_scores(ours, theirs):
    assert [g for _, g in ours] == [g for _, g in theirs]
    assert [x for x, _ in ours] == pytest.approx([x for x, _ in theirs], abs=1e-4)


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_scores_texts_and_greedy_answers_are_those_of_lm_eval_s_own_model(name):
    ours, theirs = pair(*refine_nsp.load(name))
    assert_same_scores(score(ours, PAIRS), score(theirs, PAIRS))
    texts = ["", "a", "import os\nimport sys\n" * 20]
    assert rolling(ours, *texts) == pytest.approx(rolling(theirs, *texts), abs=1e-3)
    for settings in (
        {"until": "\n"},
        {"until": ["sys\n"], "max_gen_toks": 8},
        {"max_gen_toks": 3},
        {"do_sample": False, "temperature": 0.7},
    ):
        settings = {"max_gen_toks": 12, **settings}
        assert generate(ours, "import os\nimport", **settings) == generate(theirs, "import os\nimport", **settings)


@pytest.mark.parametrize("max_length", [1, 2, 3, 64, 120])
def test_max_length_leaves_as_much_context_as_lm_eval_s(loaded, max_length):
    ours, theirs = pair(*loaded, max_length=max_length)
    fitting = [p for p in PAIRS if len(theirs._encode_pair(*p)[1] if p[0] else theirs.tok_encode(p[1])) <= max_length]
    assert len(fitting) >= 2
    assert_same_scores(score(ours, fitting), score(theirs, fitting))
    text = "import os\nimport sys\n" * 20
    assert rolling(ours, text) == pytest.approx(rolling(theirs, text), abs=1e-3)
    if max_length > 4:
        assert generate(ours, text, max_gen_toks=4) == generate(theirs, text, max_gen_toks=4)
    with pytest.raises(RefineError, match=r"sky, document 10: max_length=.* leaves no room for a context before"):
        score(ours, [("a", " b" * 200)])
    with pytest.raises(RefineError, match="leaves no room"):
        generate(ours, "a", max_gen_toks=max_length)


def test_a_continuation_that_merges_into_its_context_is_scored_by_itself(loaded):
    ours, _ = pair(*loaded)
    context, continuation = merging(loaded[1])
    ids = loaded[1](continuation, add_special_tokens=False)["input_ids"]
    assert ours._encode_pair(context, continuation) == (loaded[1](context)["input_ids"], ids)
    assert score(ours, [(context, continuation)])[0][0] < 0


def merging(tokenizer):
    """Two parts of a text that are one token together."""
    whole = next(t for t in ("return", "import", "self") if len(tokenizer(t)["input_ids"]) == 1)
    cut = next(i for i in range(1, len(whole)) if len(tokenizer(whole[:i])["input_ids"]) == 1)
    return whole[:cut], whole[cut:]


def test_a_row_without_text_is_named(loaded):
    ours, _ = pair(*loaded)
    for context in ("", "The sky is"):
        with pytest.raises(RefineError, match=r"sky, document 11: the continuation '' has no token"):
            score(ours, [("a", " b"), (context, "")])


# --- special tokens ---------------------------------------------------------------------------------------------------


def test_a_prompt_has_one_bos_and_no_eos_whatever_the_tokenizer_adds(chatty):
    model, make = chatty
    chat = [{"role": "user", "content": "hi"}]
    for pattern, leading in (("$A", []), ("<s> $A", ["<s>"]), ("<s> $A </s>", ["<s>"]), ("$A </s>", [])):
        ours, theirs = pair(model, make(pattern))
        tokens = ours.tokenizer.convert_ids_to_tokens
        assert tokens(ours.tok_encode("hi")) == [*leading, "h", "i"]
        assert tokens(ours.tok_encode(ours.apply_chat_template(chat))) == ["<s>", "<|user|>", "h", "i", "</s>", "<|assistant|>"]
        assert tokens(ours.tok_encode("hi", add_special_tokens=False)) == ["h", "i"]
        assert tokens(ours.tok_encode("hi", left_truncate_len=1)) == ["i"]
        if "</s>" in pattern:  # HFLM ends contexts with EOS here, and scores nothing but it
            theirs = HFLM(pretrained=model, tokenizer=make(pattern.replace(" </s>", "")))
        pairs = [(ours.apply_chat_template(chat), " yes"), ("The sky is", " blue"), ("", "blue"), ("", "<s>blue")]
        assert_same_scores(score(ours, pairs), score(theirs, pairs))
        assert generate(ours, pairs[0][0], max_gen_toks=5) == generate(theirs, pairs[0][0], max_gen_toks=5)


def test_bos_is_never_predicted_when_a_text_is_scored(chatty):
    model, make = chatty
    (with_bos,), (without,) = (rolling(pair(model, make(p))[0], "import os") for p in ("<s> $A", "$A"))
    assert with_bos == without == pytest.approx(rolling(pair(model, make("$A"))[1], "import os")[0], abs=1e-4)


@pytest.mark.parametrize("pattern", ["$A", "<s> $A", "<s> $A </s>"])
def test_add_bos_token_and_prefix_token_id_are_honoured(chatty, pattern):
    model, make = chatty
    tokenizer = make(pattern)
    bos, ids = tokenizer.bos_token_id, tokenizer("hi", add_special_tokens=False)["input_ids"]
    ours, theirs = pair(model, tokenizer, add_bos_token=False, prefix_token_id=7)
    assert ours.tok_encode("hi") == theirs.tok_encode("hi") == ids
    assert ours.prefix_token_id == theirs.prefix_token_id == 7
    assert_same_scores(score(ours, [("", "hi"), ("hi", " you")]), score(theirs, [("", "hi"), ("hi", " you")]))
    assert rolling(ours, "import os") == pytest.approx(rolling(theirs, "import os"), abs=1e-4)
    ours = harness.HarnessModel(model=model, tokenizer=tokenizer, add_bos_token=True)
    assert ours.tok_encode("hi") == ours.tok_encode("<s>hi") == [bos, *ids]
    assert tokenizer("hi")["input_ids"] == make(pattern)("hi")["input_ids"]  # the user's tokenizer stays as it is


# --- templates --------------------------------------------------------------------------------------------------------


def test_templates_continue_a_message_drop_the_system_and_take_arguments_as_lm_eval_s(chatty):
    model, make = chatty
    user, system, begun = ({"role": r, "content": c} for r, c in (("user", "hi"), ("system", "be brief"), ("assistant", "I am")))
    for options in ({}, {"chat_template_args": {"no_system": True}}, {"enable_thinking": False}):
        ours, theirs = pair(model, make("<s> $A"), **options)
        for history, add in (([user], True), ([system, user], True), ([user, begun], False), ([system, user, begun], False)):
            expected = theirs.apply_chat_template(history, add_generation_prompt=add)
            assert ours.apply_chat_template(history, add_generation_prompt=add) == expected
            assert expected.endswith("<|assistant|>" if add else "I am")
    with pytest.raises(RefineError, match="chat template does not take these messages"):
        ours.apply_chat_template([{"role": "user"}, {"role": "system"}], add_generation_prompt=False)
    bare = make("<s> $A")
    bare.chat_template = None
    with pytest.raises(RefineError, match="chat_template is not set"):
        pair(model, bare)[0].apply_chat_template([user])


def test_an_answer_begins_after_what_was_thought(loaded):
    text, asked = "import os\nimport", {"max_gen_toks": 12, "until": ["time"]}
    for token in ("\n", str(loaded[1]("\n")["input_ids"][0]), "nowhere"):
        ours, theirs = pair(*loaded, think_end_token=token)
        assert generate(ours, text, **asked) == generate(theirs, text, **asked)
    ours = harness.HarnessModel(model=loaded[0], tokenizer=loaded[1], enable_thinking=True, think_end_token="x")
    with pytest.raises(RefineError, match="enable_thinking=True is for tasks that generate"):
        score(ours, PAIRS)
    with pytest.raises(RefineError, match="needs think_end_token"):
        harness.HarnessModel(model=loaded[0], tokenizer=loaded[1], enable_thinking=True)


# --- answers ----------------------------------------------------------------------------------------------------------


def sampled_from(monkeypatch, lm, text, **settings):
    """The probabilities that each token of an answer is drawn from, the second likeliest being drawn where there is one."""
    seen = []

    def draw(p, *args, **kwargs):
        seen.append(p.reshape(-1).double())
        second = p.reshape(-1).topk(2)
        return second.indices[int(second.values[1] > 0)].reshape((*p.shape[:-1], 1))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", draw)
        answer = generate(lm, text, max_gen_toks=4, **settings)
    return torch.stack(seen) if seen else None, answer


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7}, {"temperature": 1.0, "do_sample": True}, {"temperature": 2.0, "top_k": 5}, {"temperature": 1.0, "top_k": 0},
        {"temperature": 1.5, "top_p": 0.8}, {"temperature": 1.0, "top_k": 7, "top_p": 0.6}, {"temperature": 1.0, "top_k": 0, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 5000, "top_p": 0.01}, {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.3, "typical_p": 0.7, "repetition_penalty": 1.4}, {"do_sample": False, "temperature": 1.0},
        {"temperature": 0.0}, {},
    ],
)  # fmt: skip
def test_tokens_are_drawn_from_the_distribution_of_lm_eval_s_own_model(loaded, monkeypatch, settings):
    (p, answer), (expected, theirs) = (sampled_from(monkeypatch, lm, "import os\nimport", **settings) for lm in pair(*loaded))
    assert answer == theirs
    assert (p is None) == (expected is None) == (not settings.get("do_sample", settings.get("temperature", 0) > 0))
    if p is not None:
        assert ((p > 0) == (expected > 0)).all()
        assert torch.allclose(p, expected, atol=1e-5)


def test_the_model_s_own_configuration_counts_as_in_lm_eval_s(monkeypatch):
    model, tokenizer = refine_nsp.load("refine-nsp/tiny-delta-net")
    model.generation_config.update(top_k=3, top_p=0.9, temperature=0.2, do_sample=True)
    ours, theirs = pair(model, tokenizer)
    (p, _), (expected, _) = (sampled_from(monkeypatch, lm, "import", temperature=1.0) for lm in (ours, theirs))
    assert torch.allclose(p, expected, atol=1e-5) and int((p[0] > 0).sum()) <= 3
    assert generate(ours, "import", max_gen_toks=6) == generate(theirs, "import", max_gen_toks=6)
    model.generation_config.update(repetition_penalty=1.8)
    text = "import os\nimport os\nimport"
    answers = [generate(lm, text, max_gen_toks=8) for lm in (ours, theirs)]
    assert answers[0] == answers[1]
    model.generation_config.update(repetition_penalty=1.0)
    assert generate(ours, text, max_gen_toks=8) != answers[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3}, {"no_repeat_ngram_size": 2}, {"repetition_penalty": 1.5, "until": ["os"]}, {"min_new_tokens": 5},
        {"suppress_tokens": [198]}, {"max_length": 11}, {"max_tokens": 3}, {"max_completion_tokens": 2}, {"max_new_tokens": 4},
        {"max_gen_toks": 2, "max_new_tokens": 5}, {"num_beams": 1}, {"until": []}, {"until": ["", "y"]}, {"do_sample": None},
    ],
)  # fmt: skip
def test_any_setting_of_generate_does_what_it_does_in_lm_eval_s_own_model(loaded, settings):
    settings = settings if any("max" in name for name in settings) else {"max_gen_toks": 8, **settings}
    ours, theirs = (generate(lm, "import os\nimport", **settings) for lm in pair(*loaded))
    assert ours == theirs != ""


def test_an_answer_stops_at_a_special_token_that_its_text_does_not_show(chatty):
    model, make = chatty
    ours, theirs = pair(model, make("<s> $A"))
    asked = [("import os\nimport", {"max_gen_toks": 6, "until": []})]
    ids = ours.tokenizer(generate(ours, *asked[0][0:1], max_gen_toks=6), add_special_tokens=False)["input_ids"]
    head = model.lm_head.weight
    with torch.no_grad():
        kept, end = head.clone(), ours.tokenizer.convert_tokens_to_ids("<|user|>")
        head[end] = head[ids[2]] * 1.01  # now the turn's end comes where the third token came
        try:
            answers = [generate(lm, "import os\nimport", max_gen_toks=6, until=["<|user|>"]) for lm in (ours, theirs)]
            longer = generate(ours, "import os\nimport", max_gen_toks=6)
        finally:
            head.copy_(kept)
    assert answers[0] == answers[1]
    assert longer.startswith(answers[0]) and len(longer) > len(answers[0])


def test_answers_in_one_call_keep_their_own_settings_and_do_not_depend_on_each_other(loaded):
    ours, theirs = pair(*loaded)
    asked = [("import os\nimport", {"max_gen_toks": n, "until": stop}) for n in (0, 3, 9) for stop in ([], ["\n"])]
    asked += [("", {"max_gen_toks": 3}), ("def f(", {"num_beams": 2, "max_gen_toks": 4})]
    together = ours.generate_until(instances("generate_until", asked))
    assert together == [generate(ours, text, **settings) for text, settings in asked]
    assert together[2:6] == [generate(theirs, text, **settings) for text, settings in asked[2:6]]
    assert together[0] == together[1] == ""


def test_lm_eval_s_seed_decides_what_is_sampled(loaded):
    ours, _ = pair(*loaded)

    def sample(seed):
        torch.manual_seed(seed)
        return [generate(ours, "import", temperature=3.0, top_k=0, max_gen_toks=6) for _ in range(2)]

    first = sample(1)
    assert first == sample(1) != sample(2)
    assert first[0] != first[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_pp": 0.9}, r"sky, document 10: no generation setting 'top_pp' \(did you mean 'top_p'\?\)"),
        ({"max_gen_tokens": 9}, "no generation setting 'max_gen_tokens'"),
        ({"stop": ["x"]}, "no generation setting 'stop'"),
        ({"do_sample": True}, "do_sample=True needs a temperature above 0, got 0.0"),
        ({"do_sample": True, "temperature": -1.0}, "needs a temperature above 0, got -1.0"),
        ({"temperature": "hot"}, "could not convert string to float"),
        ({"temperature": 1.0, "top_k": -1}, "top_k"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"temperature": 1.0, "min_p": 2.0}, "transformers' generate refuses.*min_p"),
        ({"num_beams": 2, "num_return_sequences": 2}, "num_return_sequences=2: a request has one answer"),
        ({"until": [3]}, "expected strings to stop at"),
        ({"max_gen_toks": -1}, "not negative"),
        ({"max_length": 2}, "max_length=2 counts prompt and answer, and the prompt has 4 tokens"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_by_name(loaded, settings, message):
    with pytest.raises(RefineError, match=message):
        generate(pair(*loaded)[0], "import os\nimport", **settings)


# --- arguments and devices --------------------------------------------------------------------------------------------


def test_arguments_that_mean_nothing_here_are_refused_by_name(loaded):
    model, tokenizer = loaded
    neutral = dict(
        batch_size="auto", max_batch_size=64, revision="main", trust_remote_code=False, parallelize=False, peft=None, backend="causal",
        logits_cache=True, softmax_dtype="float32", truncation=False, use_fast_tokenizer=True, subfolder="", offload_folder="./offload",
    )  # fmt: skip
    harness.HarnessModel(model=model, tokenizer=tokenizer, **neutral)
    for options, message in (
        ({"max_lenght": 8}, r"no argument 'max_lenght' \(did you mean 'max_length'\?\)"),
        ({"trust_remote_cod": True}, "did you mean 'trust_remote_code'"),
        ({"trust_remote_code": True}, "does not take trust_remote_code=True: code that comes with a checkpoint is never run"),
        ({"peft": "adapter"}, "does not take peft='adapter': give pretrained=ADAPTER"),
        ({"revision": "v2"}, "does not take revision='v2': hf download"),
        ({"parallelize": True}, "accelerate launch"),
        ({"load_in_8bit": True}, "no argument 'load_in_8bit'"),
        ({"max_length": 0}, "max_length must be at least 1"),
    ):
        with pytest.raises(RefineError, match=message):
            harness.HarnessModel(model=model, tokenizer=tokenizer, **options)
    with pytest.raises(RefineError, match="dtype"):
        harness.HarnessModel(pretrained="refine-nsp/tiny-delta-net", dtype="float33")
    no_bos = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(RefineError, match="has no BOS token"):
        harness.HarnessModel(model=model, tokenizer=no_bos, add_bos_token=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7", "mps:3", "gpu", "cpu", None])
def test_a_device_that_is_not_here_is_replaced_with_a_warning(caplog, device):
    with caplog.at_level(logging.WARNING):
        ours = harness.HarnessModel.create_from_arg_string(
            "pretrained=refine-nsp/tiny-delta-net,dtype=float64", {"device": device, "batch_size": 1, "max_batch_size": None}
        )
    assert ours.device == torch.device("cpu") and ours.model.dtype == torch.float64
    said = [r.getMessage() for r in caplog.records if "the model runs on" in r.getMessage()]
    assert said == ([] if device in ("cpu", None) else [f"this machine has no device {device}: the model runs on cpu"])


# --- whole runs -------------------------------------------------------------------------------------------------------


def task(tmp_path, **more):
    (tmp_path / "sky.jsonl").write_text(json.dumps({"q": "import os\nimport", "c": ["sys", "purple banana"], "l": 0}) + "\n")
    return {
        "task": "sky", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sky.jsonl")}},
        "test_split": "test", "doc_to_text": "{{q}}", **more,
    }  # fmt: skip


def simple_evaluate(*args, **options):
    """lm-eval's, without the list of its own thousands of tasks, which takes half a minute."""
    return lm_eval.simple_evaluate(
        *args, **{"task_manager": TaskManager(include_defaults=False), "bootstrap_iters": 0, **options}
    )


def test_lm_eval_runs_it_by_name_as_its_own(tmp_path, chatty):
    choice = task(
        tmp_path, output_type="multiple_choice", doc_to_choice="{{c}}", doc_to_target="l", metric_list=[{"metric": "acc"}]
    )
    results = simple_evaluate("refine-nsp", "pretrained=refine-nsp/tiny-delta-net", tasks=[choice], device="cuda:0", batch_size=1)
    assert results["results"]["sky"]["acc,none"] == 1.0
    model, make = chatty
    answer = task(tmp_path, output_type="generate_until", doc_to_target="l", metric_list=[{"metric": "exact_match"}])
    answer["generation_kwargs"] = {"until": ["\n"], "max_gen_toks": 4}
    outputs = [
        simple_evaluate(lm, tasks=[answer], apply_chat_template=True, gen_kwargs="max_gen_toks=6")["samples"]["sky"]
        for lm in pair(model, make("<s> $A"))
    ]
    assert outputs[0][0]["arguments"] == outputs[1][0]["arguments"]
    assert outputs[0][0]["resps"] == outputs[1][0]["resps"]


def test_a_task_that_lm_eval_cannot_run_says_why(loaded, monkeypatch):
    monkeypatch.setattr(harness, "simple_evaluate", simple_evaluate)
    with pytest.raises(RefineError, match=r"lm-eval could not run 'no_such_task': .*no_such_task"):
        harness.run_harness(*loaded, "no_such_task", 1, 512, 0)


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_borrowed_models_score_and_answer_as_lm_eval_s_own(loaded, name):
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.vocab_size = 2048
    model = with_states(AutoModelForCausalLM.from_config(config).eval())
    ours, theirs = pair(model, loaded[1])
    assert_same_scores(score(ours, PAIRS), score(theirs, PAIRS))
    assert rolling(ours, "import os\n" * 9) == pytest.approx(rolling(theirs, "import os\n" * 9), abs=1e-3)
    for settings in ({}, {"until": ["e"]}, {"num_beams": 2}, {"repetition_penalty": 1.3}):
        answers = [generate(lm, "import os", max_gen_toks=5, **settings) for lm in (ours, theirs)]
        assert answers[0] == answers[1]
