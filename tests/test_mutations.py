"""The fault drill (mutations.py) cannot rot: every mutation still applies. Itself it takes too long to be a test."""

from __future__ import annotations

import mutations
import pytest


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda m: m.name)
def test_it_applies_once(mutation: mutations.Mutation) -> None:
    assert mutations.occurrences(mutation) == 1
    assert mutation.old != mutation.new


def test_there_are_enough() -> None:
    names = {m.name for m in mutations.MUTATIONS}
    assert len(names) == len(mutations.MUTATIONS) >= 25
