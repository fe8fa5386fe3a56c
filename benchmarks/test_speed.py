"""For developers: `pytest benchmarks --benchmark-only`, and `make bench-compare` for what got slower.

Before each round the fused loss and its peer take a turn. What is recorded, beside the times, is the ratio of those
two, which holds on a machine that does other things as well.
"""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import pytest
import torch

from selfreg_fast.backends import backends
from selfreg_fast.commands.bench.cases import FUSED, TUNED, Case
from selfreg_fast.commands.bench.peers import build
from selfreg_fast.commands.bench.trial import Trial, make_inputs
from selfreg_fast.commands.measure import sample_seconds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 15
MAIN = Case("objective", "objective", 3, (1, 21, 161, 161), peers=(FUSED, TUNED))
CASES = [
    MAIN,
    MAIN._replace(name="objective-bfloat16", dtype="bfloat16"),
    MAIN._replace(name="objective-channels-last", layout="channels_last"),
    MAIN._replace(name="objective-resized", shape=(1, 21, 41, 41), size=(161, 161)),
    MAIN._replace(name="sr-l-150-channels", terms="sr-l", shape=(1, 150, 64, 64)),
    MAIN._replace(name="sr-f-256-channels", terms="sr-f", shape=(1, 256, 41, 41)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step(case: Case, benchmark: Any) -> None:
    """Forward and backward, by the fused kernels."""
    if backends()[DEVICE] != "available":
        pytest.skip(backends()[DEVICE])
    made, labels = make_inputs(case, DEVICE, 8)
    fused, peer = (Trial(build(name, case, DEVICE), case, itertools.cycle(made), labels) for name in case.peers)
    sampled: list[dict[str, list[list[float]]]] = []
    steps = {FUSED: [fused.run], TUNED: [peer.run]}

    def both_in_turn() -> None:
        sampled.append(sample_seconds(steps, 1, DEVICE))

    def step() -> None:
        fused.run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, setup=both_in_turn, rounds=ROUNDS, warmup_rounds=1)
    ratios = [sample[FUSED][0][0] / sample[TUNED][0][0] for sample in sampled]
    low, _, _, high = statistics.quantiles(ratios, n=5)
    benchmark.extra_info |= {
        "peer": TUNED,
        "ratio": statistics.median(ratios),
        "ratio_p20": low,
        "ratio_p80": high,
    }
