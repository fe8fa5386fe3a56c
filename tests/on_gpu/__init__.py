"""Ten minutes on a GPU: what `.ci/gpu` runs there, stage by stage. See .ci/README.md.

`__main__` is the only process that writes files. It starts the stages' programs, the other modules of this package,
and reads what they print: `say` and `emit` are how they tell it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REHEARSAL = os.environ.get("SELFREG_REHEARSAL") == "1"  # there is no GPU: pretend.py


def say(text: str) -> None:
    """A line for the report."""
    _print(f"# {text}")


def emit(kind: str, **record: Any) -> None:
    """A record for a file: of a "check" for checks.json, a row of "bench" or "counter" for their CSV, a "test".

    It is printed at once, so that nothing is lost when the process is killed; on a line of its own, whatever pytest has
    begun to print.
    """
    _print(f"@{kind} {json.dumps(record)}")


def _print(line: str) -> None:
    """In one piece: others print to the same pipe."""
    sys.stdout.write(f"\n{line}\n")
    sys.stdout.flush()


def counted(
    case: str, dtype: str, backend: str, kernel: str, source: str, metric: str, unit: str, value: float | str
) -> None:
    """A row of counters.csv, with the kernel's name alone."""
    name = re.search(r"\w+_kernel", kernel)
    row = {"case": case, "dtype": dtype, "backend": backend, "kernel": name[0] if name else kernel, "source": source}
    emit("counter", **row, metric=metric, unit=unit, value=value)
