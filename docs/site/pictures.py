"""Draws docs/pictures/pull.svg (from the formulas) and docs/pictures/weights.svg (from the shipped DeltaNet, on a text it has not seen):

python docs/site/pictures.py
"""

from pathlib import Path

import torch

import refine_nsp
from refine_nsp import NSPConfig, ReFINEStep
from refine_nsp.report.plots import COLOURS, figure, line_plot, to_svg
from refine_nsp.tiny.quickstart import Settings, prepare

PICTURES = Path(__file__).resolve().parents[1] / "pictures"
NAMED = 6  # tokens that are written beside their weight


def pull() -> str:
    """The gradient on the logit of the true token, by its probability."""
    p = torch.linspace(0, 1, 101)
    curves = {"exact: p (1 - p)": (p.tolist(), (p * (1 - p)).tolist()), "likelihood: 1 - p": (p.tolist(), (1 - p).tolist())}
    return line_plot(curves, "pull on the logit of the true token, K = 1", "its probability p", "per unit of weight")


def weights() -> str:
    """w of every token of a prompt that states a fact at its start and asks for it at its end, the answer behind it."""
    model, tokenizer = refine_nsp.load("refine-nsp/tiny-delta-net")
    material = prepare(Settings(lengths=(512,), depths=(0.0,)), tokenizer, data=None, text_column="text")
    asked = material.needles[0][0]
    ids = torch.tensor([asked.prompts[2] + asked.answers[2]])
    w = ReFINEStep(model, NSPConfig.preset("exact", rollout_length=1))(ids).weights[0].detach()
    fig, axis = figure(7.6, 3.0)
    axis.vlines(range(len(w)), 0, w, colors=COLOURS[0], linewidth=1.2)
    for rank, t in enumerate(w.topk(NAMED).indices.tolist()):
        said = f"{tokenizer.decode(ids[0, t - 3 : t + 1])!r} → {tokenizer.decode(ids[0, t + 1])!r}"
        axis.annotate(
            said, (t, float(w[t])), (0.25, 0.95 - 0.1 * rank), textcoords="axes fraction", fontsize=8, va="center",
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6},
        )  # fmt: skip
    axis.set_title("weight of a token's prediction, by context", fontsize=10, loc="left")
    axis.set_xlabel("token of the prompt; the fact stands at its start, the question and the answer at its end", fontsize=8)
    return to_svg(fig)


if __name__ == "__main__":
    for name, draw in {"pull": pull, "weights": weights}.items():
        (PICTURES / f"{name}.svg").write_text(draw() + "\n", encoding="utf-8")
