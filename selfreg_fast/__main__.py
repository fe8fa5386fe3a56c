"""`python -m selfreg_fast COMMAND`, also installed as `selfreg-fast COMMAND`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from . import __version__

# A command's module is imported only when it is called for: `info` must work with torch alone.
COMMANDS = {
    "info": "show versions, devices, and each backend or why it is off",
    "demo": "train a small multi-exit segmentation network with the fused loss, and draw its predictions",
    "gradcheck": "check the gradients of every loss numerically, in float64, on every available backend",
    "bench": "compare the fused losses with eager and compiled PyTorch on this machine: time and peak memory",
}
EXTRAS = {"matplotlib", "numpy", "PIL", "rich", "tqdm"}  # what the `demo` extra installs


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after the program's name; default `sys.argv[1:]`.

    Returns:
        The exit status: 0 done, 1 a check failed, 2 it cannot be run like this, 130 interrupted, 141 nobody reads what
        it prints any more.

    Raises:
        SystemExit: after --help, --version (0), or arguments that make no sense (2).
    """
    return guarded("selfreg-fast", lambda: _main(sys.argv[1:] if argv is None else argv))


def guarded(program: str, run: Callable[[], int]) -> int:
    """`run()`; without a traceback the status of a program that is interrupted, or whose reader (`| head`) has gone.

    A KeyboardInterrupt with a text is told with it.
    """
    try:
        try:
            return run()
        except KeyboardInterrupt as stop:
            print(f"\n{program}: " + ": ".join(["interrupted", *stop.args]), file=sys.stderr)
            return 130
        finally:
            print(end="", flush=True)  # now, as nobody could catch what this raises at the interpreter's exit
    except (BrokenPipeError, SystemExit) as error:
        # rich turns the one into SystemExit(1), which would be a failed check.
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BrokenPipeError:  # what it still holds, the interpreter's exit would complain about
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 141  # as a shell has it of what SIGPIPE ends; not Python's 1, a failed check


def _main(argv: Sequence[str]) -> int:
    try:
        return _run(argv)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        remedy = "pip install matplotlib numpy pillow rich tqdm"  # by name: no registry has this package's extra
        print(f"selfreg-fast: this command needs {missing}: {remedy}", file=sys.stderr)
        return 2


def _run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="selfreg-fast",
        description="Fused losses of Self-Regulation (Zhang et al., ICCV 2021) for PyTorch.",
        epilog="Exit status: 0 done, 1 a check failed, 2 it cannot be run like this, 130 interrupted, "
        "141 its output is not read to the end. See `selfreg-fast COMMAND --help` for a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"selfreg-fast {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    called = next((word for word in argv if word in COMMANDS), None)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == called:
            command = import_module(f".commands.{name}", __package__)
            command.add_arguments(subparser)
    args = parser.parse_args(argv)
    if args.command is None:  # no mistake, but a question: as pip and docker have it
        parser.print_help()
        return 0
    return int(command.run(args))


if __name__ == "__main__":
    sys.exit(main())
