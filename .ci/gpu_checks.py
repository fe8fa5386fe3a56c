"""The checks that need a GPU: build, whole suite, memory and race checker, benchmark. Run by .ci/gpu."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv-gpu"
WHEELS = ROOT / "wheels"
PYTHON = VENV / "bin" / "python"

NEEDED = ("setuptools>=77", "ninja", "pytest>=8", "hypothesis", "numpy", "rich")
WELCOME = ("pytest-xdist", "tqdm", "pillow", "matplotlib", "liger-kernel")  # without: slower, or some tests are skipped

# Steps of one row run side by side; the benchmark has the machine to itself. Seconds each may take.
STEPS: tuple[dict[str, int], ...] = (
    {"build": 200},
    {"tests": 300, "memcheck": 300, "racecheck": 300},
    {"bench": 240},
)
ALL_STEPS = tuple(name for row in STEPS for name in row)
GRACE = 20  # seconds to write a report after an interrupt

Step = dict[str, Any]  # what checks.json says of a step


class Checks:
    """One run: where its files go, and when it must be over."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.end = out, time.monotonic() + seconds
        self.environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}

    def left(self) -> float:
        return self.end - time.monotonic()

    def step(self, name: str, limit: float) -> Step:
        """Runs a step; its commands' output goes to NAME.log. Later commands do not run if one before them fails."""
        limit = min(limit, self.left() - GRACE)
        start, rc, shown = time.monotonic(), 0, []
        with (self.out / f"{name}.log").open("w") as log:
            for command, extra in getattr(self, name)(limit):
                shown.append(shlex.join([*(f"{k}={v}" for k, v in extra.items()), *command]))
                print(f"+ {shown[-1]}", file=log, flush=True)
                seconds = limit - (time.monotonic() - start)
                rc = run(command, {**self.environment, **extra}, log, seconds)
                if rc:
                    break
        step = {"command": " && ".join(shown), "rc": rc, "seconds": round(time.monotonic() - start, 1)}
        print(f"{name}: {'ok' if rc == 0 else f'rc {rc}'}, {step['seconds']} s", flush=True)
        return step

    # A step is a list of (command, environment variables to add).

    def build(self, limit: float) -> list[tuple[list[str], dict[str, str]]]:
        """A virtual environment that sees the packages of this Python, torch among them, and the package in it."""
        pip = [str(PYTHON), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        source = ["--no-index", f"--find-links={WHEELS}"] if WHEELS.is_dir() else []
        this = [sys.executable, __file__]
        commands = [[sys.executable, "-m", "venv", "--without-pip", "--clear", str(VENV)], [*this, "--link"]]
        commands += [[*pip, *source, *NEEDED]]
        # Those that cannot be had stay away, and the others come all the same.
        commands += [["sh", "-c", f"{shlex.join([*pip, *source, name])} || true"] for name in WELCOME]
        built = {"SELFREG_FAST_BUILD": "1", "SELFREG_FAST_CUDA": "1"}
        package = [*pip, "--no-index", "--no-deps", "--no-build-isolation", str(ROOT)]
        return [*((c, {}) for c in commands), (package, built)]

    def tests(self, limit: float) -> list[tuple[list[str], dict[str, str]]]:
        (self.out / "tests.xml").unlink(missing_ok=True)
        # Not `python -m pytest`: see pyproject.toml. Nor its script: the outer Python's pytest has none here.
        command = [str(PYTHON), "-c", "import sys; del sys.path[0]; import pytest; sys.exit(pytest.main())"]
        command += ["--durations=20", f"--junitxml={self.out / 'tests.xml'}"]
        # These compile for minutes, and need no GPU: they are checked wherever there is none.
        command += [f"--ignore=tests/{name}.py" for name in ("test_cuda_build", "test_cuda_on_host")]
        for backend in ("cuda", "triton", "cpu"):
            command += ["--require-backend", backend]
        if has_module("xdist"):
            command += ["-n", str(max(1, min(12, cores() - 3))), "--dist", "worksteal"]
        # Triton compiles every example of hypothesis: fewer of them. The workers are parallel enough.
        return [(command, {"HYPOTHESIS_PROFILE": "gpu", "TORCHINDUCTOR_COMPILE_THREADS": "1"})]

    def memcheck(self, limit: float) -> list[tuple[list[str], dict[str, str]]]:
        return self.sanitizer("memcheck")

    def racecheck(self, limit: float) -> list[tuple[list[str], dict[str, str]]]:
        return self.sanitizer("racecheck")

    def sanitizer(self, tool: str) -> list[tuple[list[str], dict[str, str]]]:
        program = find_tool("compute-sanitizer")
        command = [program, "--tool", tool, "--error-exitcode", "9", str(PYTHON), __file__, "--kernels"]
        # Without torch's cache of memory every tensor is an allocation, beyond whose end nothing else lies.
        return [(command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})]

    def bench(self, limit: float) -> list[tuple[list[str], dict[str, str]]]:
        # Not python -m: that would import ./selfreg_fast, which has no kernels, rather than the installed one. The
        # suite that compiles for long comes last: it may be cut short.
        command = [str(VENV / "bin" / "selfreg-fast"), "bench", "interpolate", "scaling", "loss", "--device", "cuda"]
        command += ["--out", str(self.out / "bench.csv"), "--seconds", str(max(10, int(limit - 40)))]
        return [(command, {"SELFREG_FAST_COMMIT": commit()[0]})]


def run(command: list[str], environment: dict[str, str], log: Any, seconds: float) -> int:
    """The exit status; 124 if it took longer than `seconds` and was interrupted (so that it can still report)."""
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        print(error, file=log)
        return 127
    try:
        return process.wait(max(1, seconds))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            pass
        print(f"\nended after {seconds:.0f} s", file=log)
        return 124
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # and whatever it has left behind
        except ProcessLookupError:
            pass
        process.wait()


def link_packages() -> None:
    """Makes the packages of this Python visible in the virtual environment, and pip with them.

    `--system-site-packages` would show those of the base installation only, where this Python is an environment itself.
    """
    folders = [str(Path(p).resolve()) for p in sys.path if p.endswith("-packages") or (p and Path(p, "torch").is_dir())]
    purelib = next((VENV / "lib").glob("python*/site-packages"))
    lines = [f"import site; site.addsitedir({folder!r})" for folder in dict.fromkeys(folders)]
    (purelib / "outer.pth").write_text("".join(f"{line}\n" for line in lines))
    if not has_module("pip"):
        subprocess.run([str(PYTHON), "-m", "ensurepip"], check=True)


def run_kernels() -> None:
    """Small launches of every shape of the kernels, for compute-sanitizer: few enough for its slowness."""
    import torch

    import selfreg_fast as srf

    generator = torch.Generator().manual_seed(0)

    def exits(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> list[torch.Tensor]:
        layout = torch.channels_last if last else torch.contiguous_format
        made = [torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout) for _ in range(3)]
        return [z.cuda().requires_grad_() for z in made]

    def check(loss: torch.Tensor, inputs: list[torch.Tensor]) -> None:
        for x in (loss, *torch.autograd.grad(loss, inputs, torch.tensor(2.0, dtype=loss.dtype).cuda())):
            assert x.detach().cpu().isfinite().all()

    def case(backend: str, shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
        channels = shape[1]
        labels = torch.randint(channels, (shape[0], *shape[2:]), generator=generator)
        labels[0, 0, 0] = 255
        labels = labels.cuda()
        # The objective as a rule, written forward; then, recomputed backward, all that is rarely asked for.
        inputs = exits(shape, dtype, last)
        check(srf.self_regulation_loss(inputs, labels, temperature=2.0, backend=backend).total, inputs)
        options = {
            "class_weight": torch.rand(channels, generator=generator).cuda(),
            "pixel_weight": torch.rand(labels.shape, generator=generator).cuda(),
            "label_smoothing": 0.1,
            "renormalize": last,
            "temperature": 2.0,
            "backend": backend,
        }
        inputs = exits(shape, dtype, last)
        for more in ({}, {"detach_teacher": False}):
            check(srf.exit_loss_matrix(inputs, labels, teachers=(0, 2), **options, **more).sum(), inputs)

    sizes = ((1, 5, 7), (1, 3, 6), (2, 8, 16))  # accesses of one, two and four pixels
    for channels in (8, 16, 21, 32, 40, 150, 256, 300, 1000, 1100):
        for dtype in (torch.float32, torch.bfloat16):
            for last in (False, True):
                for batch, h, w in sizes if channels < 256 else sizes[::2]:
                    case("cuda", (batch, channels, h, w), dtype, last)
    for dtype in (torch.float16, torch.float64):
        case("cuda", (2, 21, 8, 16), dtype, False)
    for channels, last in ((21, False), (150, True)):
        case("triton", (2, channels, 8, 16), torch.float32, last)
    torch.cuda.synchronize()
    print("all launched")


# ---- what checks.json says -------------------------------------------------------------------------------------------


def commit() -> tuple[str, bool | None]:
    """Commit, and whether the tree differs from it (None: unknown). Copies without git: from SELFREG_FAST_COMMIT."""
    head = ask("git", "rev-parse", "HEAD")
    if not head or ask("git", "rev-parse", "--show-toplevel") != str(ROOT):
        return os.environ.get("SELFREG_FAST_COMMIT", "unknown"), None
    return head, bool(ask("git", "status", "--porcelain"))


def machine() -> dict[str, Any]:
    """The device and the versions of what runs on it."""
    code = (
        "import json, platform, torch; from importlib.util import find_spec; "
        "t = __import__('triton').__version__ if find_spec('triton') else None; "
        "d = torch.cuda.get_device_name() if torch.cuda.is_available() else None; "
        "print(json.dumps({'device': d, 'python': platform.python_version(), 'torch': torch.__version__, "
        "'triton': t, 'cuda': torch.version.cuda}))"
    )
    answer = ask(str(PYTHON if PYTHON.exists() else sys.executable), "-c", code).splitlines()
    found: dict[str, Any] = json.loads(answer[-1]) if answer else {}
    driver = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    nvcc = re.search(r"V([\d.]+)", ask(find_tool("nvcc"), "--version"))
    return {**found, "driver": driver[0] if driver else None, "nvcc": nvcc[1] if nvcc else None}


def read_tests(report: Path) -> dict[str, Any]:
    """Counts and the first failed tests of a JUnit report; no counts where there is none."""
    if not report.exists():
        return {"passed": None, "failed": None, "skipped": None, "errors": None, "failed_tests": []}
    outcomes: dict[str, list[str]] = {"passed": [], "failure": [], "skipped": [], "error": []}
    for case in ET.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case} & set(outcomes)
        kind = next((k for k in ("error", "failure", "skipped") if k in kinds), "passed")
        outcomes[kind].append(f"{case.get('classname')}::{case.get('name')}")
    return {
        "passed": len(outcomes["passed"]),
        "failed": len(outcomes["failure"]),
        "skipped": len(outcomes["skipped"]),
        "errors": len(outcomes["error"]),
        "failed_tests": (outcomes["failure"] + outcomes["error"])[:50],
    }


def read_sanitizer(log: Path) -> int | None:
    """Errors that compute-sanitizer has counted; None where it has not come that far."""
    text = log.read_text(errors="replace") if log.exists() else ""
    found = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    found += re.findall(r"RACECHECK SUMMARY: (\d+) hazard", text)
    return sum(map(int, found)) if found and "all launched" in text else None


# ---- small things ----------------------------------------------------------------------------------------------------


def ask(*command: str) -> str:
    """What a command prints; "" where it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def has_module(name: str) -> bool:
    """Whether the virtual environment has it."""
    return bool(ask(str(PYTHON), "-c", f"import {name}; print(True)"))


def find_tool(name: str) -> str:
    """Where a tool of the CUDA toolkit is."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or next((str(p) for p in (Path(home, "bin", name),) if p.exists()), name)


def cores() -> int:
    return len(os.sched_getaffinity(0))


def main() -> int:
    parser = argparse.ArgumentParser(prog=".ci/gpu", description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT", help="folder for the results")
    parser.add_argument("--steps", nargs="+", choices=ALL_STEPS, default=ALL_STEPS, help="default: all of them")
    parser.add_argument("--seconds", type=float, default=580, help="for all steps together (default: %(default)s)")
    parser.add_argument("--link", action="store_true", help=argparse.SUPPRESS)  # a part of the step build
    parser.add_argument("--kernels", action="store_true", help=argparse.SUPPRESS)  # what memcheck and racecheck run
    args = parser.parse_args()
    if args.link:
        link_packages()
        return 0
    if args.kernels:
        run_kernels()
        return 0
    if args.out is None:
        parser.error("OUT is missing")
    if find_spec("torch") is None:
        parser.error(f"{sys.executable} has no torch; another Python: PYTHON=... .ci/gpu OUT")

    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    checks = Checks(out, args.seconds)
    revision, dirty = commit()
    report: dict[str, Any] = {"commit": revision, "dirty": dirty}
    report |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "steps": {}}
    for row in STEPS:
        asked = {name: limit for name, limit in row.items() if name in args.steps}
        with ThreadPoolExecutor(len(row)) as pool:
            report["steps"] |= dict(zip(asked, pool.map(checks.step, asked, asked.values()), strict=True))
        if "build" in row:
            report |= machine()
        if "tests" in asked:
            report["tests"] = read_tests(out / "tests.xml")
        tools = [tool for tool in ("memcheck", "racecheck") if tool in asked]
        if tools:
            report["sanitizer_errors"] = {tool: read_sanitizer(out / f"{tool}.log") for tool in tools}
        (out / "checks.json").write_text(json.dumps(report, indent=2) + "\n")

    # A sanitizer that has counted nothing (None) has not done its work.
    sanitized: dict[str, int | None] = report.get("sanitizer_errors", {})
    failed = [name for name, step in report["steps"].items() if step["rc"] or sanitized.get(name, 0) != 0]
    for name in failed:
        lines = (out / f"{name}.log").read_text(errors="replace").splitlines()
        print(f"\n---- the end of {name}.log", *lines[-15:], sep="\n")
    print(f"\n{report.get('device')}, torch {report.get('torch')}, commit {revision}")
    if tests := report.get("tests"):
        print(*(f"FAILED {name}" for name in tests["failed_tests"]), sep="\n")
        print("tests: " + ", ".join(f"{tests[k]} {k}" for k in ("passed", "failed", "skipped", "errors")))
    print(*(f"{tool}: {errors} errors" for tool, errors in sanitized.items()), sep="\n")
    print("failed steps: " + ", ".join(failed) if failed else "all steps passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
