"""Write the model card of a base from its settings and from the figures that its run has logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.report.card import MARK
from refine_nsp.report.tables import Cell, Table
from refine_nsp.tiny.corpus import HELD_OUT as HELD_OUT_MODULES
from refine_nsp.tiny.families import FACTS, WORDED
from refine_nsp.tiny.measures import HELD_OUT, recall_in
from refine_nsp.tiny.pretrain_settings import PretrainConfig

NAMES = {"delta_net": "DeltaNet", "gated_deltanet": "Gated DeltaNet", "lact_swiglu": "LaCT"}
SAYS = {
    FACTS: "facts ` name = value value;` scattered in text, mentioned again later (189 names, 63 value words)",
    "needles": "a number, word pair or uuid for a key, hidden in text, code or RULER's noise; one or several keys and values asked for",
    "listing": "lines of keys and values; a key's line again",
    "chains": "variables assigned a value or one another; all variables of a value, or the value at a chain's end",
    "paragraphs": "who lives where, does what, has what, came when; questions in words",
}
START = {
    "delta_net": "q and k projections start equal, with convolutions that make a key stand for the tokens before it; o_proj undoes v_proj; "
    "the first head of the first layer mixes the last four tokens, the second heads look three tokens back",
    "lact_swiglu": "the first layer's heads start looking one and two tokens back and put what they see into channels of its own; in later "
    "layers q and k start as features of the tokens up to here and of those before",
}
START["gated_deltanet"] = START["delta_net"] + "; memories start at 1,000 to 10,000 tokens long"


def model_card(model: FastWeightForCausalLM, args: PretrainConfig, done: int, records: Sequence[Mapping[str, Any]]) -> str:
    """Write the card in Markdown, with the hub's header, for `done` steps and the records of `metrics.jsonl`."""
    name, millions = NAMES[args.model_type], model.num_parameters() / 1e6
    shared = [family for family in args.families if family in WORDED]
    tokens = args.max_length * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    began = f"started from `{args.start_from}` with new optimizer moments, " if args.start_from is not None else ""
    lines = [
        "---\nlicense: apache-2.0\nlibrary_name: transformers\npipeline_tag: text-generation",
        f"tags: [{args.model_type}, fast-weights, long-context, recall]\n---\n{MARK}\n",
        f"# {name}, {millions:.1f} M parameters\n",
        f"{args.num_hidden_layers} layers of width {args.hidden_size}, {args.num_heads} heads, tied embeddings, byte-level BPE of "
        f"{args.vocab_size:,} pieces with single digits. Small enough to ship and to mid-train in minutes on a laptop: a base for "
        "experiments with recall, not a language model for use.\n",
        f"**Made by** `refine-nsp pretrain`, {began}seed {args.seed}: {done:,} of {args.max_steps:,} steps of {tokens:,} "
        f"tokens ({done * tokens / 1e6:.1f} M tokens), AdamW, learning rate {args.learning_rate:g} with warm-up and "
        f"{'linear decay' if args.lr_scheduler_type == 'polynomial' else f'schedule {args.lr_scheduler_type}'}, "
        f"{'bfloat16 products, ' if args.bf16 else ''}weights stored as {args.store_dtype}. The same settings, seed and Python give the "
        "same model up to rounding.\n",
        phases_table(args).markdown(),
        "**Data.** The source of the Python standard library as installed (licence: PSF-2.0), read from disk, without the modules "
        f"{', '.join(HELD_OUT_MODULES)}; and generated documents:\n",
        *(f"- {family}: {SAYS[family]}" for family in args.families),
        "",
        f"**So that recall appears in few steps**: what is recalled is dense and short range first; answers weigh more early; "
        f"{START[args.model_type]}.\n",
    ]
    if shared:
        lines.append(
            f"**Overlap with RULER.** Half the wordings of {', '.join(shared)} are trained on, the others only measured with. Among the "
            "trained ones are RULER's own sentences and questions for its needle tasks and for variable tracking, and its haystack of "
            "noise; not its essays, none of its keys (drawn from other words) and none of its values (drawn at random). So RULER's needles "
            "measure how far and how well a known format is recalled.\n"
        )
    if measured := next((record for record in reversed(records) if "eval_loss" in record), None):
        lines += [
            f"**Measured** on held-out modules: cross-entropy {measured['eval_loss']:.2f} nats per token. Share of answers right, greedy, "
            "by length of the prompt in tokens (share of their tokens right):\n",
            probes_table(recall_in(measured)).markdown(),
        ]
    lines.append(
        f"**Limits.** It was trained on rows of up to {max(p.length for p in args.phases):,} tokens, text of one kind and generated "
        "documents. Nothing shown with it says how methods compare at full scale."
    )
    return "\n".join(lines) + "\n"


def phases_table(args: PretrainConfig) -> Table:
    """Make a table with a row for each phase, and a column for each family's share of the rows."""
    rows: list[list[Cell]] = [
        [f"{p.steps:,}", f"{p.length:,}", p.answer_weight, *(f"{100 * p.shares.get(f, 0.0):.0f}" for f in args.families)]
        for p in args.phases
    ]
    return Table("Phases", ["steps", "row", "answers weigh", *(f"% {family}" for family in args.families)], rows)


def probes_table(probes: Mapping[str, Mapping[str, float]]) -> Table:
    """Make a table with a row for each family and wording, and a column for each length."""
    lengths = sorted({int(name.rpartition("_")[2]) for name in probes})
    rows: list[list[Cell]] = []
    for kind in dict.fromkeys(name.rpartition("_")[0] for name in probes):
        found = [probes[f"{kind}_{length}"] for length in lengths]
        title = kind.removesuffix(HELD_OUT) + (", held-out wordings" if kind.endswith(HELD_OUT) else "")
        rows.append([title, *(f"{100 * p['greedy']:.0f} ({100 * p['tokens']:.0f})" for p in found)])
    return Table("Recall, %", ["", *(f"{length:,}" for length in lengths)], rows)
