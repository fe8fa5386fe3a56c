"""What a process finds around it: environment variables, and memory that there is not."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def run(program: str, **environment: str) -> str:
    """What a program of its own prints; in tests/, for sys.path begins with the working directory."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ISA = """
import selfreg_fast, torch
print(torch.ops.selfreg_fast.isa())
"""


def test_an_empty_isa_is_none() -> None:
    """As after `SELFREG_FAST_ISA= python ...`: one of the machine's, as where it is unset."""
    assert run(ISA, SELFREG_FAST_ISA="") in ("baseline", "avx2", "avx512")


# 200,000 channels: 0.8 MB an exit, and two tiles of at least 64 pixels in scratch, 51 MB each.
NO_MEMORY = """
import resource, torch, selfreg_fast
torch.set_num_threads(1)
exits, labels = [torch.zeros(1, 200_000, 1, 1)], torch.zeros(1, 1, 1, dtype=torch.int64)
selfreg_fast.mea_loss([torch.zeros(1, 2, 1, 1)], labels, backend="cpu")
with open("/proc/self/statm") as pages:
    used = int(pages.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), resource.RLIM_INFINITY))
try:
    selfreg_fast.mea_loss(exits, labels, backend="cpu")
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(selfreg_fast.mea_loss(exits, labels, backend="cpu").item())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_no_memory_for_scratch() -> None:
    """An error that says how much it would have been, not the end of the process; with more of it, all is well."""
    said, loss = run(NO_MEMORY).rsplit("\n", 1)
    found = re.search(r"out of memory: a thread could not have (\d+) bytes of scratch", said)
    assert found and int(found[1]) > 100_000_000, said
    assert abs(float(loss) - math.log(200_000)) < 1e-4
