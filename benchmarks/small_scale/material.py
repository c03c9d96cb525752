"""What is trained on and what is measured on: rows of text and recall documents, and multi-document questions.

A question's prompt is a row of documents, each a paragraph with one fact ` name = value value;` set into it at a random place; it asks
for one of the values by name. Paragraphs come from SQuAD and HotpotQA (or, without those files, from the standard library's text);
paragraphs to train on, to choose settings on and to report on are disjoint.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refine_nsp.prompts.qa_sources import read_qa
from refine_nsp.tiny.corpus import standard_library
from refine_nsp.tiny.pretrain import encode_texts
from refine_nsp.tiny.quickstart import Settings, training_rows
from refine_nsp.tiny.recall import Fact, RecallTokens, answer, draw_facts, question, scattered, statement, take_filler

from .settings import Scale

DOCUMENT_TOKENS = 64  # a paragraph, its heading and its facts
FACTS = 3  # a document
QUESTION_TOKENS = 20
PARTS = ("train", "choose", "report")


@dataclass(frozen=True)
class Asked:
    """A prompt, the answer's tokens (without EOS), and the answer as text."""

    prompt: list[int]
    answer: list[int]
    reference: str


@dataclass(frozen=True)
class Needle:
    """A prompt that ends with the first question, the questions that follow (each asked after the model's own answer), and the answers."""

    prompt: list[int]
    following: list[list[int]]
    answers: list[list[int]]


@dataclass(frozen=True)
class Material:
    """stream: text to train on. held_out: text for filler. windows[part] [n, T]: text to measure. paragraphs[source][part]: token lists."""

    tokenizer: PreTrainedTokenizerBase
    tokens: RecallTokens
    stream: Tensor
    held_out: list[int]
    windows: dict[str, Tensor]
    paragraphs: dict[str, dict[str, list[list[int]]]]


def prepare(scale: Scale, tokenizer: PreTrainedTokenizerBase, squad: str | None, hotpotqa: str | None) -> Material:
    """Read and split everything. The standard library's held-out modules are for measuring only."""
    held_out = encode_texts(tokenizer, standard_library(held_out=True))
    n, T = scale.text_windows, scale.mid_length
    starts = torch.linspace(0, len(held_out) - T, 2 * n).long().tolist()
    rows = torch.stack([held_out[s : s + T] for s in starts])
    sources = {"SQuAD": squad, "HotpotQA": hotpotqa}
    texts = {name: read_qa(path).documents for name, path in sources.items() if path is not None}
    if not texts:
        texts = {"standard library": [p for text in standard_library(held_out=True) for p in text.split("\n\n") if len(p) > 200]}
    return Material(
        tokenizer,
        RecallTokens.of(tokenizer),
        encode_texts(tokenizer, standard_library(held_out=False)),
        held_out.tolist(),
        {"choose": rows[::2], "report": rows[1::2]},
        {name: split(tokenizer, documents) for name, documents in texts.items()},
    )


def split(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> dict[str, list[list[int]]]:
    """Paragraphs long enough, half of them to train on, a quarter each to choose and to report on."""
    encoded = tokenizer(list(dict.fromkeys(documents)), add_special_tokens=False)["input_ids"]
    rows = [ids for ids in encoded if len(ids) >= DOCUMENT_TOKENS]
    random.Random(0).shuffle(rows)
    half, quarter = len(rows) // 2, len(rows) // 4
    return dict(zip(PARTS, (rows[:half], rows[half : half + quarter], rows[half + quarter :]), strict=True))


def mid_rows(scale: Scale, material: Material, seed: int, steps: int) -> Dataset:
    """Rows of one seed, the same for all arms (more steps: the same rows first)."""
    s = Settings(steps=steps, sequences_per_step=scale.mid_rows, max_length=scale.mid_length, recall_share=scale.recall_share)
    return training_rows(s, seed, material.tokenizer, material.stream)


def ask(rng: random.Random, material: Material, paragraphs: list[list[int]], length: int) -> Asked:
    """One question on as many documents as fit `length` tokens of prompt."""

    def encode(text: str) -> list[int]:
        return list(material.tokenizer(text, add_special_tokens=False)["input_ids"])

    documents = (length - QUESTION_TOKENS) // DOCUMENT_TOKENS
    facts = draw_facts(rng, FACTS * documents)
    asked = rng.choice(facts)
    prompt: list[int] = []
    for i, paragraph in enumerate(rng.sample(paragraphs, documents)):
        head = encode(f"\n\nDocument {i + 1}:\n")
        inside = [statement(material.tokens, f) for f in facts[i * FACTS : (i + 1) * FACTS]]
        text = paragraph[: DOCUMENT_TOKENS - len(head) - sum(map(len, inside))]
        prompt += head + scattered(rng, inside, text)
    # As in RULER, the prompt ends with the answer's beginning, which names what is asked for.
    name = material.tokens.names[asked.name]
    prompt += encode("\n\nQuestion: What is") + name + encode("?\nAnswer:") + question(material.tokens, asked)
    ids = answer(material.tokens, asked)
    return Asked(prompt, ids, material.tokenizer.decode(ids).strip())


def questions(material: Material, part: str, source: str, length: int, count: int, seed: int = 0) -> list[Asked]:
    """`count` seeded questions from the paragraphs of a part."""
    rng = random.Random(f"qa-{part}-{source}-{length}-{seed}")
    return [ask(rng, material, material.paragraphs[source][part], length) for _ in range(count)]


def needles(material: Material, task: str, length: int, facts: int, count: int, seed: int) -> list[Needle]:
    """Prompts in held-out filler. S: one fact. MK: one of many asked. MQ: four of many, one after another. MV: four values of one name."""
    rng, tokens = random.Random(f"needles-{task}-{length}-{seed}"), material.tokens
    prompts = []
    for _ in range(count):
        stated = draw_facts(rng, 1 if task == "S" else facts)
        if task == "MV":
            first = stated[0]
            stated[1:4] = [Fact(first.name, draw_facts(rng, 1)[0].values) for _ in range(3)]
            asked = stated[:4]
        else:
            asked = rng.sample(stated, 4 if task == "MQ" else 1)
        ids = [statement(tokens, f) for f in rng.sample(stated, len(stated))]
        questions_ids = [question(tokens, f) for f in asked]
        hay = take_filler(rng, material.held_out, length - len(questions_ids[0]) - sum(map(len, ids)))
        following = [tokens.end + q for q in questions_ids[1:]]
        prompts.append(Needle(scattered(rng, ids, hay) + questions_ids[0], following, [answer(tokens, f) for f in asked]))
    return prompts
