"""Commands other than the stages: one module each, with `add_arguments(parser)` and `run(args)`."""
