"""The commands of `refine-nsp`, a module each: `COMMAND` declares what can be given (`grammar.Command`), and `run` does the work."""

NAMES = (
    "quickstart", "pretrain", "convert", "midtrain", "posttrain", "ttt", "evaluate", "compare", "generate", "inspect", "check", "score",
    "env", "estimate", "completion", "export", "report",
)  # fmt: skip
