"""README.md beside the tests says what they test, and the docstrings what README.md says."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from support import ERRORS

import selfreg_fast as srf

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()


def test_the_tests_named_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", README))
    defined = set(re.findall(r"^def (test_\w+)\(", "".join(p.read_text() for p in HERE.glob("test_*.py")), re.M))
    assert named and not named - defined


def test_the_error_bounds_are_those_that_tests_use() -> None:
    """Of the table, and of the docstring."""
    rows = re.findall(r"^\| (float\d+|bfloat16) \| ([\d.e-]+) \| (0|2\^-\d+) \|", README, re.M)
    stated = {getattr(torch, dtype): {"sum": float(u), "result": _power(r)} for dtype, u, r in rows}
    assert stated == ERRORS
    said = re.search(
        r"u = (\S+) \((\S+) for float64 exits\).* float16\s+exits add (\S+) and bfloat16 exits (\S+) of the element",
        srf.exit_loss_matrix.__doc__ or "",
        re.S,
    )
    assert said
    assert [float(u) for u in said.groups()[:2]] == [ERRORS[d]["sum"] for d in (torch.float32, torch.float64)]
    assert [_power(r) for r in said.groups()[2:]] == [ERRORS[d]["result"] for d in (torch.float16, torch.bfloat16)]


def _power(text: str) -> float:
    return 2.0 ** float(text.removeprefix("2^")) if "^" in text else float(text)
