"""Prepare what models are trained and measured on: text, generated documents, RULER's prompts, novels, and multi-document questions.

A question's prompt is a row of documents, each a paragraph with one fact ` name = value value;` set into it at a random place; it asks
for one of the values by name. Paragraphs come from SQuAD and HotpotQA (or, without those files, from the standard library's text);
paragraphs to train on, to choose settings on and to report on are disjoint, and so are windows of held-out text and the seeds of probes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refine_nsp.evaluation.arguments import EvaluationArguments
from refine_nsp.evaluation.tasks import Task, build_tasks
from refine_nsp.prompts.qa_sources import read_qa
from refine_nsp.text.reading import read_documents
from refine_nsp.tiny.corpus import standard_library
from refine_nsp.tiny.documents import FactTokens, Writer, draw_facts, scattered
from refine_nsp.tiny.families import WORDED
from refine_nsp.tiny.measures import ProbeSet, family_probes
from refine_nsp.tiny.pretrain_settings import PretrainPhase
from refine_nsp.tiny.rows import Sources, encode_texts, step_rows

from .settings import SHARES, Scale

DOCUMENT_TOKENS = 64  # a paragraph, its heading and its facts
FACTS = 3  # a document
QUESTION_TOKENS = 20
QA_FROM = 2048  # tokens that hold a question of SQuAD (qa_1) and its document; one of HotpotQA's (qa_2) alone takes 4,500
PARTS = ("train", "choose", "report")
TRIAL_SEED = 900  # of rows, prompts and probes that settings are chosen by
ROWS_SEED = 1000  # rows are those of pretraining steps with seeds from here on, which no base was pretrained with


@dataclass(frozen=True)
class Files:
    """Hold the paths of real text, each of which may be missing."""

    squad: str | None = None
    hotpotqa: str | None = None
    essays: str | None = None
    novels: str | None = None


@dataclass(frozen=True)
class Asked:
    """Hold a prompt, the answer's tokens (without EOS), and the answer as text."""

    prompt: list[int]
    answer: list[int]
    reference: str


@dataclass(frozen=True)
class Material:
    """sources: what rows are made of. held_out: tokens of text for filler. windows: text to measure, [n, T] each: `choose`, `report`,
    `novels`. paragraphs[source][part]: token lists.
    """

    tokenizer: PreTrainedTokenizerBase
    tokens: FactTokens
    sources: Sources
    writer: Writer
    held_out: list[int]
    windows: dict[str, Tensor]
    paragraphs: dict[str, dict[str, list[list[int]]]]


def prepare(scale: Scale, tokenizer: PreTrainedTokenizerBase, files: Files) -> Material:
    """Read and split all texts. The standard library's held-out modules are for measuring only."""
    training, measuring = standard_library(held_out=False), standard_library(held_out=True)
    stream, held_out = encode_texts(tokenizer, training), encode_texts(tokenizer, measuring)
    rows = spread_windows(held_out, 2 * scale.text_windows, scale.mid_length)
    windows = {"choose": rows[::2], "report": rows[1::2]}
    if files.novels is not None:
        windows["novels"] = novel_windows(scale, tokenizer, files.novels)
    named = {"SQuAD": files.squad, "HotpotQA": files.hotpotqa}
    texts = {name: read_qa(path).documents for name, path in named.items() if path is not None}
    if not texts:
        texts = {"standard library": [p for text in measuring for p in text.split("\n\n") if len(p) > 200]}
    return Material(
        tokenizer,
        FactTokens.of(tokenizer),
        Sources(stream, Writer.of(tokenizer, training)),
        Writer.of(tokenizer, measuring),
        held_out.tolist(),
        windows,
        {name: split(tokenizer, documents) for name, documents in texts.items()},
    )


def spread_windows(stream: Tensor, count: int, length: int) -> Tensor:
    """Cut windows [count, length], evenly spread over a stream of tokens."""
    starts = torch.linspace(0, len(stream) - length, count).long().tolist()
    return torch.stack([stream[s : s + length] for s in starts])


def novel_windows(scale: Scale, tokenizer: PreTrainedTokenizerBase, path: str) -> Tensor:
    """Cut windows from novels, as many from each."""
    texts = list(read_documents(path, ("text",))["text"])
    each = -(-scale.novel_windows // len(texts))
    # Enough characters for each window; whole novels would take minutes to encode and most of it would not be read.
    spans = [t[i * len(t) // each :][: 8 * scale.novel_length] for t in texts for i in range(each)]
    rows = [ids[: scale.novel_length] for ids in tokenizer(spans, add_special_tokens=False)["input_ids"]]
    return torch.tensor([r for r in rows if len(r) == scale.novel_length][: scale.novel_windows])


def split(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> dict[str, list[list[int]]]:
    """Cut pieces of `DOCUMENT_TOKENS` from paragraphs: half of these to train on, a quarter each to choose and to report on."""
    encoded = tokenizer(list(dict.fromkeys(documents)), add_special_tokens=False)["input_ids"]
    rows = [ids for ids in encoded if len(ids) >= DOCUMENT_TOKENS]
    random.Random(0).shuffle(rows)
    half, quarter = len(rows) // 2, len(rows) // 4
    parts = (rows[:half], rows[half : half + quarter], rows[half + quarter :])
    known: set[tuple[int, ...]] = set()
    pieces: dict[str, list[list[int]]] = {}
    for name, part in zip(PARTS, parts, strict=True):
        # Paragraphs that differ can have a piece in common; it stays with the first.
        own = dict.fromkeys(tuple(piece) for row in part for piece in _pieces(row))
        pieces[name] = [list(piece) for piece in own if piece not in known]
        known |= own.keys()
    return pieces


def _pieces(ids: list[int]) -> list[list[int]]:
    """Cut whole pieces of `DOCUMENT_TOKENS`, one after the other, since a small file of paragraphs must fill a row of documents."""
    return [ids[i : i + DOCUMENT_TOKENS] for i in range(0, len(ids) - DOCUMENT_TOKENS + 1, DOCUMENT_TOKENS)]


# --- text and recall --------------------------------------------------------------------------------------------------


def mid_rows(scale: Scale, material: Material, seed: int, steps: int) -> Dataset:
    """Make the rows of one seed, half text and half generated documents: the same for all arms, and the same first rows for more steps."""
    phase = PretrainPhase(steps, scale.mid_length, SHARES, dense=0.5, answer_weight=1.0)
    made = (step_rows(ROWS_SEED + seed, step, scale.mid_rows, phase, material.sources)[0] for step in range(steps))
    rows = [row for ids in made for row in ids.tolist()]
    return Dataset.from_list([{"input_ids": row} for row in rows])


def probes(scale: Scale, material: Material, seed: int) -> dict[str, ProbeSet]:
    """Build probes of recall in every family, in wordings that are trained on and in held-out ones, by length."""
    return family_probes(material.writer, list(WORDED), material.held_out, scale.probe_lengths, scale.probes, seed)


def ruler_tasks(scale: Scale, tokenizer: PreTrainedTokenizerBase, files: Files, seed: int) -> list[Task]:
    """Build RULER's needle tasks, and SQuAD's questions where they are at hand and their documents fit."""

    def tasks(names: list[str], lengths: list[int], **source: str | None) -> list[Task]:
        if not names or not lengths:
            return []
        return build_tasks(
            EvaluationArguments(
                tasks=names, lengths=lengths, samples=scale.ruler_prompts, seed=seed, **source,
            ),
            tokenizer,
        )  # fmt: skip

    asked = ["qa_1"] if files.squad is not None else []
    lengths = list(scale.ruler_lengths)
    return tasks(["niah"], lengths, essays=files.essays) + tasks(asked, [n for n in lengths if n >= QA_FROM], squad=files.squad)


# --- questions on documents -------------------------------------------------------------------------------------------


def ask(rng: random.Random, material: Material, paragraphs: Sequence[list[int]], length: int) -> Asked:
    """Ask one question on as many documents as fit into `length` tokens of prompt."""

    def encode(text: str) -> list[int]:
        return list(material.tokenizer(text, add_special_tokens=False)["input_ids"])

    documents = (length - QUESTION_TOKENS) // DOCUMENT_TOKENS
    facts = draw_facts(rng, material.tokens, FACTS * documents)
    question, answer = rng.choice(facts)
    prompt: list[int] = []
    for i, paragraph in enumerate(rng.sample(list(paragraphs), documents)):
        head = encode(f"\n\nDocument {i + 1}:\n")
        inside = [[*q, *a, *material.tokens.end] for q, a in facts[i * FACTS : (i + 1) * FACTS]]
        text = paragraph[: DOCUMENT_TOKENS - len(head) - sum(map(len, inside))]
        prompt += head + scattered(rng, inside, text)
    # As in RULER, the prompt ends with the answer's beginning, which names what is asked for.
    name = question[: -len(material.tokens.equals)]
    prompt += encode("\n\nQuestion: What is") + name + encode("?\nAnswer:") + question
    return Asked(prompt, answer, material.tokenizer.decode(answer).strip())


def questions(material: Material, part: str, source: str, length: int, count: int, seed: int = 0) -> list[Asked]:
    """Ask `count` seeded questions on the paragraphs of a part."""
    rng = random.Random(f"qa-{part}-{source}-{length}-{seed}")
    return [ask(rng, material, material.paragraphs[source][part], length) for _ in range(count)]
