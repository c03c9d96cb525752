"""The commands of `refine-nsp`, one module each: `add_arguments(parser)` or `options_of()`, and `run(...)`."""

COMMANDS = {
    "quickstart": "mid-train the shipped base with and without ReFINE, compare, and write a report (minutes, offline)",
    "pretrain": "make a tiny base model from the text on this machine",
    "midtrain": "train a pretrained model on long text with ReFINE (or --objective ntp)",
    "posttrain": "train to answer prompts: SFT, or nested with an update on each batch's prompts first",
    "ttt": "adapt to one prompt, answer it, restore the weights",
    "evaluate": "RULER, LongBench, documents, short contexts, lm-eval's tasks",
    "compare": "two evaluations, example by example, with significance",
    "generate": "continue a prompt, streaming",
    "inspect": "what a model is, and a text as a picture: entropy, chunks, positions, rollouts, rewards",
    "env": "what is installed, which devices there are, what computes each operation and why",
    "estimate": "memory and time of a training step on a device, before anything is loaded",
    "completion": "a script for bash, zsh or fish that completes commands, flags and choices",
    "export": "a plain model folder from a checkpoint in shards",
    "report": "one HTML page comparing runs",
}
FROM_DATACLASSES = (
    "midtrain",
    "posttrain",
    "ttt",
    "evaluate",
    "inspect",
    "estimate",
)  # flags and YAML; the others have a few flags of their own
