"""What benchmarks/counted counts besides instructions: wavefronts of shared memory, rounds of blocks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # last: selfreg_fast is the installed one

from benchmarks.counted import __main__ as counted
from benchmarks.counted import sass
from benchmarks.counted.shared_memory import wavefronts

LANES = range(32)


@pytest.mark.parametrize(
    ("addresses", "size", "expected"),
    [
        ([4 * n for n in LANES], 4, 1),
        ([4 * n + 20 for n in LANES], 4, 1),  # over two rows of the banks
        ([4 * (31 - n) for n in LANES], 4, 1),
        ([64] * 32, 4, 1),
        ([4 * (n % 2) for n in LANES], 4, 1),
        ([8 * n for n in LANES], 4, 2),
        ([12 * n for n in LANES], 4, 1),  # odd strides meet in no bank
        ([88 * n for n in LANES], 4, 2),
        ([128 * n for n in LANES], 4, 32),
        ([128 * (n % 5) for n in LANES], 4, 5),  # equal words count once
        ([128 * n if n < 3 else 4 * n for n in LANES], 4, 3),  # the worst bank's
        ([128 * n if n % 8 == 0 else None for n in LANES], 4, 4),
        ([None] * 32, 4, 0),
        ([2 * n for n in LANES], 2, 1),
        (list(LANES), 1, 1),
        ([64 * n for n in LANES], 2, 16),
        ([8 * n for n in LANES], 8, 2),
        ([16 * n for n in LANES], 8, 4),
        ([24 * n for n in LANES], 8, 2),
        ([8 * n if n < 16 else None for n in LANES], 8, 1),
        ([16 * n for n in LANES], 16, 4),
        ([32 * n for n in LANES], 16, 8),
        ([80 * n for n in LANES], 16, 4),  # an odd number of fours from lane to lane
        ([512 * n for n in LANES], 16, 32),
        ([16 * n if n in (0, 7, 8) else None for n in LANES], 16, 2),
    ],
)
@pytest.mark.parametrize("is_load", [True, False])
def test_wavefronts(addresses: list[int | None], size: int, expected: int, is_load: bool) -> None:
    """Where no pairs of lanes are alike, loads and stores take the same."""
    assert wavefronts(tuple(addresses), size, is_load) == expected


@pytest.mark.parametrize(
    ("addresses", "size", "load", "store"),
    [
        ([256] * 32, 8, 1, 2),
        ([256] * 32, 16, 2, 4),
        ([16 * (n // 2) for n in LANES], 16, 2, 4),  # n and n ^ 1
        ([16 * (n // 4 * 2 + n % 2) for n in LANES], 16, 2, 4),  # n and n ^ 2
        ([8 * (n // 2) for n in LANES], 8, 1, 2),
        ([128 * (n // 2) for n in LANES], 16, 16, 16),  # conflicts stay
        ([16 * (n // 4) if n % 4 < 2 else None for n in LANES], 16, 2, 4),
        ([16 * (n // 2) if n % 2 == 0 else None for n in LANES], 16, 2, 4),  # the others of the pairs take no part
        ([16 * (n // 2) if n != 5 else 512 for n in LANES], 16, 5, 5),  # but for one
        ([8 * (n % 16) for n in LANES], 8, 2, 2),  # alike in both halves: not known to gain
        ([16 * (n % 8) for n in LANES], 16, 4, 4),
    ],
)
def test_loads_of_equal_addresses(addresses: list[int | None], size: int, load: int, store: int) -> None:
    assert (wavefronts(tuple(addresses), size), wavefronts(tuple(addresses), size, False)) == (load, store)


CODE = """
/*0000*/ S2R R0, SR_TID.X ;
/*0010*/ SHF.L.U32 R1, R0, 0x2, RZ ;
/*0020*/ SHF.L.U32 R2, R0, 0x5, RZ ;
/*0030*/ ISETP.LT.AND P0, PT, R0, 0x4, PT ;
/*0040*/ MOV R3, 0x1000000 ;
/*0050*/ MOV R8, R1 ;
/*0060*/ MOV R9, R3 ;
/*0070*/ STS.128 [R2], R4 ;
/*0080*/ BAR.SYNC.DEFER_BLOCKING 0x0 ;
/*0090*/ LDS R4, [R1+0x40] ;
/*00a0*/ @P0 LDS R5, [R2] ;
/*00b0*/ @P1 LDS R5, [R2] ;
/*00c0*/ LD.E R6, [R8.64] ;
/*00d0*/ LD.E R6, [R12.64] ;
/*00e0*/ SHFL.BFLY PT, R7, R4, 0x1, 0x1f ;
/*00f0*/ BAR.SYNC.DEFER_BLOCKING 0x0 ;
/*0100*/ @!P0 BRA 0x120 ;
/*0110*/ LDS.64 R10, [R2] ;
/*0120*/ STS [R2], R4 ;
/*0130*/ EXIT ;
"""


def test_what_a_warp_does_to_shared_memory() -> None:
    """Of two warps on average; lanes 0 to 3 of the first one alone pass P0, and none passes P1."""
    instructions = sass._instructions(CODE)
    assert len(instructions) == CODE.count(";")
    kernel = sass.Kernel("kernel", 16, instructions)
    program = sass.Program(kernel, b"", (1,), (64, 1), lambda at, size: 0, lambda at, size, value: None)
    for _ in range(2):  # a block is counted by itself
        executed = program.run((0,))
        assert executed.issued["BAR"] == 2
        # STS.128 in steps of 32 bytes; LDS; of the first warp, that of 4 lanes; LD, where it is of shared memory; SHFL.
        always = 8 + 1 + 1 / 2 + 1 + 1
        parted = 1 / 2  # 4 lanes' LDS.64
        assert executed.wavefronts == always + parted + 8  # all lanes' STS, in steps of 32 bytes again


@pytest.mark.parametrize(
    ("blocks", "resident", "rounds", "tail"),
    [
        (396, 3, 1, 1),  # as many as there is room for
        (384, 3, 384 / 396, 396 / 384),
        (1320, 4, 2.5, 1.2),
        (106, 4, 106 / 132, 132 / 106),  # one a multiprocessor
        (411, 4, 411 / 528, 528 / 411),
        (133, 4, 133 / 264, 264 / 133),
    ],
)
def test_rounds(blocks: int, resident: int, rounds: float, tail: float) -> None:
    assert counted.rounds_of(blocks, resident) == pytest.approx((rounds, tail))
