"""How many times less, in words; for the sentences with which the commands end."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def compared(multiples: Sequence[float], less: str, more: str) -> str:
    """How something compares with what costs so many times as much.

    Args:
        multiples: one or several, all positive: another's cost, divided by that of what is spoken of.
        less: what is said where the other's is larger: "less time", or "faster".
        more: what is said where it is smaller.

    Returns:
        "3.1 times faster", "no faster" (to one decimal), "1.4 times slower"; of several, "between 3.1 and 11.2 times
        faster (median 5.0)" or "between 1.4 times slower and 3.1 times faster (median: 2.0 times faster)".
    """
    (low, low_word), (middle, middle_word), (high, high_word) = (
        _one(of(multiples), less, more) for of in (min, statistics.median, max)
    )
    if (low, low_word) == (high, high_word):
        return f"{low} {low_word}"
    if low_word != high_word or low == "no":
        return f"between {low} {low_word} and {high} {high_word} (median: {middle} {middle_word})"
    if low_word == more:  # the least multiple is the most times slower
        low, high = high, low
    return f"between {low.removesuffix(' times')} and {high} {low_word} (median {middle.removesuffix(' times')})"


def _one(multiple: float, less: str, more: str) -> tuple[str, str]:
    larger = max(multiple, 1 / multiple)
    number = f"{larger:.{1 if larger < 99.95 else 0}f}"
    if number == "1.0":
        return "no", less
    return f"{number} times", less if multiple > 1 else more
