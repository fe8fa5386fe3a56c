"""The commands: each does what its help says, on something small, and its exit status tells how it went."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import selfreg_fast as srf
from selfreg_fast.__main__ import COMMANDS, main

for extra in ("matplotlib", "rich", "tqdm"):
    pytest.importorskip(extra, reason="an extra of the commands")
Image = pytest.importorskip("PIL.Image", reason="an extra of the commands")
gradcheck = pytest.importorskip("selfreg_fast.commands.gradcheck")
demo = importlib.import_module("selfreg_fast.commands.demo")


def test_info_says_what_there_is(tmp_path: Path) -> None:
    """As `python -m selfreg_fast info`: the version and the state of every backend, word for word."""
    run = subprocess.run(
        [sys.executable, "-m", "selfreg_fast", "info"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    words = " ".join(run.stdout.split())
    assert srf.__version__ in words
    for name, state in srf.backends().items():
        assert name in words and " ".join(state.split()) in words


@pytest.mark.parametrize("argv", [["--help"], *[[name, "--help"] for name in COMMANDS]], ids=" ".join)
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Every command explains itself."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0
    assert "usage: selfreg-fast" in capsys.readouterr().out


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    """All of it, with every command, and status 0."""
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out and summary[:30] in out for name, summary in COMMANDS.items())


def test_help_needs_no_extra(tmp_path: Path) -> None:
    """With torch alone every command explains itself; one that needs more says so when it runs."""
    program = """
import sys
from selfreg_fast.__main__ import COMMANDS, EXTRAS, main
sys.modules.update(dict.fromkeys(EXTRAS))  # so that importing them fails
for name in COMMANDS:
    try:
        main([name, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
for argv in (["bench", "--list"], ["gradcheck"], ["demo"]):
    assert main(argv) == 2
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("usage: selfreg-fast") == len(COMMANDS)
    assert run.stderr.count('pip install "selfreg-fast[demo]"') == 3


@pytest.mark.parametrize("argv", [["info"], ["info", "--help"], [], ["bench", "--list"]], ids=" ".join)
def test_a_reader_that_has_gone_ends_it(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As `| head` may: the status of SIGPIPE, and nothing left to write when the interpreter exits."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:  # closing it would fail if it still were that pipe
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(argv) == 141
        print("more")


@pytest.mark.parametrize(
    "argv", [["train"], ["bench", "--repeats", "0"], ["demo", "--steps", "x"], ["gradcheck", "--backends", "gpu"]]
)
def test_what_makes_no_sense_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2 and a usage line, before anything runs."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: selfreg-fast" in capsys.readouterr().err


def test_gradcheck_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """Status 0, and a row for every loss; as many when quick."""
    available = "cpu" if srf.backends()["cpu"] == "available" else "reference"
    assert main(["gradcheck", "--backends", available]) == 0
    out = capsys.readouterr().out
    assert main(["gradcheck", "--backends", available, "--quick"]) == 0
    assert capsys.readouterr().out.count("PASS") == out.count("PASS")
    assert "PASS" in out and "FAIL" not in out
    for name in ("sr_f_loss", "sr_l_loss", "mea_loss", "self_regulation_loss", "exit_loss_matrix"):
        assert name in out


def test_gradcheck_fails_where_a_gradient_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 1: the command compares with finite differences, not with itself."""
    few = list(gradcheck.cases())[:6]
    monkeypatch.setattr(gradcheck, "cases", lambda: few)
    right = srf.reference.soft_cross_entropy

    def wrong(student, teacher, **options):  # type: ignore[no-untyped-def]
        loss = right(student, teacher, **options)
        return loss + 1e-3 * (loss - loss.detach())

    monkeypatch.setattr(srf.reference, "soft_cross_entropy", wrong)
    for quick in ([], ["--quick"]):
        assert main(["gradcheck", "--backends", "reference", *quick]) == 1
        assert "FAIL" in capsys.readouterr().out


def test_bench_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table, and a CSV file with one line for each peer."""
    assert main(["bench", "--cases", "sr-f-features", "--repeats", "1", "--out", str(tmp_path / "bench.csv")]) == 0
    assert "sr-f-features" in capsys.readouterr().out
    header, *lines = (tmp_path / "bench.csv").read_text().splitlines()
    assert {"peer", "both_ms", "peak_bytes", "dtype", "torch"} <= set(header.split(","))
    assert len(lines) >= 3


def make_folder(root: Path, void: int) -> None:
    """Images of noise, with four classes and void."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for i in range(3):
            labels = rng.integers(0, 4, (48, 64), dtype=np.uint8)
            labels[:4] = void
            noise = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / split / f"images/{i}.png")
            Image.fromarray(labels).save(root / split / f"labels/{i}.png")


def test_demo_trains_on_a_folder_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps: per-exit figures and a picture."""
    make_folder(tmp_path, void=255)
    picture = tmp_path / "demo.png"
    arguments = ["--data", str(tmp_path), "--output", str(picture), "--steps", "2", "--batch-size", "2"]
    assert main(["demo", *arguments]) == 0
    out = capsys.readouterr().out
    assert "MEA" in out and "SR-F" in out and "SR-L" in out and "exit" in out
    assert "labels 0-3, 255: 4 classes are trained, void is label 255, 8.3 %" in out and "note:" not in out
    assert min(Image.open(picture).size) > 100


def test_demo_tells_what_it_takes_for_void(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no pixel has that label, a note with the option that names another."""
    make_folder(tmp_path, void=4)
    monkeypatch.setattr(demo, "_train", lambda *_: None)
    arguments = ["demo", "--data", str(tmp_path), "--output", str(tmp_path / "demo.png"), "--ignore-index"]
    told = []
    for label in ("255", "4", "0"):
        assert main([*arguments, label]) == 0
        told.append(capsys.readouterr().out)
    assert "labels 0-4: 5 classes are trained, void is label 255, 0.0 %" in told[0]
    assert "note: " in told[0] and "--ignore-index 4" in told[0]
    assert "labels 0-4: 4 classes are trained, void is label 4, 8.3 %" in told[1] and "note:" not in told[1]
    assert "5 classes are trained (4 of them occur), void is label 0" in told[2] and "note:" not in told[2]


def test_demo_names_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A message with the path, not a traceback."""
    try:
        status = main(["demo", "--data", str(tmp_path / "nowhere"), "--output", str(tmp_path / "demo.png")])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    assert status != 0
    assert "nowhere" in capsys.readouterr().err
