"""How long accesses keep the shared memory of a multiprocessor busy: in wavefronts, one a clock."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import lru_cache
from typing import NamedTuple

LANES, BANKS, WORD = 32, 32, 4  # of a warp; of shared memory, in turn for words of so many bytes
ROW = BANKS * WORD


class Access(NamedTuple):
    instruction: int  # where it is in the code
    size: int  # bytes of a lane
    is_load: bool


@lru_cache(maxsize=1 << 16)
def wavefronts(addresses: tuple[int | None, ...], size: int, is_load: bool = True) -> int:
    """Of one access of a warp, whose lanes have these byte addresses, or take no part (None), and `size` bytes each.

    Of up to 4 bytes, all lanes go together; of 8, a half warp does; of 16, a quarter (the phases of NVIDIA's talk S9593
    on cuTENSOR, GTC 2019). Those that go together take as many wavefronts as there are different words in the bank that
    has the most: equal words are read once (CUDA C++ programming guide, shared memory of compute capability 5.x).

    A wavefront returns 128 bytes, a register of each lane. Loads of 8 and 16 bytes return twice as much where all lanes
    n and n ^ 1, or all n and n ^ 2, have equal addresses: then twice as many lanes go together (an answer about 7.x in
    NVIDIA's forum, forums.developer.nvidia.com/t/77228, taken to hold for 9.0). So 16 bytes that are the same for all
    lanes take 2 wavefronts. Other equal addresses gain nothing here, nor do stores: nothing is known of them.
    """
    together = LANES if size <= WORD else LANES * WORD // size
    if is_load and size > WORD and any(_is_paired(addresses, other) for other in (1, 2)):
        together *= 2
    return sum(_most_in_a_bank(addresses[n : n + together], size) for n in range(0, len(addresses), together))


def _is_paired(addresses: tuple[int | None, ...], other: int) -> bool:
    return all(at is None or addresses[lane ^ other] in (None, at) for lane, at in enumerate(addresses))


def _most_in_a_bank(addresses: tuple[int | None, ...], size: int) -> int:
    words = {(at + byte) // WORD for at in addresses if at is not None for byte in range(0, size, WORD)}
    return max(Counter(word % BANKS for word in words).values(), default=0)


class Accesses:
    """Those of a warp's lanes that go through a straight piece of code one after the other, and their wavefronts."""

    def __init__(self) -> None:
        self.wavefronts = 0.0
        self._addresses: defaultdict[Access, list[int | None]] = defaultdict(lambda: [None] * LANES)

    def add(self, access: Access, lane: int, address: int) -> None:
        self._addresses[access][lane] = address

    def meet(self) -> None:
        """The lanes have all come to the piece's end: what each instruction has accessed is known."""
        for access, lanes in self._addresses.items():
            # Patterns repeat, but for the row that they begin in: so few have to be computed.
            row = min(at for at in lanes if at is not None) // ROW * ROW
            pattern = tuple(None if at is None else at - row for at in lanes)
            self.wavefronts += wavefronts(pattern, access.size, access.is_load)
        self._addresses.clear()
