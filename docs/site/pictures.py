"""Draws docs/pictures/pull.svg (from the formulas) and docs/pictures/weights.svg (from the shipped DeltaNet, on a text it has not seen):

python docs/site/pictures.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

import refine_nsp
from refine_nsp import NSPConfig, ReFINEStep
from refine_nsp.tiny.quickstart import Settings, prepare

PICTURES = Path(__file__).resolve().parents[1] / "pictures"
NAMED = 6  # tokens that are written beside their weight


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
    material = prepare(Settings(lengths=(512,), depths=(0.0,)), tokenizer, data=None, text_column="text")
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
    for name, draw in {"pull": pull, "weights": weights}.items():
        draw().savefig(PICTURES / f"{name}.svg", metadata={"Date": None})
