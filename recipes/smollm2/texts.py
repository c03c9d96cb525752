"""Write the texts that a memory is taught with: novels, passages that come back, facts that are asked for again, and code.

    python recipes/smollm2/texts.py runs/smollm2/teacher runs/smollm2/texts --long novels.parquet
    python recipes/smollm2/texts.py runs/smollm2/teacher runs/smollm2/held_out --long others.parquet --rows 96 --held_out

A folder gets a file of rows for each kind, in the shares of SHARES. Every row has as many tokens of the teacher's tokenizer as --tokens
says. What comes back, comes back more than a window of 256 tokens later. Facts and questions are worded otherwise than RULER's, so that
RULER's needles stay an exam. Without --long all text is that of Python's standard library. Rows follow from the seed, and say where what
comes back stands, in tokens. `centre.jsonl` has some of the novels as text.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from refine_nsp.files import write_atomically
from refine_nsp.text.reading import read_documents
from refine_nsp.tiny.corpus import standard_library

SHARES = {"novels": 0.25, "echoes": 0.4, "facts": 0.25, "code": 0.1}  # as teach.yaml mixes them
CENTRE_ROWS = 16
FACTS = 4  # a row
NAMES = "Ada Boris Carla Dmitri Elsa Farid Greta Hugo Ines Jonas Kira Lars Mina Nadia Otto Pavel Rosa Sven Tilda Ugo Vera Wim Yara Zoe"
TOWNS = "Aldbury Brenholm Carrow Dunmere Eastvale Fenwick Garth Halden Ilmarsh Kelby Lorne Marwick Norhaven Ostrow Pell Quarley"
COLOURS = "amber black blue brown copper crimson green grey ivory orange purple red silver violet white yellow"
THINGS = "anchor barrel bell cabinet casket clock crate drum engine gate kettle ladder lantern locker mirror piano safe trunk wagon well"
# A fact, what asks for it, and its answer. {n}: digits; the other words are drawn from the lists above.
WORDINGS = (
    ("The {colour} {thing} in {town} opens with the code {n}.", "Which code opens the {colour} {thing} in {town}?", "{n}"),
    ("{name} of {town} can be rung up on line {n}.", "On which line can {name} of {town} be rung up?", "{n}"),
    ("{name} paid {n} crowns for the {colour} {thing}.", "How many crowns did {name} pay for the {colour} {thing}?", "{n}"),
    ("In {town} they keep a {colour} {thing} that belongs to {name}.", "Whose is the {colour} {thing} in {town}?", "{name}"),
    ("{name} hid the letter behind the {colour} {thing}.", "Behind what did {name} hide the letter?", "the {colour} {thing}"),
    ("The parcel for {name} went to {town}, box {n}.", "To which town and box did the parcel for {name} go?", "{town}, box {n}"),
)


@dataclass(frozen=True)
class Writer:
    """Write rows of one seed. long: texts to cut from; code: others; length: tokens of a row."""

    drawn: random.Random
    tokenizer: PreTrainedTokenizerBase
    length: int
    long: Sequence[str]
    code: Sequence[str]

    def row(self, kind: str) -> dict[str, object]:
        """Write a row: its `input_ids`, and where there are some, the places [start, end) of what comes back."""
        if kind == "echoes":
            return self._echo()
        if kind == "facts":
            return self._facts()
        return self._whole([self._stretch(self.long if kind == "novels" else self.code, self.length)])

    def _stretch(self, texts: Sequence[str], tokens: int) -> list[int]:
        """Cut a stretch of so many tokens, from the beginning of a word in a random place of a random text."""
        characters = 8 * tokens + 400
        text = self.drawn.choice([t for t in texts if len(t) > characters])
        start = self.drawn.randrange(len(text) - characters)
        part = text[start : start + characters]
        return self._encode(part[part.find(" ") :])[:tokens]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _whole(self, parts: Sequence[Sequence[int]], **places: object) -> dict[str, object]:
        ids = [i for part in parts for i in part][: self.length]
        return {"input_ids": ids, **places}

    def _echo(self) -> dict[str, object]:
        """Write passages twice, 280 to 560 tokens apart, one after another while there is room for them."""
        parts: list[list[int]] = []
        first, second, end = [], [], 0
        while not first or end + 1000 < self.length:
            length, before, gap = self.drawn.randrange(80, 200), self.drawn.randrange(1, 120), self.drawn.randrange(280, 560)
            passage = self._stretch(self.long, length)
            parts += [self._stretch(self.long, before), passage, self._stretch(self.long, gap), passage]
            first.append([end + before, end + before + length])
            second.append([end + before + length + gap, end + before + length + gap + length])
            end += before + gap + 2 * length
        parts.append(self._stretch(self.long, max(1, self.length - end)))
        return self._whole(parts, first=first, second=[[a, min(b, self.length)] for a, b in second])

    def _facts(self) -> dict[str, object]:
        """Set facts into a text, and ask for them at its end in another order."""
        told = [self._fact() for _ in range(FACTS)]
        asked = self.drawn.sample(told, FACTS)
        end, places = [], []
        for _, question, answer in asked:
            end += self._encode(f"\n{question}")
            places.append((len(end), len(end) + len(self._encode(f" {answer}"))))
            end += self._encode(f" {answer}")
        facts = [self._encode(f" {fact}") for fact, _, _ in told]
        filler = self._stretch(self.long, self.length - len(end) - sum(map(len, facts)))
        parts: list[Sequence[int]] = []
        cuts = sorted(self.drawn.randrange(1, len(filler) - 300) for _ in facts)
        for start, stop, fact in zip([0, *cuts], cuts, facts, strict=False):
            parts += [filler[start:stop], fact]
        parts += [filler[cuts[-1] :], end]
        begin = sum(map(len, parts)) - len(end)
        return self._whole(parts, answers=[[begin + a, begin + b] for a, b in places])

    def _fact(self) -> tuple[str, str, str]:
        words = {"n": str(self.drawn.randrange(1000, 99999))}
        for key, values in (("name", NAMES), ("town", TOWNS), ("colour", COLOURS), ("thing", THINGS)):
            words[key] = self.drawn.choice(values.split())
        fact, question, answer = (part.format(**words) for part in self.drawn.choice(WORDINGS))
        return fact, question, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", help="folder of the teacher")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--long", help="file of long texts, with a column `text`")
    parser.add_argument("--rows", type=int, default=2400)
    parser.add_argument("--tokens", type=int, default=1024, help="of a row [1024]")
    parser.add_argument("--seed", default="0")
    parser.add_argument(
        "--held_out", action="store_true", help="take the modules of the standard library that are kept for measuring"
    )
    args = parser.parse_args()
    tokenizer, code = AutoTokenizer.from_pretrained(args.tokenizer), standard_library(held_out=args.held_out)
    long = code if args.long is None else list(read_documents(args.long)["text"])
    writer = Writer(random.Random(f"smollm2-{args.seed}"), tokenizer, args.tokens, long, code)
    some = [writer.row("novels")["input_ids"] for _ in range(CENTRE_ROWS)]
    rows: dict[str, list[dict[str, object]]] = {"centre": [{"text": tokenizer.decode(ids)} for ids in some]}
    rows |= {kind: [writer.row(kind) for _ in range(round(share * args.rows))] for kind, share in SHARES.items()}
    for kind, made in rows.items():
        write_atomically(args.folder / f"{kind}.jsonl", "".join(json.dumps(row) + "\n" for row in made))


if __name__ == "__main__":
    main()
