"""The commands of `refine-nsp`, a module each: `COMMAND` declares what can be given (`grammar.Command`), and `run` does the work."""

NAMES = (
    "quickstart", "pretrain", "midtrain", "posttrain", "ttt", "evaluate", "compare", "generate", "inspect", "check", "env", "estimate",
    "completion", "convert", "export", "report",
)  # fmt: skip
