"""The benchmark program without its timing: cases, records, growth, figures, and the documents made of the results."""

from __future__ import annotations

import csv
import importlib
import json
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

for extra in ("matplotlib", "rich"):
    pytest.importorskip(extra, reason="an extra of the commands")
bench = pytest.importorskip("selfreg_fast.commands.bench")
from selfreg_fast.commands import measure  # noqa: E402
from selfreg_fast.commands.bench import cases, peers, report, trial  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SMALL = cases.Case("small", "objective", 3, (1, 3, 4, 5), peers=cases.ALL)


@pytest.fixture
def readme(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("readme")


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("compare")


@pytest.fixture
def results(tmp_path: Path, readme: ModuleType) -> Path:
    """Documents with markers beside results/device.csv, whose figures are made up."""
    for document, sections in readme.SECTIONS.items():
        marked = "".join(
            f"<!-- {name}: written by `make bench-readme` -->\nold\n<!-- end of {name} -->\n" for name in sections
        )
        (tmp_path / document).parent.mkdir(exist_ok=True)
        (tmp_path / document).write_text(f"before\n{marked}after\n")
    path = tmp_path / "benchmarks" / "results" / "device.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*bench.SETTING, *trial.COLUMNS])
        writer.writeheader()
        common = {**bench.setting("cpu", 7), "device": "A device"}
        for suite, case in (("loss", SMALL), ("interpolate", SMALL._replace(size=(8, 9), dtype="bfloat16"))):
            writer.writerows({**common, **r, "suite": suite} for r in made_up(case))
        for case in cases.suites("cpu")["scaling"]:
            writer.writerows({**common, **r, "suite": "scaling"} for r in made_up(case))
    return path


def made_up(case: cases.Case) -> list[trial.Record]:
    """Records whose time is linear in the exponentials; peers take 2, 3, ... times as long, the last does not run."""
    made = []
    for i, peer in enumerate(case.peers[:-1], 1):
        seconds = i * case.exponentials / 1e9
        record = trial.describe(case, peer) | trial.speeds(case, seconds, 1e10, 4e9)
        for phase in trial.PHASES:
            record |= trial.milliseconds(phase, [seconds, seconds, 2 * seconds])
        made.append(record | {"times_fused": float(i), "peak_bytes": i * case.gradient_bytes, "loss": 1.0})
    return [*made, {**trial.describe(case, case.peers[-1]), "note": "does not run: made up"}]


def test_readme_and_figures_are_what_the_results_say(readme: ModuleType) -> None:
    """`make bench-readme` was run after the results were last changed."""
    assert readme.problems(ROOT) == []


def test_readme_is_written_and_checked(readme: ModuleType, results: Path) -> None:
    """The table and the figures follow from the CSV file alone, and whatever then differs is found."""
    root = results.parents[2]
    assert readme.problems(root)
    assert readme.main([], root) == 0
    texts = {document: (root / document).read_text() for document in readme.SECTIONS}
    for text in texts.values():
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "\nold\n" not in text
    best = min(SMALL.peers.index(peer) for peer in readme.EAGER) + 1.0
    assert f"the output's size: {best} times faster, {best} times less memory" in texts["README.md"]
    text = texts["docs/benchmarks.md"]
    assert "A device" in text and "small bf16" in text and "3 of 1·3·4·5 → 8·9" in text
    assert "(../benchmarks/results/device-speed.png)" in text
    figures = set(readme.FIGURES) - {"main"}  # there are none of its cases
    assert {p.name for p in results.parent.glob("*.png")} == {f"device-{name}.png" for name in figures}
    assert readme.main(["--check"], root) == 0

    results.write_text(results.read_text().replace("A device", "Another"))
    found = readme.problems(root)
    assert len(found) == 2 + len(figures) and "README.md" in found[0] and "docs/benchmarks.md" in found[1]
    assert readme.main(["--check"], root) == 1
    results.unlink()
    assert len(readme.problems(root)) == 2 + len(figures)


def test_what_a_gpu_measured_becomes_results(
    monkeypatch: pytest.MonkeyPatch, results: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A run of .ci/gpu on a commit: each peer's first line with figures, README, pictures. Of no commit: nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu_results = importlib.import_module("gpu_results")
    root, out = results.parents[2], tmp_path / "out"
    out.mkdir()
    with results.open(newline="") as file:
        rows = [row | {"device": "NVIDIA H999"} for row in csv.DictReader(file)]
    results.unlink()
    failed = [row | {"both_ms": "", "note": "failed: made up"} for row in rows[:1]]
    with (out / "bench.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(failed + rows + rows[:1])
    counter = {"case": "objective, 5 exits", "dtype": "float32", "backend": "cuda", "kernel": "full_size_kernel"}
    times = {"source": "profiler", "metric": "duration", "unit": "us", "value": 819.4}
    counted = {"source": "ncu", "metric": "smsp__issue_active.avg.pct_of_peak_sustained_active", "value": "n/a"}
    with (out / "counters.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*counter, *times])
        writer.writeheader()
        writer.writerows([counter | times, counter | counted])
    checks = {"commit": "abc", "dirty": True, "rehearsal": False, "device": "NVIDIA H999", "stages": {}}
    (out / "checks.json").write_text(json.dumps(checks))
    assert gpu_results.main([str(out)], root) == 1 and not list(results.parent.glob("nvidia*"))
    (out / "checks.json").write_text(json.dumps(checks | {"dirty": False}))
    assert gpu_results.main([str(out)], root) == 0
    assert "0.8194" in capsys.readouterr().out  # in ms, beside what was counted
    with (results.parent / "nvidia-h999.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert sorted(map(str, written)) == sorted(map(str, rows))
    assert "NVIDIA H999" in (root / "README.md").read_text()
    assert (results.parent / "gpu" / "nvidia-h999.json").exists()


def test_peer_that_failed_everywhere_leaves_the_rest(readme: ModuleType, results: Path) -> None:
    """No figures of the fused loss: an empty table, not a crash."""
    rows = [row | {"both_ms": None} for row in readme.read(results)]
    assert readme.table(rows).count("\n") == 1


def test_names_are_unique_and_lead_to_their_case() -> None:
    """On both devices, and the same on both: one for a name, dtype and layout, by its name alone the plainest."""
    for device in ("cpu", "cuda"):
        found = [case for suite in cases.suites(device).values() for case in suite]
        assert len({(case.name, case.dtype, case.layout) for case in found}) == len(found)
        for case in found:
            first = cases.named(case.name, device)
            assert (first.name, first.dtype, first.layout) == (case.name, "float32", "contiguous")
    assert set(bench.NAMES) == {case.name for suite in cases.suites("cuda").values() for case in suite}
    for name in ("sr-l-voc", "sr-l-ade", "objective-voc", "resized-voc", "resized-cityscapes"):
        assert cases.named(name, "cpu").name == name


def test_what_must_move() -> None:
    """Bytes and exponentials by hand: 3 exits read, 2 gradients written, 8 bytes a label."""
    case = cases.Case("x", "sr-l", 3, (2, 5, 4, 6), (8, 12), dtype="float16")
    assert case.bytes_to_move == (3 + 2) * 2 * 5 * 4 * 6 * 2
    assert case.exponentials == 3 * 2 * 5 * 8 * 12
    assert case._replace(terms="mea").bytes_to_move == 6 * 2 * 5 * 4 * 6 * 2 + 8 * 2 * 8 * 12
    speed = trial.speeds(case, seconds=2e-6, copied=1e9, exponentiated=1e9)
    assert (speed["percent_of_copy"], speed["percent_of_exp"]) == (120.0, 144.0)
    assert (speed["limit"], speed["percent_of_limit"]) == ("exp", 144.0)


@pytest.mark.parametrize("terms", ["objective", "mea", "sr-f", "sr-l"])
@pytest.mark.parametrize("size", [None, (7, 9)], ids=["own size", "resized"])
def test_peers_compute_the_same(terms: str, size: tuple[int, int] | None) -> None:
    """Every eager peer: the reference's loss, and its gradients."""
    case = SMALL._replace(terms=terms, size=size, dtype="float64")
    (exits,), labels = trial.make_inputs(case, "cpu", 1)
    learners = [exits[i] for i in case.learners]
    found = {}
    for name in (cases.REFERENCE, cases.WRITTEN, cases.TUNED, cases.FUSED):
        if not cases.fits(name, case, "cpu"):
            continue
        try:
            value = peers.build(name, case, "cpu").loss(exits, labels)
        except peers.CannotRun:
            continue
        found[name] = [value, *torch.autograd.grad(value, learners)]
    for name, tensors in found.items():
        torch.testing.assert_close(tensors, found[cases.REFERENCE], msg=lambda text, name=name: f"{name}: {text}")


def test_peer_that_cannot_run_says_why() -> None:
    """A reason for each, and no failure."""
    case = SMALL._replace(terms="sr-l")
    for name in (cases.LIGER, cases.TRITON):
        if not torch.cuda.is_available():
            with pytest.raises(peers.CannotRun, match="GPU"):
                peers.build(name, case, "cpu")
    assert not report.is_failure({"note": "does not run: no GPU"})
    assert report.is_failure({"note": "failed: RuntimeError: out of memory"})


def test_a_gpu_has_columns_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Launches, Python's time and a graph's replay, where they were measured."""
    from rich.console import Console

    records = made_up(SMALL)
    report.print_case(Console(width=160), SMALL, records)
    assert "replay" not in capsys.readouterr().out
    on_gpu = [r | {"launches": 11, "host_us": 128.0, "replay_ms": 0.4321} for r in records]
    report.print_case(Console(width=160), SMALL, on_gpu)
    printed = capsys.readouterr().out
    assert "replay" in printed and "11.0" not in printed and " 11 " in printed and "0.432" in printed


def test_steps_where_malloc_keeps_what_is_freed() -> None:
    """A process of its own, since malloc reads its settings when one begins."""
    assert measure.in_fresh_process(os.getenv, "MALLOC_MMAP_MAX_", malloc=measure.KEPT) == "0"
    names = [cases.FUSED, cases.REFERENCE]
    seconds = measure.in_fresh_process(trial.measure_kept, SMALL, names, 2, 1, malloc=measure.KEPT)
    assert list(seconds) == names and all(0 < s < 60 for s in seconds.values())


def test_growth_is_fitted() -> None:
    """Time made up to be linear in what grows is; memory as the gradients grow, which is not at all with the output."""
    records = [r for case in cases.suites("cpu")["scaling"] for r in made_up(case)]
    growths = report.growths(records)
    assert {axis for axis, _ in growths} == {"pixels", "channels", "exits", "batch", "output"}
    for (axis, _), (first, last, time, memory) in growths.items():
        assert first < last
        assert time == pytest.approx(1, abs=0.02)
        assert memory == pytest.approx(float(axis != "output"), abs=0.02)


def test_what_got_slower(compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the last record of another commit on this machine, whatever lies between; beyond the spread of both."""

    def record(number: int, commit: str, dirty: bool, node: str = "here", **ratios: float) -> None:
        benchmarks = [
            {
                "name": f"step[{n}]",
                "extra_info": {"peer": "tuned", "ratio": r, "ratio_p20": 0.9 * r, "ratio_p80": 1.1 * r},
            }
            for n, r in ratios.items()
        ]
        info = {"commit_info": {"id": commit, "dirty": dirty}, "machine_info": {"node": node}}
        path = tmp_path / "Linux" / f"{number:04}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**info, "datetime": f"2026-01-01T00:00:{number:02}", "benchmarks": benchmarks}))

    assert compare.main(tmp_path) == 0  # nothing was ever recorded
    record(1, "old", False, a=0.1, b=0.1, c=0.1)
    assert compare.main(tmp_path) == 0
    record(2, "new", False, "elsewhere", a=0.01, b=0.01, c=0.01)
    record(3, "new", True, a=0.9, b=0.9, c=0.9)
    record(4, "new", True, a=0.2, b=0.112, c=0.05)
    capsys.readouterr()
    assert compare.main(tmp_path) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "tuned" in line]
    assert ["SLOWER" in line for line in lines] == [True, False, False]
    assert [line[1] for line in lines] == ["a", "b", "c"]


def test_no_time_left_is_said(tmp_path: Path) -> None:
    """Every peer of every case has its line all the same."""
    assert bench_main("--seconds", "0", "--out", str(tmp_path / "x.csv")) == 0
    with (tmp_path / "x.csv").open(newline="") as file:
        notes = [line["note"] for line in csv.DictReader(file)]
    assert len(notes) == sum(len(c.peers) for c in cases.suites(default_device())["quick"])
    assert set(notes) == {"skipped: no time was left"}


def test_profile_is_written(tmp_path: Path) -> None:
    """A trace in the format of Chrome, where there are kernels to profile."""
    assert bench_main("--cases", "sr-f-features", "--device", "cpu", "--profile", str(tmp_path)) == 0
    if peers.backends()["cpu"] == "available":
        assert "traceEvents" in (tmp_path / "sr-f-features-float32-contiguous.json").read_text()


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def bench_main(*arguments: str) -> int:
    from selfreg_fast.__main__ import main

    return main(["bench", *arguments])


WHERE = "a device (2 threads)"


def varied(name: str, **times: float) -> list[trial.Record]:
    """Records of a case, whose peers take so many times as long as the fused loss, 4 ms, and its square of 2 MiB."""
    peers = {"fused": 1.0} | {peer.replace("_", " "): multiple for peer, multiple in times.items()}
    case = SMALL._replace(name=name)
    return [
        trial.describe(case, peer) | {"both_ms": 4 * m, "times_fused": m, "peak_bytes": int(m**2 * (2 << 20))}
        for peer, m in peers.items()
    ]


def test_one_case_in_words() -> None:
    """The best peer for time and for memory, and what it is; those that are not plain PyTorch do not count."""
    records = varied("small", as_written=8.0, tuned=3.0) + [
        trial.describe(SMALL, peer) | {"both_ms": 0.1, "times_fused": 0.025, "peak_bytes": 1}
        for peer in (cases.LIGER, cases.FUSED_SR_L, cases.TRITON)
    ]
    assert report.conclusion(records, WHERE) == (
        "On a device (2 threads), the fused loss, forward and backward, took 3.0 times less time than the fastest "
        'plain PyTorch in the case small ("tuned"), and 9.0 times less memory than the most frugal ("tuned"). '
        'Here "tuned" is hand-tuned eager PyTorch.'
    )


def test_several_cases_in_words() -> None:
    """From the least to the most, with the median, the best peers counted."""
    records = varied("a", as_written=2.0, tuned=3.0) + varied("b", tuned=4.0) + varied("c", as_written=9.0, tuned=8.0)
    said = report.conclusion(records, WHERE)
    assert "took between 2.0 and 8.0 times less time (median 4.0) than the fastest plain PyTorch in each of 3" in said
    assert '("tuned" in 2, "as written" in 1), and between 4.0 and 64.0 times less memory (median 16.0)' in said
    assert '"as written" is the formulas' in said and "had nothing to compare" not in said


def test_what_is_slower_is_said() -> None:
    """In one case, and in some of several."""
    said = report.conclusion(varied("small", tuned=0.5), WHERE)
    assert "took 2.0 times more time than" in said and "and 4.0 times more memory than" in said
    said = report.conclusion(varied("a", tuned=0.5) + varied("b", tuned=1.0) + varied("c", tuned=3.0), WHERE)
    assert "took between 2.0 times more time and 3.0 times less time (median: no less time) than" in said


def test_what_cannot_be_compared_is_said() -> None:
    """No peer, no fused loss, another loss, memory that was not measured."""
    alone = varied("alone")
    assert "there is nothing to compare it with" in report.conclusion(alone, WHERE)
    skipped = bench.without_figures(SMALL, "skipped: no time was left")
    assert "the fused loss was measured in no case" in report.conclusion(skipped, WHERE)
    wrong = varied("wrong", tuned=0.1)
    wrong[1]["note"] = "another loss: 1, the reference's is 2"
    assert report.conclusion(wrong, WHERE) == report.conclusion(alone, WHERE)
    said = report.conclusion(alone + skipped + wrong + varied("right", tuned=3.0), WHERE)
    assert "in the case right" in said and said.endswith(" 3 more of the cases had nothing to compare.")

    blind = [record | {"peak_bytes": None} for record in varied("blind", tuned=3.0)]
    assert '("tuned"); memory was not measured. Here' in report.conclusion(blind, WHERE)
    said = report.conclusion(blind + varied("seen", tuned=3.0), WHERE)
    assert 'and 9.0 times less memory than the most frugal in the 1 where it was measured ("tuned")' in said


def test_triton_stands_in_where_cuda_kernels_do_not_run() -> None:
    """On a GPU without nvcc it is what a user gets; its multiples are not those of the records."""
    records = varied("small", tuned=3.0)
    records[0] = records[0] | {"both_ms": None, "note": "does not run: made up"}
    records[1]["times_fused"] = None
    triton = trial.describe(SMALL, cases.TRITON) | {"both_ms": 2.0, "peak_bytes": 1 << 20}
    said = report.conclusion([records[0], triton, records[1]], "a GPU")
    assert said.startswith("On a GPU, the fused loss by Triton, forward and backward, took 6.0 times less time than")
    assert "and 18.0 times less memory than" in said
