"""Show a text as ReFINE sees it: entropy along it, chunks, chosen positions, rollouts next to the truth, and rewards."""

from __future__ import annotations

from html import escape

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refine_nsp.config import NSPConfig
from refine_nsp.nsp.records import Rollouts
from refine_nsp.nsp.selection import chunk_of_tokens
from refine_nsp.report import html
from refine_nsp.report.plots import COLOURS, INKS, Plot, figure, to_svg
from refine_nsp.report.tables import Cell, Table


def entropy_plot(record: Rollouts, length: int, config: NSPConfig) -> Plot:
    """Plot the entropy of the first sequence along its tokens, with chunk borders and chosen positions."""
    entropy = record.entropy[0, :length].tolist()
    chunk = chunk_of_tokens(torch.tensor([length]), length, config.positions_per_sequence)[0]
    borders = (chunk[1:] != chunk[:-1]).nonzero()[:, 0].tolist()
    fig, axis = figure(10, 2.8)
    axis.plot(range(length), entropy, color=COLOURS[0], linewidth=0.8)
    for border in borders:
        axis.axvline(border + 0.5, color=INKS["ink"][0], linewidth=0.7, linestyle=":")
    for t in (int(t) for t in record.positions[0] if t >= 0):
        axis.axvspan(t + 0.5, t + config.rollout_length + 0.5, color=COLOURS[1], alpha=0.2, linewidth=0)
        axis.plot([t], [entropy[t]], "v", color=COLOURS[1], markersize=6)
    axis.set_xlabel("token")
    axis.set_ylabel("nats")
    title = "Entropy of the next token. Dotted: chunks; triangles: chosen positions, shaded: the K tokens sampled there"
    return Plot(title, to_svg(fig))


def coloured_text(tokenizer: PreTrainedTokenizerBase, ids: Tensor, record: Rollouts) -> str:
    """Write the text with each token shaded by the entropy it was predicted with, and chosen positions marked."""
    entropy = record.entropy[0]
    top = float(entropy[: len(ids)].max().clamp(min=1e-6))
    chosen = {int(t) for t in record.positions[0] if t >= 0}
    parts = []
    for t, token in enumerate(ids.tolist()):
        share = float(entropy[t - 1]) / top if t else 0.0
        mark = "border-bottom:2px solid var(--line-1);" if t in chosen else ""
        title = f"token {t}" + (f", predicted with {float(entropy[t - 1]):.2f} nats" if t else "")
        style = f"background:rgba(0,114,178,{0.55 * share:.2f});{mark}"
        parts.append(f"<span style='{style}' title='{title}'>{escape(str(tokenizer.decode([token])))}</span>")
    return f"<div class='text'>{''.join(parts)}</div>"


def rollout_table(tokenizer: PreTrainedTokenizerBase, ids: Tensor, record: Rollouts) -> Table:
    """List the truth and the rollouts at each position, with reward and advantage."""
    rows: list[list[Cell]] = []
    N, K = record.tokens.shape[2:]
    for p, t in ((p, t) for p, t in enumerate(record.positions[0].tolist()) if t >= 0):
        truth = repr(tokenizer.decode(ids[t + 1 : t + 1 + K].tolist()))[1:-1]
        for n in range(N):
            rollout = repr(tokenizer.decode(record.tokens[0, p, n].tolist()))[1:-1]
            rows.append([t, truth, rollout, float(record.rewards[0, p, n]), float(record.advantages[0, p, n])])
    return Table("Rollouts against the truth", ["position", "truth", "rollout", "reward", "advantage"], rows)


def picture_page(
    title: str, facts: Table, tokenizer: PreTrainedTokenizerBase, ids: Tensor, record: Rollouts, config: NSPConfig
) -> str:
    """Write the whole page for the first sequence of `record`."""
    legend = "Shade: entropy with which the token was predicted. Underlined: a chosen position (the last token of a prefix)."
    sizes = f"P={config.positions_per_sequence}, K={config.rollout_length}, N={config.num_generations}"
    sections = [
        html.Section("Entropy and positions", html.plots(entropy_plot(record, len(ids), config))),
        html.Section("Rollouts", rollout_table(tokenizer, ids, record).html()),
        html.Section("Text", f"<p class='note'>{legend}</p>" + coloured_text(tokenizer, ids, record)),
        html.Section("Model", facts.html()),
    ]
    return html.page(title, f"{len(ids)} tokens, selection {config.selection}, {sizes}", sections)
