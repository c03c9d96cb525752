"""Train with a reward of your own: a rollout is rewarded for the words of the true continuation, wherever in it they come.

    python examples/own_reward.py

A reward is called with the arguments that it names: token ids of rollouts and truths [R, K], hidden states, prefixes, dataset columns.
"""

import argparse

from datasets import Dataset

import refine_nsp
from refine_nsp import NSPConfig, ReFINEConfig, ReFINETrainer
from refine_nsp.tiny.corpus import standard_library

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output_dir", default="runs/own_reward")
options = parser.parse_args()


def right_tokens_anywhere(*, completion_ids, truth_ids, **_):
    """Return 1 for each token of the rollout that occurs anywhere in the truth, [R, K]; the library averages over K."""
    return (completion_ids[:, :, None] == truth_ids[:, None, :]).any(-1).float()


def is_code(*, completion_ids, language, **_):
    """Reward rollouts by a column of the dataset, which has a value for each of them: here by what their document is, [R]."""
    return completion_ids.new_tensor([1.0 if name == "python" else 0.0 for name in language], dtype=float)


nsp = NSPConfig.preset(
    "context",
    reward_funcs=[right_tokens_anywhere, "exact_match", is_code],  # callables and names, together
    reward_weights=[1.0, 0.5, 0.1],
)
model, tokenizer = refine_nsp.load("refine-nsp/tiny-gated-deltanet")
texts = standard_library(held_out=True)
rows = [ids[:512] for ids in tokenizer(texts)["input_ids"] if len(ids) >= 512]
data = Dataset.from_dict({"input_ids": rows, "language": ["python"] * len(rows)})
args = ReFINEConfig(
    output_dir=options.output_dir,
    nsp=nsp,
    max_steps=options.steps,
    per_device_train_batch_size=2,
    learning_rate=1e-4,
    logging_steps=5,
    report_to="none",
    save_strategy="no",
)
trainer = ReFINETrainer(model, args, train_dataset=data, processing_class=tokenizer)
trainer.train()

rewards = sorted({key for entry in trainer.state.log_history for key in entry if key.startswith("reward")})
for entry in trainer.state.log_history[:-1]:
    print(f"step {entry['step']:3}", *(f"{key} {entry[key]:.3f}" for key in rewards))
