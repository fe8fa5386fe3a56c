"""`python -m selfreg_fast COMMAND`, also installed as `selfreg-fast COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
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
        The exit status: 0 done, 1 a check failed, 2 it cannot be run like this, 130 interrupted.

    Raises:
        SystemExit: after --help, --version (0), or arguments that make no sense (2).
    """
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("\nselfreg-fast: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        print(f'selfreg-fast: this command needs {missing}: pip install "selfreg-fast[demo]"', file=sys.stderr)
        return 2


def _run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="selfreg-fast",
        description="Fused losses of Self-Regulation (Zhang et al., ICCV 2021) for PyTorch.",
        epilog="Exit status: 0 done, 1 a check failed, 2 it cannot be run like this, 130 interrupted. "
        "See `selfreg-fast COMMAND --help` for a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"selfreg-fast {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    called = next((word for word in argv if word in COMMANDS), None)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == called:
            command = import_module(f".commands.{name}", __package__)
            command.add_arguments(subparser)
    args = parser.parse_args(argv)
    return int(command.run(args))


if __name__ == "__main__":
    sys.exit(main())
