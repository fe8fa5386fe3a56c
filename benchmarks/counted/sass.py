"""Executes a kernel's machine code (SASS, sm_90), block by block, and counts what its warps issue and access.

What cuobjdump prints of a cubin is translated to Python, a straight piece of code at a time. Threads of a warp go
together as on a GPU: those furthest behind go first, and at a BSYNC they wait for those that were at its BSSY. float32
is computed in double and rounded after every instruction; approximate functions (MUFU) are exact. There is no local
memory, there are no atomics, and only those instructions that these kernels are made of; another one is an error.
"""

from __future__ import annotations

import collections
import math
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .shared_memory import ROW, Access, Accesses, wavefronts
from .values import (
    MASK,
    bf16,
    f16,
    f32,
    f64,
    larger,
    lop3,
    mufu,
    prmt,
    rounded_up,
    s32,
    smaller,
    to_bf16,
    to_f16,
    u32,
    u64,
)

PARAMETERS = 0x210  # where a kernel's parameters begin in constant memory
SHARED_WINDOW = 1 << 56  # generic addresses of shared memory begin here


class Instruction(NamedTuple):
    at: int
    guard: str  # "P0", "!P0", or ""
    name: str  # "IMAD.WIDE.U32"
    operands: list[str]

    @property
    def operation(self) -> str:
        return self.name.split(".")[0]


class Kernel(NamedTuple):
    symbol: str
    registers: int
    code: list[Instruction]


def read(cubin: Path, select: Callable[[str], Any]) -> dict[Any, Kernel]:
    """The kernels of a cubin or fatbin under select(symbol), less those where that is None."""
    tool = _cuobjdump()

    def printed(flag: str) -> str:
        return subprocess.run(
            [tool, flag, "-arch", "sm_90", str(cubin)], check=True, capture_output=True, text=True
        ).stdout

    registers = dict(re.findall(r"Function (\S+):\s*\n.*?REG:(\d+)", printed("-res-usage")))
    kernels = {}
    for part in re.split(r"\n\s*Function : ", printed("-sass"))[1:]:
        symbol, code = part.split("\n", 1)
        key = select(symbol.strip())
        if key is not None:
            kernels[key] = Kernel(symbol.strip(), int(registers[symbol.strip()]), _instructions(code))
    return kernels


def _cuobjdump() -> str:
    """The CUDA toolkit's, or the one that Triton brings along."""
    found = shutil.which("cuobjdump")
    if found is None:
        import triton

        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


def _operands(text: str) -> list[str]:
    return [x.strip() for x in re.split(r",(?![^\[]*\])", text.replace(".reuse", "")) if x]


def _instructions(code: str) -> list[Instruction]:
    line = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@(!?U?P[T0-9])\s+)?([A-Z][A-Z0-9_.x]*)\s*([^;]*?)\s*;")
    return [Instruction(int(at, 16), guard, name, _operands(text)) for at, guard, name, text in line.findall(code)]


# ---- operands as Python expressions of R, U (registers), P, Q (predicates), K (constants) ---------------------------


def is_predicate(operand: str) -> bool:
    return re.fullmatch(r"!?U?P[T0-6]", operand) is not None


def predicate(operand: str) -> str:
    name = operand.lstrip("!")
    text = "True" if name in ("PT", "UPT") else f"{'Q' if name[0] == 'U' else 'P'}[{name[-1]}]"
    return f"(not {text})" if operand[0] == "!" else text


def register(operand: str, further: int = 0) -> str:
    """A register, or the one `further` on; "" for those that are always 0."""
    name, number = re.fullmatch(r"(U?R)(\d+|Z)(?:\.\w+)*", operand).groups()  # type: ignore[union-attr]
    return "" if number == "Z" else f"{name[0]}[{int(number) + further}]"


def constant(operand: str, further: int = 0) -> str:
    return f"K({address(operand[operand.index('][') + 2 : -1])}+{further},4)"


def address(operand: str) -> str:
    terms = []
    for term in operand.split("+"):
        if re.match(r"-?0x", term):
            terms.append(str(int(term, 16)))
        elif term.endswith(".64"):
            terms.append(f"({register(term) or 0}|{register(term, 1) or 0}<<32)")
        else:
            scale = re.search(r"\.X(\d+)$", term)
            terms.append(f"{register(term) or 0}*{scale[1] if scale else 1}")
    return "(" + "+".join(terms) + ")"


def bits(operand: str, further: int = 0) -> str:
    if re.match(r"-?0x", operand):
        return str(int(operand, 16) & MASK) if further == 0 else str(int(operand, 16) >> 32 & MASK)
    if operand.startswith("c["):
        return constant(operand, 4 * further)
    return register(operand, further) or "0"


def integer(operand: str) -> str:
    """A number below 2^32; of a negative one the complement + 1, whose carry counts."""
    if operand[0] == "~":
        return f"({bits(operand[1:])}^{MASK})"
    if operand[0] == "-" and not operand.startswith("-0x"):
        return f"(({bits(operand[1:])}^{MASK})+1)"
    return bits(operand)


def signed(operand: str) -> str:
    return f"s32({integer(operand)}&{MASK})"


def real(operand: str, double: bool = False) -> str:
    literal = operand.lstrip("+-")
    if re.fullmatch(r"[\d.]+(e[+-]?\d+)?|INF|QNAN", literal):
        return f"float('{operand.replace('+', '', 1).replace('QNAN', 'nan')}')"
    name = operand.lstrip("-").strip("|")
    text = f"f64({bits(name)},{bits(name, 1)})" if double else f"f32({bits(name)})"
    text = f"abs({text})" if "|" in operand else text
    return f"(-{text})" if operand[0] == "-" else text


def put(target: str, value: str, further: int = 0) -> str:
    name = register(target, further)
    return f"{name}={value}" if name else f"{value}"


def put_double(target: str, value: str) -> list[str]:
    return [f"x={value}", f"{register(target)},{register(target, 1)}=u64(x)"]


def put_predicate(target: str, value: str) -> str:
    return f"v={value}" if target in ("PT", "UPT") else f"{predicate(target)}={value}"


# ---- instructions as Python statements ------------------------------------------------------------------------------

NOTHING = {"NOP", "YIELD", "WARPSYNC", "ENDCOLLECTIVE", "MEMBAR", "BREAK", "FENCE", "WARPGROUP"}
JUMPS = {"BRA", "CALL", "RET", "EXIT"}
MEETINGS = {"BAR", "SHFL", "VOTE", "VOTEU", "REDUX", "BSSY", "BSYNC", "LDSM", "STSM", "HGMMA"}
SHARED_ACCESSES = {"LDS", "STS", "LD", "ST"}  # the last two: perhaps
COMPARISONS = {"LT": "<", "LE": "<=", "GT": ">", "GE": ">=", "EQ": "==", "NE": "!="}


def statements(i: Instruction) -> list[str]:
    operation, *flags = i.name.split(".")
    o = list(i.operands)
    if operation in NOTHING:
        return []
    # The uniform datapath's instructions are those of all lanes; ULDC, UMOV, ... with registers U.
    uniform = re.fullmatch(r"U(LDC|MOV|IADD3|IMAD|LEA|LOP3|SHF|ISETP|SEL|PRMT|FLO|POPC|BREV|PLOP3|SGXT)", operation)
    translate = TRANSLATIONS.get(uniform[1] if uniform else operation)
    if translate is None:
        raise NotImplementedError(f"{i.name} {', '.join(o)}")
    return translate(flags, o)


def _carries(o: list[str], flags: list[str]) -> tuple[str, list[str], list[str], str]:
    """Target, predicates that get carries, sources, and the carries to add."""
    target, rest = o[0], o[1:]
    out = []
    while is_predicate(rest[0]):
        out.append(rest.pop(0))
    added = ""
    while is_predicate(rest[-1]):
        carry = rest.pop()
        if "X" in flags:
            added += f"+{predicate(carry)}"
    return target, out, rest, added


def _add(flags: list[str], o: list[str]) -> list[str]:
    target, out, sources, carries = _carries(o, flags)
    lines = [f"t={'+'.join(integer(x) for x in sources)}{carries}", put(target, f"t&{MASK}")]
    return lines + [put_predicate(p, f"t>>32>{n}") for n, p in enumerate(out)]


def _multiply_add(flags: list[str], o: list[str]) -> list[str]:
    target, out, (x, y, z), carries = _carries(o, flags)
    number = (lambda e: f"({integer(e)}&{MASK})") if "U32" in flags else signed
    if "WIDE" in flags or "HI" in flags:  # z has two words, too
        sign, z = ("-", z[1:]) if re.match("-U?R", z) else ("+", z)
        lines = [f"t={number(x)}*{number(y)}{sign}({bits(z)}|{bits(z, 1)}<<32){carries}"]
        words = [("t>>32", 0)] if "HI" in flags else [("t", 0), ("t>>32", 1)]
        lines += [put(target, f"{word}&{MASK}", further) for word, further in words]
        return lines + [put_predicate(p, "t>>64!=0") for p in out]
    return [f"t={integer(x)}*{integer(y)}+{integer(z)}{carries}", put(target, f"t&{MASK}")]


def _shift_add(flags: list[str], o: list[str]) -> list[str]:
    target, out, sources, carries = _carries(o, flags)
    x, y, shift = sources[0], sources[1], int(sources[-1], 16)
    if "SX32" in flags:
        shifted = f"({signed(x)}<<{shift}>>32&{MASK})"
    elif "HI" in flags:
        shifted = f"(({integer(x)}&{MASK}|{bits(sources[2])}<<32)<<{shift}>>32&{MASK})"
    else:
        shifted = f"({integer(x)}<<{shift}&{MASK})"
    lines = [f"t={shifted}+{integer(y)}{carries}", put(target, f"t&{MASK}")]
    return lines + [put_predicate(p, "t>>32!=0") for p in out]


def _shift(flags: list[str], o: list[str]) -> list[str]:
    target, low, count, high = o
    by = f"min({bits(count)},64)" if "W" not in flags else f"({bits(count)}&{63 if 'U64' in flags else 31})"
    both = f"({bits(low)}|{bits(high)}<<32)"
    if "L" in flags:
        value = f"{both}<<{by}>>32" if "HI" in flags else f"{bits(low)}<<{by}"
    elif "HI" in flags:
        value = f"{signed(high) if 'S32' in flags else bits(high)}>>{by}"
    else:
        value = f"{both}>>{by}"
    return [put(target, f"({value})&{MASK}")]


def _extend(flags: list[str], o: list[str]) -> list[str]:
    """Sign or zero extension from so many bits."""
    lines = [f"t=(1<<{bits(o[2])})-1", f"x={bits(o[1])}&t"]
    return [*lines, put(o[0], "x" if "U32" in flags else f"(x|{MASK}&~t if x>t>>1 else x)")]


def _logic(flags: list[str], o: list[str]) -> list[str]:
    out = [o.pop(0)] if is_predicate(o[0]) else []
    target, a, b, c, table = o[:5]
    value = f"lop3({integer(a)},{integer(b)},{integer(c)},{table})"
    plain = {0xC0: "&", 0xFC: "|", 0x3C: "^"}.get(int(table, 16))
    if plain:
        value = f"({integer(a)}{plain}{integer(b)})"
    return [f"t={value}", put(target, "t")] + [put_predicate(p, "t!=0") for p in out]


def _predicate_logic(flags: list[str], o: list[str]) -> list[str]:
    a, b, c = (predicate(x) for x in o[2:5])
    return [f"t={a}*4+{b}*2+{c}"] + [put_predicate(o[n], f"bool({o[5 + n]}>>t&1)") for n in (0, 1)]


def _set(o: list[str], flags: list[str], before: list[str], comparison: str, other: str) -> list[str]:
    """What a comparison makes of its two predicates: itself and its opposite, each combined with `other`."""
    combine = "and" if "AND" in flags else "or" if "OR" in flags else "!="
    lines = [*before, f"t={comparison}", f"w={other}"]
    return lines + [put_predicate(o[0], f"(t {combine} w)"), put_predicate(o[1], f"((not t) {combine} w)")]


def _compare_integers(flags: list[str], o: list[str]) -> list[str]:
    sign = COMPARISONS[flags[0]]
    number = bits if "U32" in flags else signed
    comparison = f"{number(o[2])}{sign}{number(o[3])}"
    if "EX" in flags:  # the high words; o[5] is what became of the low ones
        low = predicate(o[5])
        if sign == "!=":
            comparison = f"({comparison} or {low})"
        else:
            strict = {"<=": "<", ">=": ">", "==": "=="}.get(sign, sign)
            equal = f"{number(o[2])}=={number(o[3])}"
            higher = "False" if sign == "==" else f"{number(o[2])}{strict}{number(o[3])}"
            comparison = f"({higher} or ({equal} and {low}))"
    return _set(o, flags, [], comparison, predicate(o[4]))


def _comparison(name: str, o: list[str], double: bool = False) -> tuple[list[str], str]:
    """Of two reals: what comes before, and whether it holds."""
    if name in ("NAN", "NUM"):
        comparison = "x!=x or y!=y" if name == "NAN" else "x==x and y==y"
    elif name == "NE":
        comparison = "x!=y and x==x and y==y"
    else:  # GEU: or unordered; NEU is Python's own
        comparison = f"x{COMPARISONS[name[:2]]}y" + (" or x!=x or y!=y" if name.endswith("U") else "")
    return [f"x={real(o[0], double)}", f"y={real(o[1], double)}"], f"({comparison})"


def _compare_reals(flags: list[str], o: list[str], double: bool = False) -> list[str]:
    before, comparison = _comparison(flags[0], o[2:4], double)
    return _set(o, flags, before, comparison, predicate(o[4]))


def _one_or_zero(flags: list[str], o: list[str]) -> list[str]:
    """A comparison as a real number (BF)."""
    before, comparison = _comparison(flags[1], o[1:3])
    combine = "and" if "AND" in flags else "or" if "OR" in flags else "!="
    return [*before, put(o[0], f"u32(1.0 if {comparison} {combine} {predicate(o[3])} else 0.0)")]


def _compute(expression: str, double: bool = False) -> Callable[[list[str], list[str]], list[str]]:
    def translate(flags: list[str], o: list[str]) -> list[str]:
        sources = [real(x, double) for x in o[1:] if not is_predicate(x)]
        value = expression.format(*sources, choice=predicate(o[-1]) if is_predicate(o[-1]) else "")
        return put_double(o[0], value) if double else [put(o[0], f"u32({value})")]

    return translate


def _function(flags: list[str], o: list[str]) -> list[str]:
    if flags[0] == "RCP64H":
        return [f"x=f64(0,{bits(o[1])})", put(o[0], "u64(1/x if x else math.inf)[1]")]
    return [put(o[0], f"u32(mufu('{flags[0]}',{real(o[1])}))")]


def _integer_to_real(flags: list[str], o: list[str]) -> list[str]:
    if "S64" in flags or "U64" in flags:
        number = f"({bits(o[1])}|{bits(o[1], 1)}<<32)"
        number = f"({number}-({bits(o[1], 1)}>>31<<64))" if "S64" in flags else number
    elif part := next((f for f in flags if re.fullmatch("[SU](8|16)", f)), None):  # of the register, the low bits
        sign = 1 << int(part[1:]) - 1
        low = f"({bits(o[1])}&{2 * sign - 1})"
        number = low if part[0] == "U" else f"(({low}^{sign})-{sign})"
    else:
        number = bits(o[1]) if "U32" in flags else signed(o[1])
    if "F64" in flags:
        return put_double(o[0], f"float({number})")
    return [put(o[0], f"u32({'rounded_up' if 'RP' in flags else 'float'}({number}))")]


def _real_to_integer(flags: list[str], o: list[str]) -> list[str]:
    value = [f"t=int({real(o[1])})"]
    if "U64" in flags or "S64" in flags:
        return [*value, put(o[0], f"t&{MASK}"), put(o[0], f"t>>32&{MASK}", 1)]
    return [*value, put(o[0], f"t&{MASK}")]


def _convert(flags: list[str], o: list[str]) -> list[str]:
    if flags[:2] == ["F64", "F32"]:
        return put_double(o[0], real(o[1]))
    assert flags[:2] == ["F32", "F64"], flags
    return [put(o[0], f"u32({real(o[1], double=True)})")]


def _pack(flags: list[str], o: list[str]) -> list[str]:
    to = "to_bf16" if "BF16" in flags else "to_f16"
    return [put(o[0], f"{to}({real(o[2])})|{to}({real(o[1])})<<16")]


def _pair_constant(flags: list[str], o: list[str]) -> list[str]:
    assert o[1].lstrip("-") == o[2].lstrip("-") == "RZ", o  # only used so
    high, low = (float(x.replace("+", "").replace("QNAN", "nan")) for x in o[3:5])
    return [put(o[0], str(to_f16(high) << 16 | to_f16(low)))]


def _half_to_real(flags: list[str], o: list[str]) -> list[str]:
    assert "F32" in flags and o[1].lstrip("-") == "RZ", o  # only used so
    return [put(o[0], f"u32(f16({bits(o[2])}>>{16 if 'H1_H1' in o[2] else 0}))")]


def _pair_extreme(flags: list[str], o: list[str]) -> list[str]:
    to, of = ("to_bf16", "bf16") if "BF16_V2" in flags else ("to_f16", "f16")
    choose = "larger" if o[-1] == "!PT" else "smaller"

    def lane(shift: int) -> str:
        value, *others = (f"{of}({bits(x)}>>{shift})" for x in o[1:-1])
        for other in others:
            value = f"{choose}({value},{other})"
        return f"{to}({value})"

    return [put(o[0], f"{lane(0)}|{lane(16)}<<16")]


def _words(flags: list[str]) -> tuple[int, int]:
    """How many words an access takes, and the bytes of one."""
    size = 1 if "U8" in flags else 2 if "U16" in flags else 4
    return 4 if "128" in flags else 2 if "64" in flags else 1, size


def _pointer(operand: str, function: str) -> str:
    """Of "[R2.64+0x10]", or "desc[UR4][R2.64+0x10]"; addresses of shared memory have 32 bits."""
    at = address(operand[operand.rindex("[") + 1 : -1])
    return f"{at}&{MASK}" if function.endswith("shared") else at


def _load(function: str) -> Callable[[list[str], list[str]], list[str]]:
    def translate(flags: list[str], o: list[str]) -> list[str]:
        words, size = _words(flags)
        at = f"t={_pointer(o[1], function)}"
        return [at] + [put(o[0], f"{function}(t+{4 * k},{size})", k) for k in range(words)]

    return translate


def _store(function: str) -> Callable[[list[str], list[str]], list[str]]:
    def translate(flags: list[str], o: list[str]) -> list[str]:
        words, size = _words(flags)
        return [f"t={_pointer(o[0], function)}"] + [
            f"{function}(t+{4 * k},{size},{register(o[1], k) or 0})" for k in range(words)
        ]

    return translate


def _load_constant(flags: list[str], o: list[str]) -> list[str]:
    words, size = _words(flags)
    at = f"t={address(o[1][o[1].index('][') + 2 : -1])}"  # of which the target may be part
    return [at] + [put(o[0], f"K(t+{4 * k},{size})", k) for k in range(words)]


def _predicates_to_register(flags: list[str], o: list[str]) -> list[str]:
    return ["t=sum(P[k]<<k for k in range(7))", put(o[0], f"({bits(o[2])}&~{o[3]}|t&{o[3]})&{MASK}")]


TRANSLATIONS: dict[str, Callable[[list[str], list[str]], list[str]]] = {
    "MOV": lambda f, o: [put(o[0], bits(o[1]))],
    "R2UR": lambda f, o: [put(o[0], bits(o[-1]))],
    "IADD3": _add,
    "VIADD": _add,
    "IMAD": _multiply_add,
    "LEA": _shift_add,
    "SGXT": _extend,
    "SHF": _shift,
    "LOP3": _logic,
    "PLOP3": _predicate_logic,
    "ISETP": _compare_integers,
    "FSETP": _compare_reals,
    "FSET": _one_or_zero,
    "DSETP": lambda f, o: _compare_reals(f, o, double=True),
    "SEL": lambda f, o: [put(o[0], f"({integer(o[1])}&{MASK}) if {predicate(o[3])} else ({integer(o[2])}&{MASK})")],
    "FSEL": _compute("{0} if {choice} else {1}"),
    "VIMNMX": lambda f, o: [
        put(o[0], f"(min if {predicate(o[3])} else max)({signed(o[1])},{signed(o[2])})&{MASK}"),
    ],
    "VIADDMNMX": lambda f, o: [
        put(
            o[0],
            f"(min if {predicate(o[4])} else max)(s32({integer(o[1])}+{integer(o[2])}&{MASK}),{signed(o[3])})&{MASK}",
        ),
    ],
    "IABS": lambda f, o: [put(o[0], f"abs({signed(o[1])})")],
    "PRMT": lambda f, o: [put(o[0], f"prmt({bits(o[1])},{bits(o[2])},{bits(o[3])})")],
    "FADD": _compute("{0}+{1}"),
    "FMUL": _compute("{0}*{1}"),
    "FFMA": _compute("{0}*{1}+{2}"),
    "FMNMX": _compute("(smaller if {choice} else larger)({0},{1})"),
    "FCHK": lambda f, o: [put_predicate(o[0], "False")],  # whether a division takes the slow way
    "DADD": _compute("{0}+{1}", double=True),
    "DMUL": _compute("{0}*{1}", double=True),
    "DFMA": _compute("{0}*{1}+{2}", double=True),
    "MUFU": _function,
    "I2F": _integer_to_real,
    "I2FP": _integer_to_real,
    "F2I": _real_to_integer,
    "F2F": _convert,
    "F2FP": _pack,
    "HFMA2": _pair_constant,
    "HADD2": _half_to_real,
    "HMNMX2": _pair_extreme,
    "VHMNMX": _pair_extreme,
    "LDC": _load_constant,
    "LDG": _load("load"),
    "LD": _load("load"),
    "LDS": _load("load_shared"),
    "STG": _store("store"),
    "ST": _store("store"),
    "STS": _store("store_shared"),
    "S2R": lambda f, o: [put(o[0], f"S.get('{o[1]}',0)")],
    "S2UR": lambda f, o: [put(o[0], f"S.get('{o[1]}',0)")],
    "CS2R": lambda f, o: [put(o[0], "0")] + ([] if "32" in f else [put(o[0], "0", 1)]),  # only SRZ
    "B2R": lambda f, o: [put_predicate(o[1], "bool(S['barrier'])")],
    "P2R": _predicates_to_register,
}


# ---- a block of threads -------------------------------------------------------------------------------------------


class Executed(NamedTuple):
    """What a warp of a block has done, on average."""

    issued: collections.Counter[str]  # by operation
    wavefronts: float


class Thread:
    def __init__(self, lane: int, special: dict[str, int]) -> None:
        self.at = 0  # an index of the code; -1: it has ended
        self.lane = lane
        self.state = [0] * 260, [0] * 68, [False] * 8, [False] * 8, special  # R, U, P, Q, S


class Program:
    """A kernel, ready to run, with its constant memory and the functions that load and store global memory.

    `load(address, bytes)`, `store(address, bytes, value)`; values of at most 4 bytes.
    """

    def __init__(
        self,
        kernel: Kernel,
        parameters: bytes,
        grid: tuple[int, ...],
        block: tuple[int, int],
        load: Callable[[int, int], int],
        store: Callable[[int, int, int], None],
    ) -> None:
        self.code, self.block = kernel.code, block
        memory = bytearray(PARAMETERS + len(parameters) + 64)
        struct.pack_into("<6I", memory, 0, *block, 1, *(*grid, 1, 1)[:3])
        memory[PARAMETERS : PARAMETERS + len(parameters)] = parameters
        self.shared: dict[int, int] = {}  # words
        unset = 0x7FFFFFFF  # NaN
        shared = self.shared

        def load_shared(at: int, size: int) -> int:
            word = shared.get(at >> 2, unset)
            return word if size == 4 else word >> 8 * (at & 3) & ((1 << 8 * size) - 1)

        def store_shared(at: int, size: int, value: int) -> None:
            shift, mask = 8 * (at & 3), (1 << 8 * size) - 1
            shared[at >> 2] = shared.get(at >> 2, unset) & ~(mask << shift) & MASK | (value & mask) << shift

        def generic(shared_way: Callable[..., Any], way: Callable[..., Any]) -> Callable[..., Any]:
            return lambda at, *rest: (shared_way if at & SHARED_WINDOW else way)(at & (SHARED_WINDOW - 1), *rest)

        self.names: dict[str, Any] = {
            **{f.__name__: f for f in (f32, u32, f64, u64, s32, bf16, to_bf16, f16, to_f16, rounded_up)},
            **{f.__name__: f for f in (smaller, larger, mufu, lop3, prmt, load_shared, store_shared)},
            "K": lambda at, size: int.from_bytes(memory[at : at + size], "little"),
            "load": generic(load_shared, load),
            "store": generic(store_shared, store),
            "math": math,
            "INDEX": {i.at: n for n, i in enumerate(self.code)},
        }
        self.accesses = self.names["accesses"] = Accesses()
        self.ends = self._pieces()
        self.compiled: dict[int, Callable[..., int]] = {}

    def _pieces(self) -> dict[int, int]:
        """Where straight pieces of code begin and end: jumps end them, meetings are pieces of their own."""
        index, starts = self.names["INDEX"], {0}
        for n, i in enumerate(self.code):
            if i.operation in JUMPS | MEETINGS:
                starts |= {n + 1} | ({n} if i.operation in MEETINGS else set())
            if i.operation in ("BRA", "CALL"):
                starts.add(index[_target(i)])
            if i.operation in ("MOV", "IMAD"):  # perhaps where a CALL is to return to
                starts |= {index[int(x, 16)] for x in i.operands if x[:2] == "0x" and int(x, 16) in index}
        ordered = sorted(s for s in starts if s < len(self.code))
        return dict(zip(ordered, [*ordered[1:], len(self.code)], strict=True))

    def _statements(self, i: Instruction) -> list[str]:
        """Those of the instruction; the second one tells `accesses`, where it is shared memory that it accesses."""
        body = statements(i)
        if i.operation in SHARED_ACCESSES:
            words, size = _words(i.name.split("."))
            is_shared = f"t&{SHARED_WINDOW} and " if i.operation in ("LD", "ST") else ""
            self.names[f"access{i.at}"] = Access(i.at, words * size, i.operation in ("LDS", "LD"))
            body.insert(1, f"{is_shared}accesses.add(access{i.at},S['SR_LANEID'],t)")
        return body

    def _compile(self, start: int) -> Callable[..., int]:
        lines = []
        for i in self.code[start : self.ends[start]]:
            guard = f"if {predicate(i.guard)}: " if i.guard else ""
            if i.operation == "EXIT":
                lines.append(f"{guard}return -1")
            elif i.operation == "RET":
                lines.append(f"{guard}return INDEX[{register(i.operands[0].split()[0])}]")
            elif i.operation in ("BRA", "CALL"):
                if ".DIV" in i.name:  # if the warp's threads have parted: they go together here
                    continue
                conditions = [predicate(p) for p in (i.guard, *i.operands) if p and is_predicate(p)]
                test = f"if {' and '.join(conditions)}: " if conditions else ""
                lines.append(f"{test}return {self.names['INDEX'][_target(i)]}")
            else:
                body = self._statements(i)
                if body:
                    lines.append(guard + "; ".join(body))
        lines.append(f"return {self.ends[start]}")
        exec("def piece(R,U,P,Q,S):\n " + "\n ".join(lines), self.names)
        piece: Callable[..., int] = self.names["piece"]
        return piece

    def run(self, number: tuple[int, ...]) -> Executed:
        """Executes a block of the grid."""
        columns, rows = self.block
        self.shared.clear()
        self.accesses.wavefronts = 0.0
        special = {f"SR_CTAID.{axis}": n for axis, n in zip("XYZ", number, strict=False)}
        special["SR_SWINHI"] = SHARED_WINDOW >> 32
        threads = [
            Thread(n % 32, {**special, "SR_TID.X": n % columns, "SR_TID.Y": n // columns, "SR_LANEID": n % 32})
            for n in range(columns * rows)
        ]
        warps = [threads[n : n + 32] for n in range(0, len(threads), 32)]
        visits: collections.Counter[int] = collections.Counter()
        masks: list[dict[str, set[int]]] = [{} for _ in warps]
        while any(t.at >= 0 for t in threads):
            for warp, mask in zip(warps, masks, strict=True):
                self._advance(warp, mask, visits)
            self._pass_barrier([t for t in threads if t.at >= 0])
        issued: collections.Counter[str] = collections.Counter()
        for start, times in visits.items():
            for i in self.code[start : self.ends[start]]:
                if i.operation != "NOP":
                    issued[i.operation] += times
        average = collections.Counter({name: times / len(warps) for name, times in issued.items()})
        return Executed(average, self.accesses.wavefronts / len(warps) + average["SHFL"])  # each takes a wavefront

    def _pass_barrier(self, threads: list[Thread]) -> None:
        """All that have not ended are at it; of BAR.RED.OR the result is whether any says so, for B2R to fetch."""
        said = [_holds(i.operands[1], t) for t in threads if "RED.OR" in (i := self.code[t.at]).name]
        for t in threads:
            t.state[4]["barrier"] = int(any(said))
            t.at = self.ends[t.at]

    def _advance(self, warp: list[Thread], masks: dict[str, set[int]], visits: collections.Counter[int]) -> None:
        """Runs a warp up to a barrier of the block, or to its end."""
        live = [t for t in warp if t.at >= 0]
        while live:
            at, group = self._furthest_behind(live, masks)
            i = self.code[at]
            visits[at] += 1
            if i.operation == "BAR":
                return
            if i.operation in MEETINGS:
                if i.operation == "BSSY":
                    masks[i.operands[0]] = {t.lane for t in group}
                elif i.operation == "SHFL":
                    _shuffle(i, group)
                elif i.operation in ("VOTE", "VOTEU"):
                    _vote(i, group)
                elif i.operation == "REDUX":
                    _reduce(i, group)
                elif i.operation in ("LDSM", "STSM"):
                    took = _matrices(i, group, self.names["load_shared"], self.names["store_shared"])
                    self.accesses.wavefronts += took
                elif i.operation == "HGMMA":
                    self.accesses.wavefronts += _multiply_matrices(i, group, self.names["load_shared"])
                for t in group:
                    t.at = self.ends[at]
                continue
            piece = self.compiled.get(at)
            if piece is None:
                piece = self.compiled[at] = self._compile(at)
            for t in group:
                t.at = piece(*t.state)
            self.accesses.meet()
            live = [t for t in live if t.at >= 0]

    def _furthest_behind(self, live: list[Thread], masks: dict[str, set[int]]) -> tuple[int, list[Thread]]:
        at = live[0].at
        if all(t.at == at for t in live):
            return at, live
        for at in sorted({t.at for t in live}):
            i = self.code[at]
            if i.operation == "BAR":
                continue
            if i.operation == "BSYNC":
                waited_for = masks[i.operands[0]]
                if any(t.at != at and t.lane in waited_for for t in live):
                    continue
            return at, [t for t in live if t.at == at]
        raise RuntimeError("the threads of a warp wait for each other")


def _target(i: Instruction) -> int:
    return int(i.operands[-1].split()[-1], 16)


def _holds(guard: str, thread: Thread) -> bool:
    names = {"P": thread.state[2], "Q": thread.state[3]}
    return not guard or bool(eval(predicate(guard), names))


def _number(name: str) -> int:
    return int(re.findall(r"\d+", name)[0])


def _shuffle(i: Instruction, group: list[Thread]) -> None:
    valid, target, source, lane, _ = i.operands
    sent = {t.lane: t.state[0][_number(source)] for t in group}
    for t in group:
        if not _holds(i.guard, t):
            continue
        by = int(lane, 16) if lane.startswith("0x") else t.state[0][_number(lane)]
        other = {"BFLY": t.lane ^ by, "DOWN": t.lane + by, "UP": t.lane - by, "IDX": by}[i.name.split(".")[1]]
        t.state[0][_number(target)] = sent.get(other, sent[t.lane])
        if valid != "PT":
            t.state[2][_number(valid)] = other in sent


def _vote(i: Instruction, group: Iterable[Thread]) -> None:
    group = list(group)
    said = {t.lane: _holds(i.operands[-1], t) for t in group}
    result = all(said.values()) if "ALL" in i.name else any(said.values())
    for t in group:
        registers, uniform, predicates, uniform_predicates, _ = t.state
        for target in i.operands[:-1]:
            if target in ("PT", "UPT", "RZ", "URZ"):
                continue
            if is_predicate(target):
                (uniform_predicates if target[0] == "U" else predicates)[_number(target)] = result
            else:
                ballot = sum(1 << lane for lane, yes in said.items() if yes)
                (uniform if target[0] == "U" else registers)[_number(target)] = ballot


def _reduce(i: Instruction, group: list[Thread]) -> None:
    assert i.name == "REDUX.MAX.S32", i.name
    target, source = i.operands
    result = max((t.state[0][_number(source)] for t in group), key=s32)
    for t in group:
        t.state[1][_number(target)] = result


def _matrices(i: Instruction, group: list[Thread], load: Callable[..., int], store: Callable[..., None]) -> int:
    """Loads or stores matrices of 8 x 4 words: the n-th 8 lanes have the n-th one's rows' addresses, and a lane a word
    of each. Returns how many wavefronts that takes: a matrix's rows go together."""
    assert len(group) == 32 and ".16.M88." in i.name, i.name
    place, target = i.operands if i.operation == "STSM" else i.operands[::-1]
    at = eval(f"lambda R,U: {_pointer(place, 'shared')}")
    rows, count = tuple(at(t.state[0], t.state[1]) for t in group), int(i.name[-1])
    for n in range(count):
        for lane, t in enumerate(group):
            word, register = rows[8 * n + lane // 4] + 4 * (lane % 4), _number(target) + n
            if i.operation == "STSM":
                store(word, 4, t.state[0][register])
            else:
                t.state[0][register] = load(word, 4)
    return sum(wavefronts(rows[8 * n : 8 * n + 8], 16, is_load=False) for n in range(count))


def _multiply_matrices(i: Instruction, group: list[Thread], load: Callable[..., int]) -> float:
    """A warp's 16 rows of a 64 x N matrix of sums of tf32 products: (16 x 8 in registers) (8 x N in shared memory).

    Returns its share of the wavefronts. Four warps read the right matrix together, or else a matrix of 16-bit numbers,
    m64n256k16, would take longer than the 128 clocks that NVIDIA's peak allows it.
    """
    columns = int(re.fullmatch(r"HGMMA\.64x(\d+)x8\.F32\.TF32", i.name)[1])  # type: ignore[index]
    target, left, descriptor, added = i.operands[:4]
    registers = [t.state[0] for t in group]
    uniform, place = group[0].state[1], _number(descriptor)
    low, high = uniform[place + 2], uniform[place + 3]  # before them, the left matrix's, were it in shared memory
    begin, pitch, swizzle = (low & 0x3FFF) << 4, (high & 0x3FFF) << 4, high >> 30
    row_bytes = {1: 128, 2: 64, 3: 32}[swizzle]

    def right(n: int, k: int) -> float:
        at = begin + n // 8 * pitch + n % 8 * row_bytes + 4 * k
        return f32(load(at ^ (at >> 3 & row_bytes - 16), 4) & -8192)

    b = [[right(n, k) for k in range(8)] for n in range(columns)]
    first = _number(left)
    for lane, R in enumerate(registers):
        for half in range(2):
            quad = registers[lane & ~3 : (lane | 3) + 1]
            a = [f32(quad[k % 4][first + half + k // 4 * 2] & -8192) for k in range(8)]
            for n in range(columns // 8):
                for odd in range(2):
                    sums = math.fsum(x * y for x, y in zip(a, b[8 * n + lane % 4 * 2 + odd], strict=True))
                    to = 4 * n + 2 * half + odd
                    sums += 0.0 if added == "RZ" else f32(R[_number(added) + to])
                    R[_number(target) + to] = u32(sums)
    return columns * 8 * 4 / ROW / 4
