"""Adapt a model to the first part of a long document at test time, and see what that changes for the rest.

    python examples/long_document.py my_document.txt

It draws the loss of the rest, place by place, before and after (runs/long_document.svg). The weights are restored bit by bit.
"""

import argparse
import sysconfig
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import refine_nsp
from refine_nsp import NSPConfig, TestTimeConfig, TestTimeTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("file", nargs="?", default=str(Path(sysconfig.get_paths()["stdlib"]) / "argparse.py"))
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--tokens", type=int, default=8192, help="of the document; the first half is adapted to")
parser.add_argument("--output", default="runs/long_document.svg")
options = parser.parse_args()


@torch.no_grad()
def loss_by_token(model, ids, start):
    """Return the loss of each token of ids [1, T] from `start` on, in nats, given all tokens before it."""
    logits = model(ids, use_cache=False).logits[0, start - 1 : -1]
    return F.cross_entropy(logits.float(), ids[0, start:], reduction="none")


model, tokenizer = refine_nsp.load("refine-nsp/tiny-delta-net")
ids = tokenizer(Path(options.file).read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][:, : options.tokens]
half = ids.shape[1] // 2
ttt = TestTimeTrainer(model, TestTimeConfig(nsp=NSPConfig.preset("expected"), steps=options.steps, learning_rate=3e-4))

before = loss_by_token(model, ids, half)
with ttt.adapt(ids[0, :half]):
    after = loss_by_token(model, ids, half)
restored = torch.equal(before, loss_by_token(model, ids, half))

print(f"adapted to {half} tokens in {ttt.last.seconds:.1f} s, loss by step:", *(f"{x:.3f}" for x in ttt.last.losses))
print(f"the {len(before)} tokens after them: {before.mean():.3f} -> {after.mean():.3f} nats a token; restored: {restored}")
gain = before - after
for i in gain.topk(5).indices.tolist():
    said = tokenizer.decode(ids[0, half + i - 8 : half + i])
    print(f"  {gain[i]:+.2f} nats for {tokenizer.decode(ids[0, half + i])!r} after {said!r}")

smooth = max(8, len(before) // 20)
figure, axis = plt.subplots(figsize=(7, 3), constrained_layout=True)
for name, losses in {"as loaded": before, f"after {options.steps} steps on tokens 0 to {half}": after}.items():
    curve = F.avg_pool1d(losses[None], smooth, stride := smooth // 8)[0]
    axis.plot([half + smooth // 2 + i * stride for i in range(len(curve))], curve, label=name)
axis.set(xlabel="token of the document", ylabel=f"nats a token (mean of {smooth})", title=Path(options.file).name)
axis.legend(frameon=False)
Path(options.output).parent.mkdir(parents=True, exist_ok=True)
figure.savefig(options.output)
print(f"plot: {options.output}")
