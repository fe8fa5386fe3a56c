"""The fault drill: breaks the code on purpose, one mutation after the other, and shows that the tests catch each.

    python tests/mutations.py [--only NAME]... [--jobs N]

In temporary copies of the tree, never in the checkout. First the tests chosen must pass in a copy that is as it should
be; then, mutation by mutation, they must fail. Ends with status 1 where they do not, or where a mutation no longer
applies (which test_mutations.py notices at every run of the suite). Needs g++, and the packages that the tests need.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    """`old`, which occurs once in `file`, becomes `new`; `tests` are the options of pytest that should notice it."""

    name: str
    file: str
    old: str
    new: str
    backend: str  # of the tests: "cpu", "cuda" (compiled for the CPU) or "triton" (interpreted)
    tests: str


LOSSES = "tests/test_losses.py -k {backend}"
SHAPES = "tests/test_kernel_shapes.py -k '{backend} and "
RESIZE = "tests/test_resize.py -k '{backend} and every_ratio and float32'"
SMALLER = "tests/test_resize.py -k '{backend} and smaller_exits'"
CUDA, TRITON = "csrc/cuda", "selfreg_fast/triton/kernels.py"

MUTATIONS = [
    Mutation(
        "cpu: sign of the soft target in the gradient",
        "csrc/cpu/full_size.h",
        "g[i] = less_product(g[i], k[t][i], target[t][c * apart + i]);",
        "g[i] = less_product(g[i], -k[t][i], target[t][c * apart + i]);",
        "cpu",
        LOSSES,
    ),
    Mutation(
        "cpu: a band's last rows dropped, unless they fill a tile",
        "csrc/cpu/exit_loss.cpp",
        "frame.top < frame.y1; frame.top += frame.rows) {",
        "frame.top + plan.tile_rows <= frame.y1 || frame.top == frame.y0; frame.top += frame.rows) {",
        "cpu",
        LOSSES,
    ),
    Mutation(
        "cpu: last of more than four exits skipped",
        "csrc/cpu/exit_loss.cpp",
        "if (targets.teacher_number(e) < 0) students.learn(e, b, Pass::all);",
        "if (targets.teacher_number(e) < 0 && e < 4) students.learn(e, b, Pass::all);",
        "cpu",
        LOSSES,
    ),
    Mutation(
        "cpu: rows taken to follow each other wherever pixels do",
        "csrc/cpu/launch.cpp",
        "} else if (strides[d] == r.length * r.step) {",
        "} else if (r.step == 1) {",
        "cpu",
        LOSSES,
    ),
    Mutation(
        "cpu: ignored labels count",
        "csrc/cpu/pixel_weights.h",
        "labelled[r] = valid < 0 ? V{} : soft[r];",
        "labelled[r] = soft[r];",
        "cpu",
        LOSSES,
    ),
    Mutation(
        "cpu: a detached teacher learns",
        "csrc/cpu/targets.h",
        "return !L.detach_teacher && L.grads[L.teachers[r]].data;",
        "return L.grads[L.teachers[r]].data;",
        "cpu",
        LOSSES,
    ),
    Mutation(
        "cpu: last pixels of a streamed gradient not written",
        "csrc/cpu/read_write.h",
        "(end - done) * sizeof(A));",
        "(end - done - 1) * sizeof(A));",
        "cpu",
        "tests/test_kernel_shapes.py -k larger_than_caches",
    ),
    Mutation(
        "cpu: rows of a resized exit taken one too low",
        "csrc/cpu/exit_lines.h",
        "const A* const upper = row(span.low) + size->first[b];",
        "const A* const upper = row(span.low + span.both) + size->first[b];",
        "cpu",
        RESIZE,
    ),
    Mutation(
        "cpu: align_corners ignored in columns",
        "csrc/cpu/launch.cpp",
        "columns(exit.W, launch.W, launch.align_corners) {",
        "columns(exit.W, launch.W, false) {",
        "cpu",
        RESIZE,
    ),
    Mutation(
        "cpu: of a row of the gradient that bands share, the lower part only",
        "csrc/cpu/gradient_rows.h",
        "for (int64_t x = 0; x < grad.W; ++x) sum[x] += row[x * grad.stride_w];",
        "for (int64_t x = 0; x < grad.W; ++x) sum[x] += 0 * row[x * grad.stride_w];",
        "cpu",
        RESIZE,
    ),
    Mutation(
        "cpu: the column to the right gets the weight of the one to the left",
        "csrc/cpu/exit_sums.h",
        "right += pixel[k] * right_weight[k0 + k];",
        "right += pixel[k] * left_weight[k0 + k];",
        "cpu",
        SMALLER,
    ),
    Mutation(
        "cpu: what a span adds to the row below is lost",
        "csrc/cpu/exit_sums.h",
        "s == 0 && (begins || goes_on) ? none : below;",
        "true ? none : below;",
        "cpu",
        SMALLER,
    ),
    Mutation(
        "cpu: a smoothed label's sign in the gradient",
        "csrc/cpu/full_size.h",
        "g[c * apart + i] -= factor[i] == A(0) ? V{} : factor[i] * target(c, i);",
        "g[c * apart + i] += factor[i] == A(0) ? V{} : factor[i] * target(c, i);",
        "cpu",
        LOSSES,
    ),
    Mutation(
        "cpu: pixels far below both maxima go unnoticed",
        "csrc/cpu/exponentials.h",
        "fill<V>(A(1e-12))",
        "fill<V>(A(-1))",
        "cpu",
        "tests/test_resize.py -k '{backend} and peaks_of_other_channels'",
    ),
    Mutation(
        "cpu: what pixels that do not count lie on comes in",
        "csrc/cpu/full_size.h",
        "z[at + g] = counted[r + g] == A(0) ? V{} : z[at + g];",
        "z[at + g] = z[at + g];",
        "cpu",
        "tests/test_resize.py -k '{backend} and uncounted'",
    ),
    Mutation(
        "cpu: a row's sums are those of the one before, too",
        "csrc/cpu/exit_sums.h",
        "memset(row(v, opened), 0, row_numbers * sizeof(A));",
        "memset(row(v, opened), 0, sizeof(A));",
        "cpu",
        SMALLER,
    ),
    Mutation(
        "cuda: sums of all warps but the first dropped",
        f"{CUDA}/phases.h",
        "for (int k = thread_of_block() % 32; k < count; k += 32)",
        "for (int k = thread_of_block() % 32; k < 32; k += 32)",
        "cuda",
        LOSSES,
    ),
    Mutation(
        "cuda: no barrier before other warps' numbers are read",
        f"{CUDA}/planes.h",
        "buffer[p * size + group()] = x[p];\n    __syncthreads();",
        "buffer[p * size + group()] = x[p];",
        "cuda",
        SHAPES + "contiguous and odd and float32'",
    ),
    Mutation(
        "cuda: power of the temperature in the soft gradient",
        f"{CUDA}/phases.h",
        "rate = of_labels || a.target == Target::argmax ? A(1) : a.tau;",
        "rate = A(1);",
        "cuda",
        LOSSES,
    ),
    Mutation(
        "cuda: mask_soft ignored at the pixels",
        f"{CUDA}/phases.h",
        "if (a.mask_soft) w.soft = w.label;",
        "",
        "cuda",
        LOSSES,
    ),
    Mutation(
        "cuda: class weights left out of what the mean divides by",
        "csrc/cuda/launch.cu",
        "label += a.class_weight ? w * double(a.class_weight[y]) : w;",
        "label += w;",
        "cuda",
        LOSSES,
    ),
    Mutation(
        "cuda: a learning teacher hears the last student's normaliser only",
        f"{CUDA}/blockwise.h",
        "normalizers += k * log_z_of_student(s);",
        "normalizers = k * log_z_of_student(s);",
        "cuda",
        LOSSES,
    ),
    Mutation(
        "cuda: of two staged rows, the second one's odd channels lost",
        f"{CUDA}/staged.h",
        "if (i > 0) to[i - 1][V - 1] = x[0];",
        "",
        "cuda",
        LOSSES,
    ),
    Mutation(
        "cuda: of an exit larger than the output, the row below a pixel gets nothing",
        f"{CUDA}/blockwise_tile.h",
        "if (low + 1 < rows.from) to[copy_columns * a.C] += weight * sum;",
        "",
        "cuda",
        RESIZE,
    ),
    Mutation(
        "cuda: beside small exits, a full-size one is taught by the wrong row of its tile",
        f"{CUDA}/beside.h",
        "while (u.end[span] <= p) span = u.end[span];",
        "",
        "cuda",
        SMALLER,
    ),
    Mutation(
        "cuda: small exits' rows are begun anew with every tile",
        f"{CUDA}/scatter.h",
        "const bool first = last < 0, fresh = low != last;",
        "const bool first = true, fresh = low != last;",
        "cuda",
        SMALLER,
    ),
    Mutation(
        "cuda: small exits' pixels far below their peaks are left to underflow",
        f"{CUDA}/lines.h",
        "if (__builtin_expect(small, false)) {",
        "if (false) {",
        "cuda",
        "tests/test_resize.py -k '{backend} and peaks'",
    ),
    Mutation(
        "cuda: small exits' targets are added to the gradient",
        f"{CUDA}/combine.h",
        "total[j] -= gains[r] * sum[j];",
        "total[j] += gains[r] * sum[j];",
        "cuda",
        SMALLER,
    ),
    Mutation(
        "triton: a target is a power of the wrong exponent",
        TRITON,
        "factor = tl.exp2(-tl.log2(Z1) / tau)",
        "factor = tl.exp2(-tl.log2(Z1))",
        "triton",
        LOSSES,
    ),
    Mutation(
        "triton: a running sum does not follow its maximum",
        TRITON,
        "new_Z1 += (Z1[i] * tl.exp2(up[i] * one_rate) + tl.sum(",
        "new_Z1 += (Z1[i] + tl.sum(",
        "triton",
        SHAPES + "grows'",
    ),
    Mutation(
        "triton: sums of programs beyond the first block of them dropped",
        TRITON,
        "for start in range(0, programs, BLOCK):",
        "for start in range(0, BLOCK, BLOCK):",
        "triton",
        SHAPES + "programs'",
    ),
    Mutation(
        "triton: pixel_weight ignored",
        TRITON,
        "soft = tl.load(pixel_weight + j, mask=inside, other=0.0).to(A)",
        "soft = inside.to(A)",
        "triton",
        LOSSES,
    ),
    Mutation(
        "triton: smoothing left out of the gradient",
        TRITON,
        "smooths = g * smooth\n",
        "smooths = g * 0\n",
        "triton",
        LOSSES,
    ),
    Mutation(
        "python: saved gradients scaled in place though the graph is kept",
        "selfreg_fast/autograd.py",
        "if not is_real(factor) or _KEEPS_GRAPH is None or _KEEPS_GRAPH():",
        "if not is_real(factor):",
        "cpu",
        "tests/test_autograd.py -k '{backend} and retain'",
    ),
    Mutation(
        "python: float16 gradients divided before they are scaled",
        "selfreg_fast/autograd.py",
        "now = wanted if weights and exits[0].dtype != torch.float16 else ()",
        "now = wanted if weights else ()",
        "cpu",
        "tests/test_contract.py -k '{backend} and underflow'",
    ),
    Mutation(
        "python: of an exit in several passes, the last one's gradient only",
        "selfreg_fast/passes.py",
        "grads[e] = grads[e] + g if e in grads else g",
        "grads[e] = g",
        "cuda",
        "tests/test_many_exits.py -k '{backend} and learning'",
    ),
]


def occurrences(mutation: Mutation, root: Path = ROOT) -> int:
    """How often the text that it replaces is there: once, or it does not apply."""
    return (root / mutation.file).read_text().count(mutation.old)


def copied(source: Path, tree: Path) -> Path:
    ignored = shutil.ignore_patterns(".*", "venv*", "build", "dist", "*.egg-info", "__pycache__", "_build.json")
    return Path(shutil.copytree(source, tree, ignore=ignored))


def build(tree: Path) -> None:
    """The CPU kernels of a copy, for this machine's vectors alone and little optimised: in seconds."""
    import torch

    flags = "-std=c++17 -O1 -march=native -fPIC -shared -fopenmp-simd -fno-math-errno -fno-trapping-math -Wno-psabi"
    command = ["g++", *flags.split(), "-Icsrc", "-DSELFREG_ISA=baseline", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    sources = sorted(f for folder in ("csrc", "csrc/cpu") for f in (tree / folder).glob("*.cpp"))
    command += [f"-isystem{torch.__path__[0]}/include", *map(str, sources)]
    command += [f"-L{torch.__path__[0]}/lib", "-ltorch_cpu", "-o", "selfreg_fast/_C.abi3.so"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")


def pytest(tree: Path, backend: str, tests: str) -> tuple[int, str]:
    """Status and output of tests in a copy, whose package they see, up to the first that fails."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "SELFREG_FAST_"))}
    environment |= {"PYTHONPATH": str(tree), "TRITON_INTERPRET": str(int(backend == "triton"))}
    if backend != "cuda":  # else conftest.py compiles the CUDA sources
        environment["SELFREG_FAST_CUDA_ON_HOST"] = ""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    command += ["--require-backend", backend, *shlex.split(tests.format(backend=backend))]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def in_turn(jobs: int, what: Callable[[int], str], count: int) -> int:
    """what(i), which says "" or what is wrong, for i < count, some at a time; how many were wrong."""
    wrong = 0
    with ThreadPoolExecutor(jobs) as pool:
        for said in pool.map(what, range(count)):
            wrong += bool(said)
            if said:
                print(said, flush=True)
    return wrong


def drill(mutations: Sequence[Mutation], folder: Path, jobs: int) -> int:
    """Prints a line a mutation; returns how many were missed or did not apply."""
    whole = copied(ROOT, folder / "whole")
    build(whole)
    chosen = sorted({(m.backend, m.tests) for m in mutations})

    def control(i: int) -> str:
        status, output = pytest(whole, *chosen[i])
        return "" if status == 0 else f"BROKEN  these fail without any mutation: {chosen[i][1]}\n{output[-3000:]}"

    if in_turn(1, control, len(chosen)):  # one by one: the first of "cuda" compiles for all
        return len(mutations)
    print(f"without any mutation, {len(chosen)} selections of tests pass", flush=True)

    def one(i: int) -> str:
        m, begin = mutations[i], time.monotonic()
        if (count := occurrences(m)) != 1:
            return f"STALE   {m.name}: its text occurs {count} times in {m.file}"
        tree = copied(whole, folder / f"mutant{i}")
        (tree / m.file).write_text((tree / m.file).read_text().replace(m.old, m.new))
        if m.file.startswith("csrc/cpu"):
            build(tree)
        status, output = pytest(tree, m.backend, m.tests)
        shutil.rmtree(tree)
        if status not in (1, -6, -8, -11):  # tests that fail, or a process that a signal ends
            return f"MISSED  {m.name} (pytest: {status})\n{output[-1500:] if status else ''}"
        by = re.search(r"^FAILED (\S+?::\w+)", output, re.M)
        after = f"{time.monotonic() - begin:.0f} s"
        print(f"caught  {m.name}: {by[1] if by else f'the process ends with {status}'} ({after})", flush=True)
        return ""

    return in_turn(jobs, one, len(mutations))


def main() -> int:
    parser = argparse.ArgumentParser(description="The fault drill: tests must fail where the code is broken.")
    parser.add_argument("--only", action="append", metavar="NAME", help="mutations whose name has this in it")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="at a time (one a core)")
    parser.add_argument("--list", action="store_true", help="names alone")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if not args.only or any(name in m.name for name in args.only)]
    if not chosen:
        parser.error(f"no mutation has {args.only} in its name")
    if args.list:
        print(*(m.name for m in chosen), sep="\n")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        missed = drill(chosen, Path(folder), args.jobs)
    print(f"{len(chosen) - missed} of {len(chosen)} mutations caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
