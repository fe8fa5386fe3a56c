"""Ten minutes on a GPU that tell everything: builds, checks and measures selfreg_fast, what tells most first.

Files in OUT, which are whole whenever this is killed: report.txt, what is printed here, for people; checks.json, what
passed and what did not; bench.csv and counters.csv, times and hardware counters; tests.xml, outcomes of tests;
output.log, all that the programs printed. Exit status: 0 where all stages passed. See .ci/README.md.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import importlib.util
import json
import os
import selectors
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any, NamedTuple

from . import ROOT, install

Record = dict[str, Any]


class Stage(NamedTuple):
    """Programs, modules of this package with their arguments. Those of one row run side by side."""

    seconds: int
    title: str
    rows: tuple[tuple[str, ...], ...]


TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
PARTS = min(12, len(os.sched_getaffinity(0)))  # processes that go through cases: the processor has much to do for them


def _in_parts(backend: str) -> tuple[str, ...]:
    return tuple(f"cases {backend} --part {k}/{PARTS}" for k in range(1, PARTS + 1))


# What each may take, in the order in which they tell most; what one leaves, the next ones have. In all: BUDGET.
STAGES = {
    "install": Stage(
        60, "the package, and one call of each dtype and layout", (("install SITE",), ("cases cuda --first",))
    ),
    "cases": Stage(45, "every way through the CUDA kernels, against float64", (_in_parts("cuda"),)),
    "sanitizers": Stage(
        95, "memory, races, barriers, uninitialised reads", (tuple(f"sanitize {tool} cuda" for tool in TOOLS),)
    ),
    "timing": Stage(105, "times of the README's cases", (("timing eager",),)),
    "counters": Stage(75, "what the main kernels do", (("ncu",), ("counters cuda",))),
    "tests": Stage(60, "tests/test_on_gpu.py, CUDA", (("run_tests cuda",),)),
    "triton": Stage(
        100,
        "Triton's kernels: cases, times, tests, memory",
        (
            _in_parts("triton"),
            ("timing triton",),
            ("counters triton",),
            ("run_tests triton", "sanitize memcheck triton"),
        ),
    ),
    "compiled": Stage(40, "times of torch.compile", (("timing compiled",),)),
}
BUDGET = sum(stage.seconds for stage in STAGES.values())
BUILDING = 240  # seconds for the first stage where there is no wheel


class Report:
    """The files in OUT. Only this process writes them: a line at a time, or whole and renamed."""

    def __init__(self, out: Path, about: Record, begin: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.begin = out, begin
        for name in ("bench.csv", "counters.csv", "tests.xml"):
            (out / name).unlink(missing_ok=True)
        self.text, self.log = (out / "report.txt").open("w"), (out / "output.log").open("w")
        self.checks: Record = {**about, "stages": {}}
        self.tests = ET.Element("testsuite", name="on_gpu")
        self.tables: dict[str, tuple[IO[str], Any]] = {}

    def say(self, line: str = "") -> None:
        for file in (sys.stdout, self.text):
            print(line, file=file, flush=True)

    def heard(self, stage: str, program: str, line: str) -> None:
        """A line that a program printed."""
        if line.startswith("# "):
            self.say(f"   {line[2:]}")
        if not line.startswith("@"):
            if line.strip():
                print(f"{time.monotonic() - self.begin:6.1f} {program}: {line}", file=self.log, flush=True)
            return
        kind, _, text = line[1:].partition(" ")
        try:
            record = json.loads(text)
            if kind == "check":
                self.checks["stages"][stage]["checks"].append(record)
                self.write_checks()
            elif kind == "test":
                self.add_test(record)
            else:
                self.add_row(kind, record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # what another program printed into it
            print(f"{program}: {line}\n{type(error).__name__}: {error}", file=self.log, flush=True)

    def write_checks(self) -> None:
        _replace(self.out / "checks.json", json.dumps(self.checks, indent=1) + "\n")

    def add_row(self, kind: str, record: Record) -> None:
        if kind == "counter":
            record = {key: self.checks.get(key) for key in ("commit", "device", "torch")} | record
            kind = "counters"
        if kind not in ("bench", "counters"):
            raise ValueError(f"there is no table of {kind}")
        if kind not in self.tables:
            file = (self.out / f"{kind}.csv").open("w", newline="")
            self.tables[kind] = file, csv.DictWriter(file, list(record), lineterminator="\n")
            self.tables[kind][1].writeheader()
        file, writer = self.tables[kind]
        writer.writerow(record)
        file.flush()

    def add_test(self, record: Record) -> None:
        name, _, test = record["name"].partition("::")
        case = ET.SubElement(self.tests, "testcase", classname=name, name=test, time=str(record["seconds"]))
        if record["outcome"] != "passed":
            kind = "failure" if record["outcome"] == "failed" else "skipped"
            text = "".join(c for c in record["text"] if c.isprintable() or c == "\n")
            ET.SubElement(case, kind, message=text.splitlines()[-1] if text else "").text = text
        self.tests.set("tests", str(len(self.tests)))
        _replace(self.out / "tests.xml", ET.tostring(self.tests, encoding="unicode"))


def _replace(path: Path, text: str) -> None:
    """Writes a file that is whole at any moment."""
    new = path.with_name(f".{path.name}")
    new.write_text(text)
    new.replace(path)


# ---- running ---------------------------------------------------------------------------------------------------------


class Runner:
    def __init__(self, report: Report, site: Path, seconds: float, rehearsal: bool) -> None:
        self.report, self.site, self.end = report, site, report.begin + seconds
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        before = os.environ.get("PYTHONPATH")
        # The installed package comes before the source tree, which has no kernels but holds `benchmarks`.
        self.environment["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, (site, ROOT / "tests", ROOT, before))))
        self.environment["SELFREG_FAST_COMMIT"] = report.checks["commit"][:12]
        if rehearsal:
            tools = Path(__file__).parent / "stand_ins"
            self.environment |= {"SELFREG_REHEARSAL": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
            self.environment |= {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "2"}
        elif (home := Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))).joinpath("bin") not in map(
            Path, os.environ["PATH"].split(os.pathsep)
        ):
            self.environment["PATH"] = f"{os.environ['PATH']}{os.pathsep}{home / 'bin'}"

    def run(self, name: str, stage: Stage, seconds: float) -> str:
        """A stage, row after row; its state: "passed", "failed", or "out of time"."""
        end, states = min(time.monotonic() + seconds, self.end), []
        for number, row in enumerate(stage.rows, 1):
            now = time.monotonic()
            if "failed" in states and name == "install":
                break
            if now >= end:
                self.report.say(f"   not run: {', '.join(row)}")
                states.append("out of time")
                continue
            # A row leaves the others half of what there is.
            states.append(self.row(name, row, end if number == len(stage.rows) else now + (end - now) / 2))
        return next((s for s in ("failed", "out of time") if s in states), "passed")

    def row(self, stage: str, programs: tuple[str, ...], end: float) -> str:
        """Runs programs side by side and listens to all of them."""
        running, states, started = selectors.DefaultSelector(), [], []
        for program in programs:
            command = [sys.executable, "-m", *shlex.split(f"on_gpu.{program.replace('SITE', str(self.site))}")]
            process = subprocess.Popen(
                command, cwd=self.report.out, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip
            started.append(process)
            running.register(process.stdout, selectors.EVENT_READ, (program, process, bytearray()))
        try:
            while running.get_map() and (left := end - time.monotonic()) > 0:
                ready = {key.fd for key, _ in running.select(min(left, 1))}
                for key in list(running.get_map().values()):
                    program, process, rest = key.data
                    read = b""
                    if key.fd in ready:
                        read = os.read(key.fd, 1 << 16)
                        rest += read
                        *lines, rest[:] = rest.split(b"\n")
                        for line in lines + ([bytes(rest)] if not read else []):
                            self.report.heard(stage, program, line.decode(errors="replace"))
                    # It is over when it is silent and has ended: what it started may keep its output open.
                    if not read and (key.fd in ready or process.poll() is not None):
                        running.unregister(key.fileobj)
                        states.append(self.ended(program, process.wait()))
            for key in running.get_map().values():
                self.report.say(f"   {key.data[0]}: not through when its time was over; what it found stands")
                states.append("out of time")
        finally:
            for process in started:
                try:
                    os.killpg(process.pid, signal.SIGKILL)  # and whatever it has left behind
                except ProcessLookupError:
                    pass
                process.wait()
        return next((s for s in ("failed", "out of time") if s in states), "passed")

    def ended(self, program: str, status: int) -> str:
        if status not in (0, 1):  # 1: it has said what failed
            self.report.say(f"   {program}: ended with status {status}; see output.log")
        return "passed" if status == 0 else "failed"


def _die_with_parent() -> None:
    """Linux ends this process when the one that started it dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


# ---- what is known before --------------------------------------------------------------------------------------------


def ask(*command: str) -> str:
    """What a command prints; "" where it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def about(rehearsal: bool) -> Record:
    """Commit, machine and versions, for the head of checks.json."""
    head = ask("git", "rev-parse", "HEAD") if (ROOT / ".git").exists() else ""
    dirty: bool | None = bool(ask("git", "status", "--porcelain")) if head else None
    if not head and (packed := install.packed()):  # a copy without git, of sources that are known
        head, dirty = packed["commit"], packed["dirty"]
    code = (
        "import json, platform, torch; from importlib.util import find_spec as f; c = torch.cuda.is_available(); "
        "print(json.dumps({'device': torch.cuda.get_device_name() if c else None, 'python': platform.python_version(), "
        "'torch': torch.__version__, 'cuda': torch.version.cuda, "
        "'triton': __import__('triton').__version__ if f('triton') else None}))"
    )
    found: Record = {"device": None}
    found |= json.loads((ask(sys.executable, "-c", code).splitlines() or ["{}"])[-1])
    if rehearsal:
        found["device"] = "no GPU: a rehearsal"
    driver = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"commit": head or "unknown", "dirty": dirty, "date": date, "rehearsal": rehearsal, **found,
            "driver": driver[0] if driver else None}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=".ci/gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder for the results")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help=", ".join(STAGES)
    )
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="in all; default: %(default)s")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: see .ci/README.md")
    options = parser.parse_args()
    begin = time.monotonic()
    if importlib.util.find_spec("torch") is None:
        parser.error(f"{sys.executable} has no torch; another Python: PYTHON=... .ci/gpu OUT")
    stages = {name: stage for name, stage in STAGES.items() if name in options.stages or name == "install"}
    report = Report(options.out.resolve(), about(options.rehearse), begin)
    head = report.checks
    report.say(f"selfreg_fast at commit {head['commit']}{' with changes' if head['dirty'] else ''}, {head['date']}")
    report.say(f"{head['device']}, torch {head.get('torch')}, triton {head.get('triton')}, driver {head['driver']}")
    if options.rehearse:
        report.say(
            "The CUDA kernels run on the CPU, Triton's in its interpreter, and NVIDIA's tools are stand-ins that find"
        )
        report.say("nothing and count what they like: this is about the programs, and its times mean nothing.")
    report.say(f"{options.budget:.0f} seconds for {len(stages)} stages; all output is in output.log")
    if not options.rehearse and head["device"] is None:
        report.say("torch sees no CUDA device: nothing to do (a rehearsal: --rehearse)")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as site:
        return run(report, Path(site), stages, options)


def run(report: Report, site: Path, stages: dict[str, Stage], options: argparse.Namespace) -> int:
    """The stages, one after the other."""
    runner = Runner(report, site, options.budget, options.rehearse)
    states, scale, saved = report.checks["stages"], options.budget / BUDGET, 0.0
    if options.rehearse:
        sys.path.insert(0, str(ROOT / "tests"))
        import on_host

        report.say("the CUDA kernels, compiled for the CPU: some minutes, unless they have been")
        runner.environment["SELFREG_FAST_CUDA_ON_HOST"] = str(on_host.build())
    for number, (name, stage) in enumerate(stages.items(), 1):
        own = stage.seconds * scale
        limit = own + max(0.0, saved)
        if name == "install" and not install.packed():  # the last stages will have less
            limit = BUILDING
        report.say(f"\n{number} {name}: {stage.title} (up to {limit:.0f} s)")
        states[name] = {"state": "running", "limit": round(limit, 1), "checks": []}
        report.write_checks()
        begin = time.monotonic()
        state = runner.run(name, stage, limit)
        taken = time.monotonic() - begin
        saved += own - taken
        states[name] |= {"state": state, "seconds": round(taken, 1)}
        report.write_checks()
        report.say(f"   {state}, {taken:.0f} s")
        if name == "install" and state != "passed":
            report.say("\nwithout the package there is nothing to go on with. All that was printed:\n")
            report.say((report.out / "output.log").read_text())
            break
    bad = {name: states[name]["state"] for name in stages if name in states and states[name]["state"] != "passed"}
    bad |= {name: "not run" for name in stages if name not in states}
    report.say("\n" + (", ".join(f"{name}: {state}" for name, state in bad.items()) or "all stages passed"))
    report.say(f"{time.monotonic() - report.begin:.0f} s in all. Next: python benchmarks/gpu_results.py {options.out}")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
