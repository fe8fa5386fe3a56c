"""README.md beside the tests names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_the_tests_named_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (HERE / "README.md").read_text()))
    defined = set(re.findall(r"^def (test_\w+)\(", "".join(p.read_text() for p in HERE.glob("test_*.py")), re.M))
    assert named and not named - defined
