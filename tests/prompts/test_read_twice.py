"""A context read twice: the same tokens again before the question, everything else once, cut before it is doubled."""

import pytest

from refine_nsp.errors import RefineError
from refine_nsp.evaluation.tasks import truncate_right
from refine_nsp.models.load import load_tokenizer
from refine_nsp.prompts.encoding import encode_prompt, render, truncate_middle
from refine_nsp.prompts.qa_sources import QASource, Question
from refine_nsp.prompts.read_twice import MarkedPrompt, encode_question, find_context, mark_context, new_line
from refine_nsp.prompts.ruler import TASKS, Sources, build_ruler, essay_words
from tests.prompts.tokenizer_kinds import LEADING, TEMPLATES, plain, tokenizer_of

CONTEXT = "The capital of Syldavia is Klow.\n\nIts river is the Wladir."
PROMPT = f"Read this.\n{CONTEXT}\nWhich is the capital? Answer:"
TWICE = f"Read this.\n{CONTEXT}\n{CONTEXT}\nWhich is the capital? Answer:"
LENGTHS = {"cwe": 5120}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("refine-nsp/tiny-delta-net")


def marked(tokenizer, text, context):
    return mark_context(lambda part: encode_prompt(tokenizer, part), text, find_context(text, context))


@pytest.mark.parametrize("kind", LEADING)
def test_tokens_are_those_of_the_text_with_its_context_twice(kind):
    tokenizer = tokenizer_of(kind)
    leading = tokenizer.convert_tokens_to_ids(LEADING[kind])
    prompt = marked(tokenizer, PROMPT, CONTEXT)
    assert prompt.ids == encode_prompt(tokenizer, PROMPT)
    assert prompt.ids[prompt.start : prompt.end] == plain(tokenizer, CONTEXT)
    assert prompt.twice(new_line(tokenizer)) == leading + plain(tokenizer, TWICE)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_of_ruler_has_its_context_twice_and_its_question_once(task, tokenizer):
    documents = [f"Document about thing {i}. It has some words." for i in range(60)]
    source = QASource([Question(f"q{i}", f"What is thing {i}?", [f"thing {i}"], (i,)) for i in range(2)], documents)
    sources = Sources(essay_words(None), {"qa_1": source, "qa_2": source})
    for e in build_ruler([task], [LENGTHS.get(task, 1024)], 2, tokenizer, sources)[task]:
        start, end = find_context(e.prompt, e.context)
        written = f"{e.prompt[:end]}\n{e.prompt[start:]}"
        assert marked(tokenizer, e.prompt, e.context).twice(new_line(tokenizer)) == encode_prompt(tokenizer, written)
        assert len(e.context) > 0.4 * len(e.prompt) and written.count(e.prompt[end:]) == e.prompt.count(e.prompt[end:])
        # A worked example is no part of the context.
        assert task not in ("vt", "cwe") or e.context not in e.prompt[: start + 10]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "byt5"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_is_applied_once(kind, template):
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = TEMPLATES[template]

    def asked(content):
        return [{"role": "user", "content": content}]

    once = marked(tokenizer, render(tokenizer, asked(PROMPT)), CONTEXT)
    assert once.ids == encode_prompt(tokenizer, asked(PROMPT))
    assert once.twice(new_line(tokenizer)) == encode_prompt(tokenizer, asked(TWICE))


@pytest.mark.parametrize("cut", [truncate_middle, truncate_right])
@pytest.mark.parametrize("limit", [10, 20, 33, 60])
def test_a_prompt_is_cut_before_it_is_doubled(cut, limit):
    whole = MarkedPrompt(list(range(100, 140)), 4, 30)
    short = whole.cut(cut, limit)
    assert short.ids == cut(whole.ids, limit)
    context = [i for i in short.ids if 104 <= i < 130]
    head, question = [i for i in short.ids if i < 104], [i for i in short.ids if i >= 130]
    assert short.twice([7]) == [*head, *context, 7, *context, *question]


def test_a_cut_that_leaves_no_context_is_refused():
    with pytest.raises(RefineError, match=r"cut to 8 tokens, the prompt \(40 tokens\) has none of its context left"):
        MarkedPrompt(list(range(40)), 10, 30).cut(truncate_middle, 8)


@pytest.mark.parametrize(
    ("text", "context", "message"),
    [
        ("What?", " ", "has no context to read twice: .* a column `context`"),
        ("What?", "Klow", "the context 'Klow' stands 0 times in the prompt"),
        ("Klow, Klow?", "Klow", "stands 2 times in the prompt"),
    ],
)
def test_a_context_stands_in_its_prompt_once(text, context, message):
    with pytest.raises(RefineError, match=message):
        find_context(text, context)


@pytest.mark.parametrize("kind", LEADING)
def test_a_bare_prompt_is_doubled_whole_or_up_to_its_question(kind):
    tokenizer = tokenizer_of(kind)

    def encoded(text):
        return encode_prompt(tokenizer, text)

    assert encode_question(tokenizer, "A is 1.\n", None, False) == (encoded("A is 1.\n"),) * 2
    assert encode_question(tokenizer, "A is 1.\n", "A?", False) == (encoded("A is 1.\nA?"),) * 2
    assert encode_question(tokenizer, "A is 1.\n", "A?", True) == (encoded("A is 1.\nA?"), encoded("A is 1.\nA is 1.\nA?"))
    assert encode_question(tokenizer, "A is 1.", None, True) == (encoded("A is 1."), encoded("A is 1.\nA is 1."))
    assert encode_question(tokenizer, "", None, True)[1] == encoded("")
