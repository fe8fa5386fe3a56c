"""The numbers that 32-bit registers hold, and what instructions make of them."""

from __future__ import annotations

import math
import struct

MASK = 0xFFFFFFFF
WORD, SINGLE = struct.Struct("<I"), struct.Struct("<f")


def f32(bits: int) -> float:
    (x,) = SINGLE.unpack(WORD.pack(bits & MASK))
    return x  # type: ignore[no-any-return]


def u32(x: float) -> int:
    try:
        (bits,) = WORD.unpack(SINGLE.pack(x))
        return bits  # type: ignore[no-any-return]
    except OverflowError:
        return 0x7F800000 if x > 0 else 0xFF800000


def f64(low: int, high: int) -> float:
    return float(struct.unpack("<d", struct.pack("<II", low, high))[0])


def u64(x: float) -> tuple[int, int]:
    low, high = struct.unpack("<II", struct.pack("<d", x))
    return low, high


def s32(x: int) -> int:
    return x - (1 << 32) if x & 0x80000000 else x


def bf16(x: int) -> float:
    return f32((x & 0xFFFF) << 16)


def to_bf16(x: float) -> int:
    bits = u32(x)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) & 0xFFFF


def to_f16(x: float) -> int:
    return int(struct.unpack("<H", struct.pack("<e", x))[0])


def f16(x: int) -> float:
    return float(struct.unpack("<e", struct.pack("<H", x & 0xFFFF))[0])


def rounded_up(x: float) -> float:
    bits = u32(x)
    return f32(bits) if f32(bits) >= x else f32(bits + 1)


def smaller(a: float, b: float) -> float:
    return b if a != a else a if b != b else min(a, b)


def larger(a: float, b: float) -> float:
    return b if a != a else a if b != b else max(a, b)


def mufu(function: str, x: float) -> float:
    if x != x:
        return x
    if function == "EX2":
        return math.inf if x >= 1024 else 2.0**x
    if function == "LG2":
        return math.log2(x) if x > 0 else -math.inf if x == 0 else math.nan
    if function == "RCP":
        return 1 / x if x else math.copysign(math.inf, x)
    if function == "RSQ":
        return 1 / math.sqrt(x) if x > 0 else math.inf if x == 0 else math.nan
    raise NotImplementedError(f"MUFU.{function}")


def lop3(a: int, b: int, c: int, table: int) -> int:
    result = 0
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result & MASK


def prmt(a: int, selector: int, b: int) -> int:
    source = (a | b << 32).to_bytes(8, "little")
    result = 0
    for k in range(4):
        choice = selector >> 4 * k & 15
        byte = source[choice & 7]
        result |= (byte if choice < 8 else 255 if byte & 128 else 0) << 8 * k
    return result
