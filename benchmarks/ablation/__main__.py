"""`python -m benchmarks.ablation --data DIR`: what each term of Self-Regulation does to a network trained on CamVid.

Five objectives, from the deepest exit alone to MEA + SR-F + SR-L, three seeds each, the same images and steps for all.
Every run has its files in --out, and goes on from them after an interruption; what is finished there is not run again.
Copy the files of several machines into one folder to add them up.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from selfreg_fast.__main__ import guarded
from selfreg_fast.backends import choose
from selfreg_fast.commands.bench import setting
from selfreg_fast.commands.data import DataError

from . import memory, parity, pictures, step
from .training import ALL, OBJECTIVES, PRESETS, Preset, Run, load, train, write

SEEDS = (0, 1, 2)
# What else to try so that the SR terms help: smaller weights, of both or of one alone; other targets; a later start;
# more epochs, beside MEA alone. The seeds of one follow each other, as differences are taken seed by seed.
SEARCH = [
    Run(ALL, 0, sr_f_weight=0.1, sr_l_weight=0.1),
    Run(ALL, 0, sr_f_weight=0.1, sr_l_weight=0.1, sr_f_on="logits"),
    Run(ALL, 0, sr_f_on="logits", published=True),
    Run("MEA + SR-F", 0, sr_f_weight=0.1),
    Run("MEA + SR-L", 0, sr_l_weight=0.1),
    Run("MEA", 0, epochs=60),
    Run(ALL, 0, sr_f_weight=0.1, sr_l_weight=0.1, epochs=60),
    Run(ALL, 0, sr_f_weight=0.1, sr_l_weight=0.1, temperature=2.0, renormalize=True),
    Run(ALL, 0, epochs=60),
    Run(ALL, 0, sr_f_weight=0.03, sr_l_weight=0.03),
    Run(ALL, 0, warmup=0.75),
    Run(ALL, 0, sr_f_on="logits"),
    Run(ALL, 0, temperature=2.0, renormalize=True),
    Run(ALL, 0, temperature=4.0),
]
TASKS = {
    "train": "the five objectives",
    "search": "other weights and targets of the SR terms, SR-F on logits, more epochs",
    "parity": "whether fused and reference losses give the same curves",
    "step": "time and memory of a training step, fused and reference; on a GPU also the largest batch",
    "memory": "of a step, on the CPU, by the number of pixels: what would fit into a GPU",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """As the package's own commands, without a traceback where it is interrupted."""
    return guarded("ablation", lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    options = parser()
    args = options.parse_args(arguments)
    if args.data is None and args.task not in ("step", "memory"):
        options.error("--data DIR is needed")
    args.results = args.results or args.out
    device = torch.device(args.device)
    preset = PRESETS["quick" if args.quick else "full"]
    common = {key: None if value is None else str(value) for key, value in setting(device.type, 0).items()}
    common["backend"] = choose(args.backend, device.type)
    del common["repeats"]
    print("{device}, {threads} threads, torch {torch}, losses by {backend}".format(**common))
    try:
        if args.task == "step":
            write(step.measure(device, args.backend, common), args.results / "ablation-step.csv")
        elif args.task == "memory":
            write(memory.measure(args.backend, common), args.results / "ablation-memory.csv")
        elif args.task == "parity":
            rows = parity.compare(load(args.data, parity.PRESET, device), args.backend, args.steps)
            write([{**common, **row} for row in rows], args.results / "ablation-parity.csv")
            return parity.report(rows)
        else:
            return run_all(args, preset, device, common)
    except KeyboardInterrupt:
        if args.task in ("train", "search"):  # which keep what they have
            raise KeyboardInterrupt("run the same again to go on") from None
        raise
    except (DataError, ValueError) as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    tasks = "\n".join(f"  {name:8}{text}" for name, text in TASKS.items())
    made = argparse.ArgumentParser(
        "python -m benchmarks.ablation",
        description=f"{__doc__}\ntasks:\n{tasks}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("task", nargs="?", choices=TASKS, default="train", help="default: train")
    made.add_argument("--data", type=Path, metavar="DIR", help="CamVid, as train|val / images|labels")
    made.add_argument("--quick", action="store_true", help="a quarter of the resolution and a small network, for CPUs")
    made.add_argument("--out", type=Path, default=Path("out/ablation"), metavar="DIR", help="default: %(default)s")
    made.add_argument(
        "--results", type=Path, metavar="DIR", help="where the CSV file and the pictures go (default: --out)"
    )
    made.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), metavar="NAME")
    made.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="N", help="default: 0 1 2")
    made.add_argument("--seconds", type=float, default=float("inf"), help="begin no epoch after these")
    made.add_argument("--steps", type=int, default=50, help="of parity (default: %(default)s)")
    made.add_argument("--backend", default="auto", help="of the losses (default: auto)")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    return made


def run_all(args: argparse.Namespace, preset: Preset, device: torch.device, common: dict[str, Any]) -> int:
    """Trains what is not yet trained, then collects what there is; 1 if something is left to do."""
    end = time.monotonic() + args.seconds
    folder = args.out / preset.name
    runs = planned(args)
    todo = [run for run in runs if not (folder / f"{run.name}.csv").exists()]
    data = load(args.data, preset, device)
    left = done = 0
    with tqdm(total=sum(run.epochs or preset.epochs for run in todo), unit="epoch") as bar:
        for run in todo:
            bar.set_description(run.name)

            def advance(text: str) -> None:
                bar.set_postfix_str(text, refresh=False)
                bar.update()

            left += not train(run, preset, data, folder, args.backend, common, end, advance)
            bar.n = done = done + (run.epochs or preset.epochs)  # with those of an earlier call, or of another run
    rows = collected(folder)
    if rows:
        path = args.results / f"ablation-{preset.name}.csv"
        write(rows, path)
        print(f"wrote {path}")
        if picture := pictures.draw(folder, preset, data):
            print(f"wrote {picture}")
    if left:
        print(f"{left} of {len(runs)} runs are not finished: run the same again to go on")
    return int(left > 0)


def planned(args: argparse.Namespace) -> list[Run]:
    """All runs; a seed of every objective before the next seed, so that half of them is worth something."""
    if args.task == "search":
        return [run._replace(seed=seed) for run in SEARCH for seed in args.seeds]
    return [Run(objective, seed) for seed in args.seeds for objective in args.objectives]


def collected(folder: Path) -> list[dict[str, Any]]:
    """The rows of every finished run in the folder, whichever machine it is from."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    return rows


if __name__ == "__main__":
    sys.exit(main())
