"""`.ci/gpu` without a GPU: a rehearsal of it, what it makes of what tools find, and its files when it is killed."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import on_host
import pytest
import torch
from on_gpu import ROOT, install, ncu, sanitize
from on_gpu.__main__ import BUDGET, Report

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: .ci/gpu itself tells more")
GPU = [str(ROOT / ".ci" / "gpu"), "--rehearse"]


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    """A rehearsal."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")} | {"PYTHON": sys.executable}
    command = [*GPU, str(out), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def whole(out: Path) -> dict[str, Any]:
    """Reads every file of a run, and fails where one is cut off; returns checks.json."""
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert names <= {"report.txt", "output.log", "checks.json", "bench.csv", "counters.csv", "tests.xml"}
    for name in names & {"bench.csv", "counters.csv"}:
        with (out / name).open(newline="") as file:
            assert all(None not in row.values() and None not in row for row in csv.DictReader(file))
    if "tests.xml" in names:
        ET.parse(out / "tests.xml")
    checks: dict[str, Any] = json.loads((out / "checks.json").read_text()) if "checks.json" in names else {}
    return checks


@pytest.mark.long
def test_a_rehearsal(tmp_path: Path) -> None:
    """A part of it, stage by stage; `.ci/gpu --rehearse OUT` is all of it. What it finds can be read."""
    out = tmp_path / "out"
    process = start(out, "--stages", "install", "sanitizers", "timing", "counters")
    report, _ = process.communicate(timeout=900)
    assert process.returncode == 0, report
    assert (out / "report.txt").read_text() == report and "all stages passed" in report
    checks = whole(out)
    assert checks["rehearsal"] and {s["state"] for s in checks["stages"].values()} == {"passed"}
    assert {"bench.csv", "counters.csv", "checks.json"} <= {path.name for path in out.iterdir()}
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        (check,) = [c for c in checks["stages"]["sanitizers"]["checks"] if c["name"] == f"{tool}, cuda"]
        assert check["cases"] > 10

    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_results.py"), str(out)]
    told = subprocess.run([*command, "--print"], capture_output=True, text=True)
    assert told.returncode == 0 and "objective, 5 exits" in told.stdout, told.stderr
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1 and "it is a rehearsal" in refused.stdout


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """By SIGKILL, after the first case: files are whole; and where its own limit ends it."""
    out = tmp_path / "killed"
    process = start(out, "--stages", "install", "cases")
    for _ in range(6000):
        checks = whole(out) if out.exists() else {}
        if checks.get("stages", {}).get("cases", {}).get("checks"):
            break
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    checks = whole(out)
    assert checks["stages"]["install"]["state"] == "passed" and checks["stages"]["cases"]["state"] == "running"

    out = tmp_path / "late"
    process = start(out, "--stages", "cases", "timing", "--budget", "1")
    report, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "install: out of time" in report and "cases: not run, timing: not run" in report
    assert whole(out)["stages"]["install"]["state"] == "out of time"


def test_files_are_whole_after_every_line(tmp_path: Path) -> None:
    """Checks, rows and tests as they come, among lines that mean nothing."""
    report = Report(tmp_path, {"commit": "abc", "device": "a device", "torch": "2.0"}, 0)
    report.checks["stages"]["s"] = {"checks": []}
    rows = {"bench": {"case": "a, b", "ms": 1.0}, "counter": {"case": "x", "value": 2}}
    lines = [f"@{kind} {json.dumps(row)}" for kind, row in rows.items()] * 2
    lines += ["@check " + json.dumps({"name": "c", "passed": True}), "# told", "noise", ""]
    lines += ["@check {} and what another program printed", "@triton.jit", '@bench {"other": 1}']
    test = {"name": "f.py::t", "outcome": "failed", "seconds": 1, "text": "E\x1b[31m wrong"}
    lines += ["@test " + json.dumps(test), "@test " + json.dumps({**test, "outcome": "passed"})]
    for line in lines:
        report.heard("s", "program", line)
        whole(tmp_path)
    assert whole(tmp_path)["stages"]["s"]["checks"] == [{"name": "c", "passed": True}]
    assert (tmp_path / "bench.csv").read_text() == 'case,ms\n"a, b",1.0\n"a, b",1.0\n'
    assert (tmp_path / "counters.csv").read_text().splitlines()[1] == "abc,a device,2.0,x,2"
    assert len(ET.parse(tmp_path / "tests.xml").getroot()) == 2
    assert (tmp_path / "report.txt").read_text() == "   told\n" and "noise" in (tmp_path / "output.log").read_text()


def test_a_wheel_of_these_sources_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever builds and imports leave among them, which does not travel; and a changed one is noticed."""
    for folder in ("csrc/cuda", "csrc/__pycache__", "selfreg_fast"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("csrc/cuda/x.cu", "selfreg_fast/a.py", "setup.py", "pyproject.toml"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "PACKED", tmp_path / "packed.json")
    (tmp_path / "packed.json").write_text(json.dumps({"commit": "abc", "sources": install.sources()}))
    for name in ("csrc/__pycache__/toolchain.cpython-311.pyc", "selfreg_fast/_C.abi3.so", "selfreg_fast/_build.json"):
        (tmp_path / name).write_text(name)
    assert install.packed()["commit"] == "abc"
    (tmp_path / "csrc/cuda/x.cu").write_text("changed")
    assert install.packed() == {}


def test_all_stages_fit_into_ten_minutes() -> None:
    """With the start of the machine and the transfers beside them."""
    assert BUDGET == 580


# ------------------------------------------------------------------------------------------ what is run on a GPU

LAUNCHED = """
import ctypes, json, sys
from on_gpu import cases
sys.argv[1:] = ["cuda"]
status = cases.main()
launched = ctypes.CDLL(sys.argv[0]).cuda_on_host_launched
launched.restype = ctypes.c_size_t
kernels = (ctypes.c_void_p * 1000)()
count = launched(kernels, 1000)
print(json.dumps([status, ctypes.cast(launched, ctypes.c_void_p).value, kernels[:count]]))
"""


def test_the_cases_are_right_and_reach_every_kernel(tmp_path: Path) -> None:
    """Each shape of csrc/cuda's kernels, in one dtype or another, as the symbols of what is compiled name them."""
    library = on_host.build()
    environment = {**os.environ, "SELFREG_FAST_CUDA_ON_HOST": str(library), "SELFREG_REHEARSAL": "1"}
    environment["PYTHONPATH"] = str(ROOT / "tests")
    code = LAUNCHED.replace("sys.argv[0]", repr(str(library)))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    status, here, kernels = json.loads(done.stdout.splitlines()[-1])
    assert status == 0, done.stdout
    symbols = subprocess.run(["nm", "-C", "--defined-only", str(library)], capture_output=True, text=True).stdout
    names = {int(at, 16): name for at, _, name in (line.split(" ", 2) for line in symbols.splitlines())}
    base = here - next(at for at, name in names.items() if name == "cuda_on_host_launched")
    reached = {_shape(names.get(kernel - base, "")) for kernel in kernels} | {None}
    missing = {_shape(name) for name in names.values()} - reached
    assert len(reached) > 40 and not missing, missing


def _shape(symbol: str) -> str | None:
    """What a kernel is an instance of, without its dtype."""
    kernel = re.match(r"void selfreg::(?:\(anonymous namespace\)::)?(\w+_kernel)<(.*)>\(", symbol)
    if not kernel or kernel[1] == "launch_kernel":  # which calls one
        return None
    return kernel[1] + re.sub(r"\b(?:float|double|__half|__nv_bfloat16)\b,? ?", "", kernel[2])


# ------------------------------------------------------------------------------------------ what tools say

KERNEL = "selfreg::(anonymous namespace)::full_size_kernel<selfreg::Planes<float, 22, 2>>(selfreg::FullSizeArgs)"
SANITIZED = {
    "ours": f"""
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at {KERNEL}+0x1a0
=========     by thread (3,0,0) in block (0,0,0)
=========     Address 0x7f0 is out of bounds
=========
========= ERROR SUMMARY: 1 error
""",
    "race": f"""
========= Error: Race reported between Write access at {KERNEL}+0x1a0
=========     and Read access at {KERNEL}+0x2b0 [128 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
""",
    "torch": """
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<4, float>(int, float)+0x90
=========
========= ERROR SUMMARY: 1 error
""",
    "none": "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n",
    "broken": "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the guide\n",
}


@pytest.mark.parametrize(
    ("said", "status", "passed", "findings"),
    [
        ("ours", 9, False, 1),
        ("race", 9, False, 1),
        ("torch", 9, True, 0),
        ("none", 0, True, 0),
        ("broken", 1, False, 0),
    ],
)
def test_what_a_sanitizer_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: str, status: int,
    passed: bool, findings: int,
) -> None:  # fmt: skip
    """A finding in our kernels fails; one in torch's is told; a tool that does not work has not found nothing."""
    program = tmp_path / "compute-sanitizer"
    cases = "" if said == "broken" else "echo '@check {}'"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{SANITIZED[said]}END\n{cases}\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sys, "argv", ["sanitize", "memcheck", "cuda"])
    assert sanitize.main() == int(not passed)
    printed = capsys.readouterr().out
    (check,) = [json.loads(line[7:]) for line in printed.splitlines() if line.startswith('@check {"name')]
    assert (check["passed"], check["findings"]) == (passed, findings)
    assert said != "broken" or "Device not supported" in printed


def test_what_ncu_counts_is_read() -> None:
    """Rows of several kernels, with numbers as people write them, among other lines."""
    head = '"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'

    def row(number: int, metric: str, value: str) -> str:
        return f'"{number}","7","full_size_kernel","Command line profiler metrics","{metric}","ns","{value}"'

    lines = [
        "==PROF== Profiling",
        head,
        row(0, "a", "1,234,567"),
        row(0, "b", "0.5"),
        row(1, "a", "7"),
        "==PROF== Done",
    ]
    first, second = ncu.read(lines)
    assert first["a"] == ("ns", "1234567") and first["b"] == ("ns", "0.5") and second["a"] == ("ns", "7")
    assert ncu.read(["==ERROR== nothing"]) == []
