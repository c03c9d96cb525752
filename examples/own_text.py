"""Mid-train the shipped DeltaNet on a text file of yours, and see what it did to the end of the file, which it does not train on.

    python examples/own_text.py my_text.txt

Without a file it takes the reference documentation that comes with Python. It takes about a minute on a laptop.
"""

import argparse
import sysconfig
from pathlib import Path

import torch

import refine_nsp
from refine_nsp import ReFINEConfig, ReFINETrainer
from refine_nsp.training import DataArguments, prepare_data

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("file", nargs="?", default=str(Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"))
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--max_length", type=int, default=512)
parser.add_argument("--output_dir", default="runs/own_text")
options = parser.parse_args()

model, tokenizer = refine_nsp.load("refine-nsp/tiny-delta-net")
args = ReFINEConfig(
    output_dir=options.output_dir,
    preset="likelihood",  # far context weighs more; "expected": the policy gradient in closed form, "context": by rollouts
    max_length=options.max_length,
    max_steps=options.steps,
    per_device_train_batch_size=4,
    learning_rate=3e-4,
    logging_steps=10,
    report_to="none",
)
# The file is cut into windows; the last tenth of them is kept for validation.
data = DataArguments(dataset_name=options.file, validation_fraction=0.1, validation_windows=16)
train, validation = prepare_data(data, tokenizer, args.max_length, args.nsp.shortest)
trainer = ReFINETrainer(model, args, train_dataset=train, eval_dataset=validation, processing_class=tokenizer)

before = trainer.evaluate()
trainer.train()
after = trainer.evaluate()
trainer.save_model()  # a plain folder: refine_nsp.load and from_pretrained read it
tokenizer.save_pretrained(args.output_dir)

print(f"{len(train)} windows to train on, {len(validation)} held back")
for name in ("eval_loss", "eval_accuracy", "eval_entropy"):
    print(f"{name:16}{before[name]:8.3f} -> {after[name]:.3f}")
start = torch.tensor([validation[0]["input_ids"][:64]])
print(tokenizer.decode(start[0, -32:]), "...")
print(tokenizer.decode(trainer.model.generate(start, max_new_tokens=48, do_sample=False)[0, 64:]))
