"""Draw the pictures of the pages that no run writes. Run `python docs/site/pictures.py` from the root of the repository.

`idea.svg` shows the method on one sentence, `pull.svg` is computed from the formulas, and `weights.svg` from the shipped DeltaNet on a text
that it has not seen.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

import refine_nsp
from refine_nsp import NSPConfig, ReFINEStep
from refine_nsp.tiny.quickstart import Settings, prepare

PICTURES = Path(__file__).resolve().parents[1] / "pictures"
NAMED = 6  # so many tokens are written next to their weight
FAR, NEAR, MUTED = "#1f77b4", "#dddddd", "#666666"  # a token that needs far context, one that does not, notes


def idea() -> Figure:
    """Show both estimators on one sentence: rollouts from a handed-over state, and a weight for every token."""
    words = ["The", "bridge", "dates", "from", "1832", "…", "It", "has", "stood", "since", "1832", "."]
    position, rollouts = 9, [("1832", ".", "1"), ("then", "we", "0"), ("1950", ",", "0")]
    heights = [
        0.05,
        0.05,
        0.05,
        0.05,
        0.05,
        0.05,
        0.15,
        0.1,
        0.2,
        0.1,
        1.0,
        0.1,
    ]  # drawn by hand: a picture of the idea, no measurement
    fig, (top, low) = plt.subplots(2, 1, figsize=(8.4, 4.3), height_ratios=(1.45, 1), constrained_layout=True)
    for axis in (top, low):
        axis.set_xlim(-0.6, len(words) + 1.6)
        axis.axis("off")
        for i, word in enumerate(words):
            shade = "#dbe9f6" if axis is top and i <= position else "white"
            axis.text(i, 0, word, ha="center", va="center", fontsize=10, bbox={"boxstyle": "round", "fc": shade, "ec": "#999999"})
    top.set_ylim(-2.7, 0.6)
    top.set_title("By rollouts (the paper): continue from a position, reward what agrees with the text", fontsize=10, loc="left")
    top.text(4.5, -0.75, "prefix, run once; its state is handed to every rollout", ha="center", fontsize=9, color=MUTED)
    top.text(len(words) + 0.4, 0, "the text", ha="center", va="center", fontsize=9, color=MUTED)
    for n, (*sampled, reward) in enumerate(rollouts):
        y = -1.15 - 0.62 * n
        top.annotate(
            "", (position + 0.55, y), (position, -0.35), arrowprops={"arrowstyle": "->", "color": MUTED, "linewidth": 0.8}
        )
        for j, word in enumerate(sampled):
            look = {"boxstyle": "round", "fc": "white", "ec": FAR if reward == "1" else "#999999"}
            top.text(position + 1 + j, y, word, ha="center", va="center", fontsize=10, bbox=look)
        top.text(len(words) + 0.4, y, f"reward {reward}", ha="center", va="center", fontsize=9, color=MUTED)
    low.set_ylim(-0.45, 2.1)
    title = "In closed form: no rollouts; a token counts by how much far context changes its prediction"
    low.set_title(title, fontsize=10, loc="left")
    low.bar(range(len(words)), [1.4 * h for h in heights], 0.45, bottom=0.4, color=[FAR if h == 1 else NEAR for h in heights])
    low.text(len(words) + 0.4, 0.7, "weight", ha="center", fontsize=9, color=MUTED)
    return fig


def pull() -> Figure:
    """The gradient on the logit of the true token, by its probability."""
    p = torch.linspace(0, 1, 101)
    fig, axis = plt.subplots(figsize=(5.2, 2.9), constrained_layout=True)
    axis.plot(p, p * (1 - p), label="order 1 (expected reward): p (1 - p)")
    for order, style in ((2, ":"), (4, "-.")):
        axis.plot(p, (1 - (1 - p) ** order) * (1 - p), style, label=f"order {order}")
    axis.plot(p, 1 - p, "--", label="order inf (likelihood): 1 - p")
    axis.set_title("pull on the logit of the true token, K = 1", fontsize=10, loc="left")
    axis.set_xlabel("its probability p", fontsize=8)
    axis.set_ylabel("per unit of weight", fontsize=8)
    axis.legend(frameon=False, fontsize=8)
    return fig


def weights() -> Figure:
    """w of every token of a prompt that states a fact at its start and asks for it at its end, the answer behind it."""
    model, tokenizer = refine_nsp.load("refine-nsp/tiny-delta-net")
    material = prepare(Settings(lengths=(512,), depths=(0.0,), prompts_per_cell=4), tokenizer, data=None, text_column="text")
    asked = material.needles[0][0]
    ids = torch.tensor([asked.prompts[2] + asked.answers[2]])
    w = ReFINEStep(model, NSPConfig.preset("expected", rollout_length=1))(ids).token_weights[0].detach()
    fig, axis = plt.subplots(figsize=(7.6, 3.0), constrained_layout=True)
    axis.vlines(range(len(w)), 0, w, linewidth=1.2)
    for rank, t in enumerate(w.topk(NAMED).indices.tolist()):
        said = f"{tokenizer.decode(ids[0, t - 3 : t + 1])!r} → {tokenizer.decode(ids[0, t + 1])!r}"
        axis.annotate(
            said, (t, float(w[t])), (0.25, 0.95 - 0.1 * rank), textcoords="axes fraction", fontsize=8, va="center",
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6},
        )  # fmt: skip
    axis.set_title("weight of a token's prediction, by context", fontsize=10, loc="left")
    axis.set_xlabel("token of the prompt; the fact stands at its start, the question and the answer at its end", fontsize=8)
    return fig


if __name__ == "__main__":
    for name, draw in {"idea": idea, "pull": pull, "weights": weights}.items():
        draw().savefig(PICTURES / f"{name}.svg", metadata={"Date": None})
