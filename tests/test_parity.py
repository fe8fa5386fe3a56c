"""Training by fused losses follows training by the reference: `python -m benchmarks.ablation parity`, but short."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import selfreg_fast as srf

for extra in ("matplotlib", "rich", "tqdm"):
    pytest.importorskip(extra, reason="an extra of the commands")
pytest.importorskip("PIL", reason="an extra of the commands")

STEPS = 8


@pytest.fixture
def parity(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    return importlib.import_module("ablation.parity")


def compared(parity: ModuleType, precision: Any) -> dict[str, Any]:
    training = importlib.import_module("ablation.training")

    class Tiny(training.Network):  # type: ignore[name-defined, misc]
        widths = (8, 8, 8, 8)
        hidden = (8, 8, 8, 8)

    preset = training.Preset("tiny", Tiny, 32, (24, 32), 4, 1, 1, 0.02)
    # Blocks of one class each, whose colours tell it: something to learn, so that a wrong gradient shows.
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(training.VOID + 1, (8, 4, 5), generator=rng, dtype=torch.uint8)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    colours = 20 * torch.stack([labels, 11 - labels, 5 * labels % 12], 1)
    images = colours + torch.randint(20, (8, 3, 32, 40), generator=rng, dtype=torch.uint8)
    split = training.Split(images, labels)
    data = training.Data(split, split, torch.linspace(0.5, 2, 11))
    (row,) = parity.compare(data, "auto", STEPS, preset, [precision._replace(orders=3)])
    return row


@pytest.mark.parametrize("index", range(4), ids=["fp64", "fp32", "bf16", "fp16"])
def test_curves_agree(parity: ModuleType, index: int) -> None:
    """fp64 to 1e-9; else within twice the largest distance of three runs of the reference, which are few."""
    if srf.backends()["cpu"] != "available":
        pytest.skip(f"cpu: {srf.backends()['cpu']}")
    row = compared(parity, parity.PRECISIONS[index])
    assert row["last_loss"] != row["first_loss"]
    if index == 0:
        assert parity.agrees(row), row
    else:
        assert 0 < row["between_references"] < 0.1 * row["first_loss"], row
        assert row["fused_to_references"] <= 2 * row["most_between_references"], row
