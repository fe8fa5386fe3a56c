"""The commands: each does what its help says, on something small, and its exit status tells how it went."""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import selfreg_fast as srf
from selfreg_fast.__main__ import COMMANDS, main
from selfreg_fast.commands import info
from selfreg_fast.commands.measure import Timing
from selfreg_fast.commands.words import compared

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


def leaves(facts: Any) -> Iterator[Any]:
    """What is in an object of JSON, but its keys."""
    for value in facts.values() if isinstance(facts, dict) else facts:
        yield from leaves(value) if isinstance(value, (dict, list)) else [value]


def info_in_both_forms(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert main(["info"]) == 0
    return facts, capsys.readouterr().out


def test_info_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One object and nothing else; keys to rely on, and the facts of the text."""
    monkeypatch.setenv("SELFREG_FAST_MADE_UP", "for a test")
    monkeypatch.setenv("SELFREG_FAST_EMPTY", "")
    facts, text = info_in_both_forms(capsys)
    assert list(facts) == ["path", "versions", "devices", "backends", "build", "environment"]
    assert list(facts["versions"]) == ["selfreg_fast", "torch", "cuda", "python", "python_implementation", "system"]
    assert list(facts["devices"]) == ["cpu", "gpus"]
    assert list(facts["devices"]["cpu"]) == ["name", "threads", "cores", "instructions", "torch_instructions"]
    states = {name: state["reason"] or "available" for name, state in facts["backends"].items()}
    assert states == srf.backends()
    assert all(state["available"] is (state["reason"] is None) for state in facts["backends"].values())
    assert facts["versions"]["selfreg_fast"] == srf.__version__
    assert facts["environment"]["SELFREG_FAST_MADE_UP"] == "for a test"
    assert "SELFREG_FAST_EMPTY" not in facts["environment"]
    facts["devices"].pop("gpus")  # whose memory is bytes here, and GiB there
    for fact in leaves(facts):
        assert fact is None or str(fact) in text or isinstance(fact, bool)


def test_info_of_gpus_and_without_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A machine unlike most that run this: the same keys, and what there is not is null."""
    gpu = SimpleNamespace(name="Made-up GPU", major=9, minor=0, total_memory=80 * 2**30)
    states = dict.fromkeys(srf.backends(), "made up")
    monkeypatch.setattr(info, "backends", lambda: states)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.version, "cuda", "13.1")
    monkeypatch.setattr(info, "CPU_KERNELS", False)
    monkeypatch.setattr(info, "build_record", dict)
    facts, text = info_in_both_forms(capsys)
    assert facts["devices"]["gpus"] == 2 * [{"name": "Made-up GPU", "arch": "sm_90", "memory_bytes": 80 * 2**30}]
    assert re.search(r"cuda:1 +Made-up GPU, sm_90, 80 GiB, CUDA 13.1\n", text)
    assert facts["devices"]["cpu"]["instructions"] is None and "instructions" not in text
    assert facts["build"] is None and "this copy was not installed" in text
    assert {"available": False, "reason": "made up"} == facts["backends"]["cpu"]


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
    assert run.stderr.count("pip install matplotlib numpy pillow rich tqdm") == 3


@pytest.mark.parametrize(
    "argv", [["info"], ["info", "--json"], ["info", "--help"], [], ["bench", "--list"]], ids=" ".join
)
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
    """A table, a CSV file with one line for each peer, and at the end what they say in words."""
    assert main(["bench", "--cases", "sr-f-features", "--repeats", "1", "--out", str(tmp_path / "bench.csv")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "sr-f-features" in out
    with (tmp_path / "bench.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["both_ms"]]
    assert {"peer", "both_ms", "peak_bytes", "dtype", "torch"} <= set(lines[0])
    assert len(lines) >= 2
    said = out[out.rindex(f"On {lines[0]['device']}") :]
    if not any(line["peer"] == "fused" for line in lines):
        assert "the fused loss" in said
        return
    plain = [line for line in lines if line["peer"] in ("as written", "tuned")]
    fastest = min(plain, key=lambda line: float(line["both_ms"]))
    faster = compared([float(fastest["times_fused"])], "less time", "more time")
    assert f'took {faster} than the fastest plain PyTorch in the case sr-f-features ("{fastest["peer"]}")' in said


@pytest.mark.parametrize(
    ("multiples", "words"),
    [
        ([3.14], "3.1 times faster"),
        ([1.04], "no faster"),
        ([0.96], "no faster"),
        ([0.5], "2.0 times slower"),
        ([123.4], "123 times faster"),
        ([2, 8, 3], "between 2.0 and 8.0 times faster (median 3.0)"),
        ([0.5, 0.8, 0.25], "between 1.2 and 4.0 times slower (median 2.0)"),
        ([0.5, 4, 2], "between 2.0 times slower and 4.0 times faster (median: 2.0 times faster)"),
        ([1, 2, 4], "between no faster and 4.0 times faster (median: 2.0 times faster)"),
        ([2.01, 2.02], "2.0 times faster"),
    ],
)
def test_multiples_in_words(multiples: list[float], words: str) -> None:
    """Better, worse, neither, and a range of them."""
    assert compared(multiples, "faster", "slower") == words


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
    *table, said = " ".join(out.split()).partition("In 2 steps of 2 images")
    *means, deepest = re.findall(r"mean ((?:[\d.]+ ?)+)", re.sub(r"[^\w.]+", " ", table[0]))[0].split()
    assert f" of {', '.join(means)} and {deepest} %." in said
    for milliseconds in re.findall(r"took ([\d.]+) ms", said):
        assert milliseconds in table[0]


def cost(milliseconds: float, mib: float | None) -> Any:
    seconds = milliseconds / 1e3
    return demo.Cost(Timing(seconds, seconds, seconds), None if mib is None else int(mib * 2**20))


@pytest.mark.parametrize(
    ("fused", "words"),
    [
        ((4.0, 2.0), "took 4.0 ms and 2.0 MiB for the last batch, "),
        ((4.0, 2.0), "took 40.0 ms and 50.0 MiB: it was 10.0 times faster and took 25.0 times less memory than plain"),
        ((40.5, 50.5), "it was no faster and took no less memory than plain PyTorch."),
        ((80.0, 100.0), "it was 2.0 times slower and took 2.0 times more memory than plain PyTorch."),
        ((4.0, None), "took 4.0 ms for the last batch"),
        ((4.0, None), "it was 10.0 times faster than plain PyTorch."),
    ],
)
def test_demo_in_words(fused: tuple[float, float | None], words: str) -> None:
    """What follows from the figures, the unwelcome too."""
    costs = {"cpu": cost(*fused), "reference": cost(40.0, 50.0)}
    said = demo.conclusion(7, 8, 5, [31.23, 42, 50.1], costs)
    assert said.startswith(
        "In 7 steps of 8 images, a small network that predicts at 3 depths, its exits, was trained to tell 5"
    )
    assert "of 31.2, 42.0 and 50.1 %." in said and words in said


def test_demo_in_words_without_a_fused_loss() -> None:
    """No comparison of the reference with itself."""
    said = demo.conclusion(1, 8, 5, [31.2, 50.1], {"reference": cost(40.0, 50.0)})
    assert said.startswith("In 1 step of 8") and "took 40.0 ms and 50.0 MiB" in said and "no fused one ran" in said
    assert "faster" not in said and "than" not in said


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
