"""The model card of a base, from its settings and what was measured on its way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from refine_nsp.models.blocks import FastWeightForCausalLM
from refine_nsp.report.tables import Cell, Table
from refine_nsp.tiny.corpus import HELD_OUT as HELD_OUT_MODULES
from refine_nsp.tiny.families import FAMILIES
from refine_nsp.tiny.measures import HELD_OUT
from refine_nsp.tiny.pretrain_settings import FACTS, PretrainConfig

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


def model_card(model: FastWeightForCausalLM, config: PretrainConfig, records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown with the hub's header. records: of `metrics.jsonl`; the last one with probes is what is said of the model."""
    measured = [r for r in records if "probes" in r][-1]
    done = max(r["step"] for r in records)
    name, millions = NAMES[config.model_type], model.num_parameters() / 1e6
    shared = [family for family in config.families if family in FAMILIES]
    lines = [
        "---\nlicense: apache-2.0\nlibrary_name: transformers\npipeline_tag: text-generation",
        f"tags: [{config.model_type}, fast-weights, long-context, recall]\n---",
        f"# {name}, {millions:.1f} M parameters\n",
        f"{config.num_hidden_layers} layers of width {config.hidden_size}, {config.num_heads} heads, tied embeddings, byte-level BPE of "
        f"{config.vocab_size:,} pieces with single digits. Small enough to ship and to mid-train in minutes on a laptop: a base for "
        "experiments with recall, not a language model for use.\n",
        f"**Made by** `refine-nsp pretrain`, {going_on(config)}seed {config.seed}: {done:,} of {config.total_steps:,} steps of "
        f"{config.tokens_per_step:,} tokens ({done * config.tokens_per_step / 1e6:.1f} M tokens), AdamW, learning rate "
        f"{config.learning_rate:g} with warm-up and linear decay, {'bfloat16 products, ' if config.bf16 else ''}weights stored as "
        f"{config.store_dtype}. Everything that decides it is in `pretrain_config.json`; the same settings, seed and Python give the same "
        "model up to rounding.\n",
        phases_table(config).markdown(),
        "**Data.** The source of the Python standard library as installed (licence: PSF-2.0), read from disk, without the modules "
        f"{', '.join(HELD_OUT_MODULES)}; and generated documents:\n",
        *(f"- {family}: {SAYS[family]}" for family in config.families),
        "",
        f"**So that recall appears in few steps**: what is recalled is dense and short range first; answers weigh more early; "
        f"{START[config.model_type]}.\n",
    ]
    if shared:
        lines.append(
            f"**Overlap with RULER.** Half the wordings of {', '.join(shared)} are trained on, the others only measured with. Among the "
            "trained ones are RULER's own sentences and questions for its needle tasks and for variable tracking, and its haystack of "
            "noise; not its essays, none of its keys (drawn from other words) and none of its values (drawn at random). So RULER's needles "
            "measure how far and how well a known format is recalled.\n"
        )
    lines += [
        f"**Measured** on held-out modules: cross-entropy {measured['eval_loss']:.2f} nats per token. Share of answers right, greedy, by "
        "length of the prompt in tokens (share of their tokens right):\n",
        probes_table(measured["probes"]).markdown(),
        f"**Limits.** It was trained on rows of up to {max(p.length for p in config.phases):,} tokens, text of one kind and generated "
        "documents. Nothing shown with it says how methods compare at full scale.",
    ]
    return "\n".join(lines) + "\n"


def going_on(config: PretrainConfig) -> str:
    return f"going on from `{config.start_from}` with new optimizer moments, " if config.start_from is not None else ""


def phases_table(config: PretrainConfig) -> Table:
    rows: list[list[Cell]] = [
        [f"{p.steps:,}", f"{p.length:,}", p.answer_weight, *(f"{100 * p.shares.get(f, 0.0):.0f}" for f in config.families)]
        for p in config.phases
    ]
    return Table("Phases", ["steps", "row", "answers weigh", *(f"% {family}" for family in config.families)], rows)


def probes_table(probes: Mapping[str, Mapping[str, float]]) -> Table:
    """A row for each family and wording, a column for each length."""
    lengths = sorted({int(name.rpartition("_")[2]) for name in probes})
    rows: list[list[Cell]] = []
    for kind in dict.fromkeys(name.rpartition("_")[0] for name in probes):
        found = [probes[f"{kind}_{length}"] for length in lengths]
        title = kind.removesuffix(HELD_OUT) + (", held-out wordings" if kind.endswith(HELD_OUT) else "")
        rows.append([title, *(f"{100 * p['greedy']:.0f} ({100 * p['tokens']:.0f})" for p in found)])
    return Table("Recall, %", ["", *(f"{length:,}" for length in lengths)], rows)
