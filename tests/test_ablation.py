"""The ablation's training, on a tiny network and images of noise: resumed, collected, written into the documents."""

from __future__ import annotations

import csv
import importlib
import math
import shutil
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

for extra in ("matplotlib", "rich", "tqdm"):
    pytest.importorskip(extra, reason="an extra of the commands")
Image = pytest.importorskip("PIL.Image", reason="an extra of the commands")

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("ablation.training")


@pytest.fixture
def program(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The command, whose quick setting is tiny."""
    module = importlib.import_module("ablation.__main__")
    monkeypatch.setitem(training.PRESETS, "quick", tiny(training))
    return module


@pytest.fixture
def folder(tmp_path: Path, training: ModuleType) -> Path:
    """Noise in which every class occurs, and void, as CamVid's folders."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 3)):
        for kind in ("images", "labels"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for i in range(count):
            labels = rng.integers(0, training.VOID + 1, (32, 48), dtype=np.uint8)
            noise = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "data" / split / f"images/{i}.png")
            Image.fromarray(labels).save(tmp_path / "data" / split / f"labels/{i}.png")
    return tmp_path / "data"


def tiny(training: ModuleType):  # type: ignore[no-untyped-def]
    class Tiny(training.Network):  # type: ignore[name-defined, misc]
        widths = (4, 4, 4, 4)
        hidden = (4, 4, 4, 4)

    return training.Preset("quick", Tiny, 16, (16, 16), 2, 4, 2, 0.05)


def test_resumed_is_uninterrupted(training: ModuleType, folder: Path, tmp_path: Path) -> None:
    """A run stopped after each of its epochs: the same weights, momentum and figures, bit for bit."""
    preset, run = tiny(training), training.Run(training.ALL, 3)
    data = training.load(folder, preset, CPU)
    assert training.train(run, preset, data, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(text: str) -> None:
        raise Stop

    for _ in range(preset.epochs):
        with pytest.raises(Stop):
            training.train(run, preset, data, tmp_path / "parts", advance=stop)
    assert training.train(run, preset, data, tmp_path / "parts", advance=stop)  # nothing is left to do
    states = [torch.load(tmp_path / part / f"{run.name}.pt", weights_only=True) for part in ("whole", "parts")]
    for key in ("model", "optimizer"):
        torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=0)
    whole, parts = ([{k: v for k, v in row.items() if "seconds" not in k} for row in state["rows"]] for state in states)
    assert whole == parts and len(whole) == 4 * preset.epochs // preset.every

    assert not training.train(training.Run("MEA", 0), preset, data, tmp_path / "late", deadline=time.monotonic() - 1)
    # Another of the same seed begins where the warm-up ends, and is what it is alone.
    epochs: list[str] = []
    runs = training.Run("MEA", 3), training.Run("MEA", 3, epochs=2)
    for other, left in zip(runs, (2, 2), strict=True):
        epochs.clear()
        assert training.train(other, preset, data, tmp_path / "whole", advance=epochs.append)
        assert len(epochs) == left
    assert training.train(runs[0], preset, data, tmp_path / "alone")
    figures = []
    for part in ("whole", "alone"):
        with (tmp_path / part / f"{runs[0].name}.csv").open(newline="") as file:
            figures.append([{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)])
    assert figures[0] == figures[1]
    with pytest.raises(ValueError, match="was written by"):
        training.train(run, preset._replace(batch=3), data, tmp_path / "whole")


def test_objectives_train_what_they_say(training: ModuleType, folder: Path) -> None:
    """Which exits get a gradient; SR terms on the features or the logits, and only after the warm-up."""
    preset = tiny(training)
    data = training.load(folder, preset, CPU)
    images, labels = next(training.batches(data.train, preset, 0, 0))
    torch.manual_seed(0)
    logits, image_logits, features = preset.network(11)(images)
    assert [z.shape[1] for z in features] == [4] * 4

    def learners(objective: str, tensors: list[torch.Tensor], sr: bool = True, **settings: str) -> list[bool]:
        run = training.Run(objective, 0, **settings)
        criterion = run.criterion(data.class_weight).enable_sr(sr)
        total = criterion(logits, labels, **run.arguments(image_logits, features)).total
        found = torch.autograd.grad(total, tensors, retain_graph=True, allow_unused=True)
        return [g is not None and bool(g.any()) for g in found]

    every, deeper = [True] * 4, [False, True, True, True]
    assert learners(training.BASELINE, logits) == [False, False, False, True]
    assert learners(training.BASELINE, image_logits) == [False] * 4
    assert learners("MEA", logits) == learners("MEA", image_logits) == every
    # Apart from its logits, a feature gets a gradient only from SR-F on the features.
    features = [z.detach().requires_grad_() for z in features]
    assert learners("MEA", features) == learners("MEA + SR-L", features) == [False] * 4
    assert learners("MEA + SR-F", features) == learners(training.ALL, features) == deeper
    assert learners(training.ALL, features, sr=False) == [False] * 4
    assert learners(training.ALL, features, sr_f_on="logits") == [False] * 4
    published = training.Run(training.ALL, 0, published=True).criterion(data.class_weight)
    assert published.image_level_sr_l and published.options["target"] == "argmax"


def test_batches_are_cut_from_the_images(training: ModuleType) -> None:
    """Image and labels stay together through scale, crop and flip, which follow from seed and epoch."""
    y, x = torch.meshgrid(torch.arange(32), torch.arange(48), indexing="ij")
    labels = (10 * (y // 5) + x // 5).to(torch.uint8).repeat(4, 1, 1)  # squares, and colours that tell column and row
    images = torch.stack([5 * x, 5 * y, 0 * x]).to(torch.uint8).repeat(4, 1, 1, 1)
    split = training.Split(images, labels)
    preset = tiny(training)._replace(crop=(24, 36), batch=4)
    flips, middles = set(), []
    for epoch in range(6):
        got, target = next(training.batches(split, preset, 0, epoch))
        assert got.shape == (4, 3, 24, 36) and target.shape == (4, 24, 36) and target.dtype == torch.uint8
        column, row = ((got[:, c] * 64 + 127.5) / 5 for c in (0, 1))
        # `nearest` is at most half a pixel from where `bilinear` looks, and a square five pixels wide.
        assert ((column - (5 * (target % 10).float() + 2)).abs() <= 2.51).all()
        assert ((row - (5 * (target // 10).float() + 2)).abs() <= 2.51).all()
        across = (column[:, :, -1] - column[:, :, 0]).mean(1) / 35
        down = (row[:, -1] - row[:, 0]).mean(1) / 23
        flips |= {slope > 0 for slope in across.tolist()}
        for slope in (across.abs(), down):
            assert ((1 / training.SCALES[1] - 0.1 <= slope) & (slope <= 1 / training.SCALES[0] + 0.1)).all()
        middles.append(torch.stack([column.mean((1, 2)), row.mean((1, 2))]))
        again = next(training.batches(split, preset, 0, epoch))[0]
        assert torch.equal(got, again)
    assert flips == {True, False}
    assert (torch.cat(middles, 1).amax(1) - torch.cat(middles, 1).amin(1) > torch.tensor([8, 5])).all()  # cut anywhere
    for seed, epoch in ((0, 4), (1, 5)):
        other = next(training.batches(split, preset, seed, epoch))[0]
        assert not torch.equal(got, other)


def test_iou_by_hand(training: ModuleType) -> None:
    """A network that always says class 1: its IoU is the class's share of what counts; void does not."""

    class Says(torch.nn.Module):
        strides = (1,)

        def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], None, None]:
            logits = images.new_zeros(len(images), 11, *images.shape[2:])
            logits[:, 1] = 1
            return [logits], None, None

    labels = torch.tensor([[[1, 1, 1, 2], [2, 0, training.VOID, training.VOID]]], dtype=torch.uint8)
    split = training.Split(torch.zeros(1, 3, 2, 4, dtype=torch.uint8), labels)
    iou = training.evaluate(Says(), split, 1)
    assert iou.shape == (1, 11)
    assert iou[0, :3].tolist() == [0.0, 0.5, 0.0] and iou[0, 3:].isnan().all()


def test_command_resumes_collects_and_draws(
    program: ModuleType, training: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No time: nothing is done, status 1. Then all of it; then nothing again. Runs of another machine add up."""
    arguments = ["--quick", "--data", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    results = tmp_path / "benchmarks" / "results"
    few = ["--seeds", "0", "--results", str(results)]
    assert program.main([*arguments, *few, "--seconds", "0"]) == 1
    assert not results.exists()
    assert program.main([*arguments, *few]) == 0
    path = results / "ablation-quick.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["objective"] for row in rows} == set(training.OBJECTIVES)
    assert len(rows) == 5 * 2 * 4 and {row["commit"] for row in rows} != {""}
    # Until half of the epochs all that have MEA are one run; then the SR terms come on top.
    losses = {(row["objective"], row["epoch"]): float(row["loss"]) for row in rows}
    others = ("MEA + SR-F", "MEA + SR-L", training.ALL)
    assert all(math.isclose(losses[name, "2"], losses["MEA", "2"], rel_tol=1e-4) for name in others)
    assert all(losses[name, "4"] > losses["MEA", "4"] + 0.1 for name in others)
    assert (tmp_path / "out" / "quick" / "failures.png").stat().st_size > 1000
    assert not list(results.glob("*.png"))  # the data set's pictures are not for the repository

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "quick").glob("*.pt")}
    shutil.copy(tmp_path / "out" / "quick" / "MEA-0.csv", tmp_path / "out" / "quick" / "MEA-1.csv")
    text = (tmp_path / "out" / "quick" / "MEA-1.csv").read_text()
    assert program.main([*arguments, "--seeds", "1", "--objectives", "MEA"]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert (tmp_path / "out" / "quick" / "MEA-1.csv").read_text() == text
    assert len(program.collected(tmp_path / "out" / "quick")) == len(rows) + 8

    readme = importlib.import_module("readme")
    (tmp_path / "docs").mkdir()
    for document, sections in readme.SECTIONS.items():
        (tmp_path / document).write_text(
            "".join(f"<!-- {n}: written by `make bench-readme` -->\n<!-- end of {n} -->\n" for n in sections)
        )
    assert readme.problems(tmp_path)
    assert readme.main([], tmp_path) == 0
    text = (tmp_path / "docs" / "training.md").read_text()
    assert all(f"\n| {name} | " in text for name in training.OBJECTIVES)
    assert "(../benchmarks/results/ablation-quick-iou.png)" in text
    readmes = (tmp_path / "README.md").read_text()
    assert all(f"\n| {name} | " in readmes for name in ("deepest exit only", "MEA", training.ALL))
    path.write_text(path.read_text().replace("MEA + SR-F,", "MEA + SR-F,", 1) + "\n")
    assert len(readme.problems(tmp_path)) == 1  # the picture is of other results

    assert program.main(["--data", str(tmp_path / "nowhere"), "--quick"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_interrupted_it_says_how_to_go_on(
    program: ModuleType,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Status 130 and one line; what keeps nothing does not say that it goes on."""

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "train", interrupt)
    monkeypatch.setattr(program.memory, "measure", interrupt)
    arguments = ["--quick", "--data", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    for task, end in (("train", ": run the same again to go on"), ("memory", "")):
        assert program.main([task, *arguments]) == 130
        assert capsys.readouterr().err.endswith(f"\nablation: interrupted{end}\n")


def test_parity_and_steps_are_told(training: ModuleType, tmp_path: Path) -> None:
    """The documents' other tables, of made-up results: multiples, spreads and the largest batches."""
    results = importlib.import_module("training_results")
    setting = {"device": "A device", "threads": "2", "torch": "2.13", "commit": "abc"}
    step = {**setting, "network": "full", "batch": "8", "size": "512x512", "sr_f_on": "logits", "precision": "fp32"}
    fused = {**step, "peer": "fused", "step_ms": "100", "loss_ms": "10", "peak_bytes": str(2**20), "memory_gib": ""}
    plain = {**fused, "peer": "reference", "step_ms": "250", "loss_ms": "80", "peak_bytes": str(2**23)}
    limits = [{**row, "batch": n, "memory_gib": "24"} for row, n in ((fused, "9"), (plain, "4"))]
    spread = {"precision": "fp32", "steps": "50", "first_total": "6", "last_total": "4", "fused_to_references": "2e-5"}
    spread |= {"first_mea": "2.5", "last_mea": "1", "between_references": "3e-5", "most_between_references": "4e-5"}
    folder = tmp_path / "benchmarks" / "results"
    training.write([fused, plain, *limits], folder / "ablation-step.csv")
    training.write([{**setting, **spread}], folder / "ablation-parity.csv")
    text = results.steps(tmp_path, tmp_path / "docs")
    assert (
        "| full, SR-F on logits | 8 of 512·512 | 250 ms | **100 ms** | 2.50× | 80.0 → 10.0 ms | 8 MiB | **1 MiB** |"
        in text
    )
    assert "| full, SR-F on logits | 24 GiB | 4 | 9 |" in text
    assert "| fp32 | 6.0 → 4.0 | 2.0e-05 | 3.0e-05 | 4.0e-05 | 1.0e-05 |" in text and "from 2.5 to 1.0" in text
    assert results.draw(folder / "ablation-step.csv", folder) == []


def test_differences_are_of_a_seed_and_its_epochs(training: ModuleType) -> None:
    """The search's table, of made-up runs: MEA of the same seed and as many epochs is subtracted, the best first."""
    results = importlib.import_module("training_results")

    def runs(objective: str, settings: str | None, epochs: int, *mious: float) -> list[dict[str, object]]:
        common = {"objective": objective, "settings": settings, "epochs": epochs, "thin_miou": 0.5}
        return [{**common, "seed": n, "exit": e, "miou": m + e / 10} for n, m in enumerate(mious) for e in range(4)]

    rows = runs("MEA", None, 20, 0.1, 0.2, 0.3) + runs("MEA", "60 epochs", 60, 0.4)
    rows += runs(training.ALL, "60 epochs", 60, 0.45) + runs("MEA + SR-L", "x", 20, 0.11, 0.23)
    rows += runs(training.ALL, None, 20, 0.09)
    assert results._search(rows).splitlines()[2:] == [
        "| MEA + SR-L: x | 2 | 47.0 ± 8.5 |" + " +2.0 ± 1.4 |" * 4 + " +0.0 ± 0.0 |",
        "| weights 1, τ = 1 | 1 | 39.0 |" + " -1.0 |" * 4 + " +0.0 |",
        "| 60 epochs | 1 | 75.0 |" + " +5.0 |" * 4 + " +0.0 |",
        "| MEA: 60 epochs | 1 | 70.0 |" + "  |" * 5,
    ]


def test_what_fits_follows_from_lines(training: ModuleType, tmp_path: Path) -> None:
    """The table of memory, of made-up peaks on a line; a GPU's own search takes the place of the steps in it."""
    results = importlib.import_module("training_results")
    setting = {"device": "A device", "threads": "1", "torch": "2.13", "commit": "abc", "precision": "fp32"}
    rows = [
        {**setting, "what": what, "image": "64x64", "batch": n, "size": f"{side}x64", "peer": peer}
        | {"held_bytes": held, "peak_bytes": 2**26 + n * side * 64 * 2**10 * factor - held}
        for what, peers, held in (("step", ("reference", "fused"), 2**20), ("loss", ("as written", "fused"), 0))
        for factor, peer in zip((64, 1), peers, strict=True)
        for n, side in ((1, 64), (3, 64), (1, 128))
    ]
    path = tmp_path / "ablation-memory.csv"
    training.write(rows, path)
    text = results.memory(path, path.name)
    # An image takes 4 MiB and 64 times as much: (8192 - 64) MiB hold 2032 and 31 of them.
    assert "| step, 64·64 | 256 MiB |  | 4 MiB | 31 → **2,032** |" in text and "| loss, 64·64 | 256 MiB |" in text
    assert "at most 0.0 %" in text
    training.write([{"memory_gib": 80}], tmp_path / "ablation-step.csv")
    text = results.memory(path, path.name)
    assert "| step" not in text and "| loss, 64·64 | 256 MiB |" in text


def test_memory_is_measured_by_pixels(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for every peer; between steps there are the images, beside what does not grow. Peaks are not measured."""
    memory = importlib.import_module("ablation.memory")

    def peaks(function: object, case: tuple[object, ...], peers: list[str]) -> object:
        return [7] if function is memory.peaks_on_cpu else dict.fromkeys(peers, case.shape[2])  # type: ignore[attr-defined]

    monkeypatch.setattr(memory, "in_fresh_process", peaks)
    monkeypatch.setattr(memory, "STEPS", [(1, (16, 16)), (2, (16, 16))])
    monkeypatch.setattr(memory, "LOSSES", [(3, (32, 64))])
    rows = memory.measure("reference", {"device": "here"})
    steps, losses = rows[:8], rows[8:]
    assert [row["peer"] for row in steps] == ["fused", "reference"] * 4
    assert {row["device"] for row in rows} == {"here"} and {row["peak_bytes"] for row in steps} == {7}
    held = [row["held_bytes"] for row in steps]
    weights = sum(p.numel() for p in training.FullNetwork(11).parameters())
    assert held[0] > 2 * 4 * weights and held[2] - held[0] == held[6] - held[4] == 16 * 16 * (3 * 4 + 1)
    assert [row["peer"] for row in losses] == ["fused", "tuned", "as written"] * 3
    # Of an eighth: two rows of each quarter of the image, four of the whole.
    assert [(row["batch"], row["size"], row["peak_bytes"]) for row in losses[::3]] == [
        (1, "16x32", 2),
        (2, "16x32", 2),
        (1, "32x64", 4),
    ]


def test_search_settings_have_files_of_their_own(program: ModuleType, training: ModuleType) -> None:
    """No two runs share a name."""
    plans = [program.parser().parse_args([task, "--data", "x"]) for task in ("train", "search")]
    runs = [run for args in plans for run in program.planned(args)]
    assert len(runs) == 3 * (5 + len(program.SEARCH))
    assert len({run.name for run in runs}) == len(runs)
    assert training.Run("MEA", 0, temperature=2.0, sr_f_on="logits").settings == "τ = 2, SR-F on logits"
    assert training.Run("MEA", 0, epochs=60).settings == "60 epochs"


def test_step_is_measured(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both peers, all phases that add up, the fused step's peak below the reference's, and the search for what fits."""
    step = importlib.import_module("ablation.step")
    monkeypatch.setitem(step.ROUNDS, "cpu", 1)
    case = step.Case("quick", 2, (64, 96), "features")
    rows = step.measure(CPU, "auto", {"device": "here"}, [case])
    assert [row["peer"] for row in rows] == list(step.PEERS)
    for row in rows:
        assert math.isclose(row["step_ms"], sum(row[f"{phase}_ms"] for phase in step.PHASES), abs_tol=0.01)
    if importlib.import_module("selfreg_fast").backends()["cpu"] == "available":
        fused, reference = (row["peak_bytes"] for row in rows)
        # The reference holds at least softmax and log-softmax of four resized features; the fused loss none of them.
        assert reference - fused > 4 * 2 * 32 * 64 * 96 * 4
    for limit in (0, 1, 2, 3, 4, 7, 100):
        assert step.largest(lambda n, limit=limit: n <= limit) == limit
