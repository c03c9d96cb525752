"""One BOS, no EOS inside a prompt, the answer whole and one EOS: for every kind of tokenizer and every use of a prompt."""

import io
import re
from types import SimpleNamespace

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import refine_nsp
from refine_nsp import cli
from refine_nsp.errors import RefineError
from refine_nsp.evaluation.tasks import GenerationTask
from refine_nsp.models.load import load_tokenizer
from refine_nsp.prompts.encoding import (
    as_messages,
    content_key,
    encode_answer,
    encode_pair,
    encode_prompt,
    leading_tokens,
    render,
    start_token,
)
from refine_nsp.prompts.examples import Example
from refine_nsp.prompts.ruler import BUDGETS, Sources, build_ruler, essay_words
from refine_nsp.training.answers import AnswerArguments, encode_row
from refine_nsp.training.data import tokenize
from tests.prompts.tokenizer_kinds import LEADING, TEMPLATES, plain, tokenizer_of

KINDS = list(LEADING)
QUESTION = "Which is the capital of Syldavia?"
ASKED = [{"role": "user", "content": QUESTION}]


def leading(tokenizer, kind):
    return tokenizer.convert_tokens_to_ids(LEADING[kind])


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_use_of_a_prompt_has_the_same_tokens(kind):
    tokenizer = tokenizer_of(kind)
    prompt, eos = f"{QUESTION}\nAnswer:", tokenizer.eos_token_id
    expected = leading(tokenizer, kind) + plain(tokenizer, prompt)
    assert leading_tokens(tokenizer) == leading(tokenizer, kind)
    assert encode_prompt(tokenizer, prompt) == expected
    assert encode_pair(tokenizer, prompt, " Klow") == (expected, plain(tokenizer, " Klow"))
    assert encode_pair(tokenizer, prompt + " ", "Klow") == (expected, plain(tokenizer, " Klow"))
    task = GenerationTask("t", [Example("a", prompt, ["Klow"], 8)], lambda *_: {})
    assert task._request(0, tokenizer).ids == expected
    row = encode_row({"prompt": prompt, "answers": ["Klow", 7]}, AnswerArguments(dataset_name="f"), tokenizer, 512, "f, row 0")
    assert row["prompt_ids"] == expected and row["references"] == ["Klow", "7"]
    assert row["answers_ids"] == [[*plain(tokenizer, " Klow"), eos], [*plain(tokenizer, " 7"), eos]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_begins_with_bos_gets_no_second_one(kind):
    tokenizer = tokenizer_of(kind)
    written = "".join(LEADING[kind]) + "Klow"
    assert encode_prompt(tokenizer, written) == leading(tokenizer, kind) + plain(tokenizer, "Klow")
    assert encode_pair(tokenizer, written, " is")[0] == encode_prompt(tokenizer, "Klow")


def test_flags_of_a_tokenizer_are_seen_when_they_are_changed():
    tokenizer = tokenizer_of("gpt2")
    assert leading_tokens(tokenizer) == []
    tokenizer.add_bos_token = True
    tokenizer.add_eos_token = True
    whole, bos, eos = tokenizer("Klow")["input_ids"], tokenizer.bos_token_id, tokenizer.eos_token_id
    assert whole == [bos, *plain(tokenizer, "Klow"), eos] and encode_prompt(tokenizer, "Klow") == whole[:-1]


def test_white_space_at_a_prompt_s_end_is_the_answer_s_only_where_they_merge():
    tokenizer = tokenizer_of("llama")
    eos = tokenizer.eos_token_id
    assert encode_answer(tokenizer, "Answer: ", "Klow") == (
        encode_prompt(tokenizer, "Answer:"),
        [*plain(tokenizer, " Klow"), eos],
    )
    assert encode_answer(tokenizer, "Answer:\n", "Klow") == (
        encode_prompt(tokenizer, "Answer:\n"),
        [*plain(tokenizer, "Klow"), eos],
    )
    byt5 = tokenizer_of("byt5")
    assert encode_answer(byt5, "A: ", "x") == (plain(byt5, "A: "), [*plain(byt5, "x"), byt5.eos_token_id])
    assert encode_answer(tokenizer, "Answer:", " Klow</s>") == encode_answer(tokenizer, "Answer:", " Klow")


def merging() -> PreTrainedTokenizerFast:
    """Letters and two merges: `ab`, and `a` with the space before it, are tokens."""
    vocabulary = {token: i for i, token in enumerate(("<s>", "</s>", "a", "b", "c", "ab", " ", " a"))}
    raw = Tokenizer(models.BPE(vocabulary, [("a", "b"), (" ", "a")]))
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def test_a_continuation_that_merges_into_its_context_is_encoded_by_itself():
    tokenizer = merging()
    assert plain(tokenizer, "cab") == [4, 5]
    assert encode_pair(tokenizer, "ca", "b") == ([4, 2], [3])
    assert encode_pair(tokenizer, "a", "b") == ([2], [3])
    assert encode_pair(tokenizer, "ca", "bc") == ([4, 2], [4])  # as lm-eval cuts
    assert encode_answer(tokenizer, "ca", "bc") == ([4, 2], [3, 4, 1])  # what is learned is whole
    with pytest.raises(RefineError, match="the continuation '' has no token"):
        encode_pair(tokenizer, "a", "")
    with pytest.raises(RefineError, match="the answer '</s>' has no token"):
        encode_answer(tokenizer, "a", "</s>")


def test_several_answers_share_their_prompt_s_tokens():
    row = encode_row({"prompt": "b ", "answers": ["a", "b"]}, AnswerArguments(dataset_name="f"), merging(), 512, "f, row 0")
    assert row["prompt_ids"] == [3] and row["answers_ids"] == [[7, 1], [6, 3, 1]]  # the space merges with one of them alone


def test_before_an_empty_context_stands_bos_or_eos_or_what_begins_texts():
    for kind, token in (("llama", "<s>"), ("gpt2", "<s>"), ("byt5", "</s>")):
        tokenizer = tokenizer_of(kind)
        assert encode_pair(tokenizer, "", "Klow") == ([tokenizer.convert_tokens_to_ids(token)], plain(tokenizer, "Klow"))
    tokenizer = tokenizer_of("bert")
    tokenizer.bos_token = tokenizer.eos_token = None
    assert start_token(tokenizer) == tokenizer.convert_tokens_to_ids("[CLS]")
    llama = tokenizer_of("llama")
    assert encode_pair(llama, "", "<s>Klow") == encode_pair(llama, "", "Klow")  # the continuation brings its BOS


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("context", ["The sky is", "The sky is ", "Ans", "a\n"])
def test_pairs_are_lm_eval_s(kind, context):
    hf = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed").HFLM
    tokenizer = tokenizer_of(kind)
    theirs = SimpleNamespace(tokenizer=tokenizer, add_bos_token=None, prefix_token_id=tokenizer.bos_token_id, backend="causal")
    theirs.tok_encode = lambda text, **how: hf.tok_encode(theirs, text, **how)
    for continuation in (" that", "wer", " a b", "\n"):
        assert encode_pair(tokenizer, context, continuation) == hf._encode_pair(theirs, context, continuation)


def test_a_prefix_space_tokenizer_continues_in_place(shared):
    tokenizer = load_tokenizer(shared / "tokenizers/mistral_v1")
    pieces = tokenizer.convert_ids_to_tokens
    assert [pieces(ids) for ids in encode_pair(tokenizer, "The sky is", " that")] == [["<s>", "▁The", "▁sky", "▁is"], ["▁that"]]
    assert pieces(encode_answer(tokenizer, "The sky is", " that")[1]) == ["▁that", "</s>"]


# --- conversations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(TEMPLATES))
def test_a_conversation_has_one_bos_where_the_tokenizer_or_the_template_has_one(kind, name):
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = TEMPLATES[name]
    ids, bos = encode_prompt(tokenizer, ASKED), tokenizer.bos_token_id
    theirs = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=True, return_dict=False)
    writes = bos is not None and "bos_token" in TEMPLATES[name]
    assert ids.count(bos) == (1 if writes or "<s>" in LEADING[kind] else 0)
    assert ids[len(ids) - len(theirs) :] == theirs and tokenizer.eos_token_id not in ids
    if kind != "bert" and (writes or not LEADING[kind]):
        assert ids == theirs
    assert encode_prompt(tokenizer, render(tokenizer, ASKED)) == ids  # as lm-eval hands it over, already text


@pytest.mark.parametrize("kind", ["llama", "both", "byt5"])
@pytest.mark.parametrize(
    ("name", "answer"), [("writes_bos", "Klow"), ("turns", "Klow<end>"), ("one_role", "Klow")], ids=lambda x: str(x)
)
def test_an_answer_ends_as_the_template_ends_a_turn_and_with_one_eos(kind, name, answer):
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = TEMPLATES[name]
    for given in ("Klow", {"role": "assistant", "content": "Klow"}):
        prompt_ids, ids = encode_answer(tokenizer, ASKED, given)
        assert prompt_ids == encode_prompt(tokenizer, ASKED)
        assert ids == [*plain(tokenizer, answer), tokenizer.eos_token_id]
    if name != "one_role":  # whose assistant's turn does not begin as its prompt ends
        whole = render(tokenizer, [*ASKED, {"role": "assistant", "content": "Klow"}, {"role": "user", "content": "!"}])
        assert whole.startswith(tokenizer.decode(prompt_ids).removeprefix("<s>" if name == "turns" else "") + answer)


def test_an_assistant_s_turn_at_the_end_of_a_prompt_is_continued():
    tokenizer = tokenizer_of("llama")
    tokenizer.chat_template = TEMPLATES["writes_bos"]
    begun = [*ASKED, {"role": "assistant", "content": "It is"}]
    assert render(tokenizer, begun) == f"<s><user>{QUESTION}<assistant>It is"
    row = encode_row({"prompt": begun, "answer": "Klow"}, AnswerArguments(dataset_name="f"), tokenizer, 512, "f, row 0")
    assert tokenizer.decode(row["prompt_ids"]) == render(tokenizer, begun)
    assert tokenizer.decode(row["answers_ids"][0]) == " Klow</s>"


def test_what_a_template_writes_before_the_answer_is_learned_with_it():
    tokenizer = tokenizer_of("llama")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think>{{ m.reasoning or '' }}</think>{% endif %}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    answer = {"role": "assistant", "content": "Klow", "reasoning": "I know."}
    assert tokenizer.decode(encode_answer(tokenizer, ASKED, answer)[1]) == "<think>I know.</think>Klow</s>"


def test_messages_are_read_as_files_and_the_hub_have_them():
    parts = [{"type": "text", "text": "a", "image": None}, {"type": "text", "text": "b"}]
    given = [{"from": "human", "value": "hi", "role": None}, {"role": "user", "content": parts, "name": None}]
    assert as_messages(given) == [{"role": "user", "content": "hi"}, {"role": "user", "content": "ab"}]
    for wrong, said in (
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            "message 0 has a part that is image; expected text only",
        ),
        ([{"role": "user", "content": 5}], "the content of message 0 is 5"),
        ([{"content": "x"}], "message 0 has no role"),
        (["x"], "message 0 is 'x'"),
        ([], "expected a list of messages"),
    ):
        with pytest.raises(RefineError, match=said):
            as_messages(wrong)


def test_templates_get_their_own_settings_and_say_what_they_refuse():
    tokenizer = tokenizer_of("llama")
    with pytest.raises(RefineError, match="the tokenizer has no chat template"):
        encode_prompt(tokenizer, ASKED)
    tokenizer.chat_template = "{% if tools %}{{ tools[0].name }}{% endif %}{% if loud %}!{% endif %}{{ messages[0].content }}"
    assert render(tokenizer, ASKED, tools='[{"name": "t"}]', loud=True) == f"t!{QUESTION}"
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RefineError, match="does not take these messages: roles must alternate"):
        render(tokenizer, ASKED)


# --- where prompts are used -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["both", "byt5"])
def test_ruler_counts_what_evaluation_feeds(kind):
    tokenizer = tokenizer_of(kind)
    length = 1024 if kind == "byt5" else 512
    built = build_ruler(["niah_single_1"], [length], 1, tokenizer, Sources(essay_words(None)))["niah_single_1"]
    fed = GenerationTask("t", built, lambda *_: {})._request(0, tokenizer).ids
    room = length - BUDGETS["niah_single_1"]
    sentence = plain(tokenizer, " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.")
    assert room - len(sentence) < len(fed) <= room and fed[-1] != tokenizer.eos_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_documents_keep_all_special_tokens(kind):
    tokenizer = tokenizer_of(kind)
    rows = tokenize(Dataset.from_list([{"text": "One city."}]), tokenizer, "text", 64, 2, False)
    assert rows[0]["input_ids"] == tokenizer("One city.")["input_ids"]


def test_a_tokenizer_s_key_is_its_content():
    keys = [content_key(tokenizer_of(kind)) for kind in KINDS]
    assert len(set(keys)) == len(KINDS) and keys == [content_key(tokenizer_of(kind)) for kind in KINDS]
    used = tokenizer_of("byt5")
    used("a text")
    assert content_key(used) == content_key(tokenizer_of("byt5")) != content_key(refine_nsp.load("refine-nsp/tiny-lact")[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose tokenizer puts BOS before and EOS behind every text."""
    path, tokenizer = tmp_path_factory.mktemp("model"), tokenizer_of("both")
    model = refine_nsp.load("refine-nsp/tiny-delta-net")[0]
    model.resize_token_embeddings(len(tokenizer) + 4, mean_resizing=False)
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_commands_give_a_model_the_prompt_and_no_eos(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert cli.main(["generate", str(folder), "--prompt", "import os", "--max_new_tokens", "2", "--greedy"]) in (0, None)
    written = capsys.readouterr().out
    assert written.startswith("<s>import os") and not written.startswith("<s>import os</s>")
    tokenizer, text = tokenizer_of("both"), "import os\n" * 20
    (tmp_path / "a.txt").write_text(text)
    expected = len(plain(tokenizer, text)) + 1
    cli.main(["ttt", str(folder), "--prompt_file", str(tmp_path / "a.txt"), "--ttt", "ntp", "--max_new_tokens", "1"])
    assert re.search(rf"{expected}\s+prompt\s+tokens", capsys.readouterr().out)
    cli.main(["inspect", str(folder), str(tmp_path / "a.txt"), "--output", str(tmp_path / "a.html")])
    assert re.search(rf"after\s+{expected}\s+tokens", capsys.readouterr().out)
