"""The commands of `refine-nsp`, one module each: `add_arguments(parser)` or `parse(argv)`, and `run(...)`."""
