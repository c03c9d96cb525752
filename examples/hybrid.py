"""Take a step of ReFINE on a hybrid of transformers, with gated delta-rule layers next to full attention, loaded from a folder.

    python examples/hybrid.py

The folder here holds a tiny Qwen3-Next of random weights, made first, so that nothing is downloaded; yours may be a checkpoint.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, Qwen3NextConfig

import refine_nsp
from refine_nsp import NSPConfig, ReFINEStep
from refine_nsp.tiny.corpus import standard_library

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--folder", default="runs/tiny-qwen3-next")
options = parser.parse_args()

tokenizer = refine_nsp.load("refine-nsp/tiny-delta-net")[1]
config = Qwen3NextConfig(
    vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
    linear_value_head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
)  # fmt: skip
torch.manual_seed(0)
AutoModelForCausalLM.from_config(config).save_pretrained(options.folder)
tokenizer.save_pretrained(options.folder)

model, tokenizer = refine_nsp.load(options.folder)  # checks that its states can be handed over
print(type(model).__name__, "with layers", ", ".join(model.config.layer_types))
text = tokenizer(standard_library(held_out=True)[0], return_tensors="pt")["input_ids"][0]
rows = text[: len(text) // 256 * 256].view(-1, 256)

# Positions by entropy: a model that knows nothing yet depends on no far context, which the preset weighs by.
step = ReFINEStep(model.train(), NSPConfig.preset("expected", token_weights="selected", rollout_length=1))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for i in range(options.steps):
    input_ids = rows[torch.randint(len(rows), (2,))]
    result = step(input_ids)
    result.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if i % 5 == 0 or i == options.steps - 1:
        print(f"step {i:3}  loss_ntp {result.loss_ntp.item():.3f}  expected reward {-result.loss_policy.item():.4f}")

# The same model samples rollouts too; their states come from the pass over the sequence.
rollouts = ReFINEStep(model, NSPConfig(positions_per_sequence=4, num_generations=2))(rows[:1])
for t, made in zip(rollouts.positions[0].tolist(), rollouts.rollouts[0], strict=True):
    truth = tokenizer.decode(rows[0, t + 1 : t + 1 + made.shape[-1]])
    print(f"position {t:3}  truth {truth!r}  rollouts {[tokenizer.decode(r) for r in made]}")
