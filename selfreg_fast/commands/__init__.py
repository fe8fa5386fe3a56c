"""The commands of `python -m selfreg_fast`, one module each, with `add_arguments(parser)` and `run(args)`."""
