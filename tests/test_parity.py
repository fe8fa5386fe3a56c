"""Training by fused losses follows training by the reference: `python -m benchmarks.ablation parity`, but short."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import selfreg_fast as srf

for extra in ("matplotlib", "rich", "tqdm"):
    pytest.importorskip(extra, reason="an extra of the commands")
pytest.importorskip("PIL", reason="an extra of the commands")

STEPS = 8
PRECISIONS = ("fp64", "fp64, raw powers", "fp32", "bf16 autocast", "fp16 autocast, GradScaler")


@pytest.fixture
def parity(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if srf.backends()["cpu"] != "available":
        pytest.skip(f"cpu: {srf.backends()['cpu']}")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    return importlib.import_module("ablation.parity")


def setting(parity: ModuleType) -> tuple[Any, Any]:
    """Data and preset, both tiny."""
    training = importlib.import_module("ablation.training")

    class Tiny(parity.SmoothNetwork):  # type: ignore[name-defined, misc]
        widths = (8, 8, 8, 8)
        hidden = (8, 8, 8, 8)

    # Blocks of one class each, whose colours tell it: something to learn, so that a wrong gradient shows.
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(training.VOID + 1, (8, 4, 5), generator=rng, dtype=torch.uint8)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    colours = 20 * torch.stack([labels, 11 - labels, 5 * labels % 12], 1)
    images = colours + torch.randint(20, (8, 3, 32, 40), generator=rng, dtype=torch.uint8)
    split = training.Split(images, labels)
    data = training.Data(split, split, torch.linspace(0.5, 2, 11))
    return data, parity.PRESET._replace(network=Tiny, crop=(24, 32), batch=4, learning_rate=0.01)


@pytest.mark.parametrize("name", PRECISIONS)
def test_curves_agree(parity: ModuleType, name: str) -> None:
    """fp64 to 1e-9; else within twice the largest distance of three runs of the reference, which are few."""
    data, preset = setting(parity)
    assert [p.name for p in parity.PRECISIONS] == list(PRECISIONS)
    precision = parity.PRECISIONS[PRECISIONS.index(name)]._replace(orders=3)
    (row,) = parity.compare(data, "auto", STEPS, preset, [precision])
    print(row)
    assert row["last_mea"] < 0.99 * row["first_mea"], "nothing was learned"
    assert all(row[f"{when}_{part}"] > 0 for when in ("first", "last") for part in parity.PARTS)
    if name.startswith("fp64"):
        assert parity.agrees(row), row
    else:
        assert 0 < row["most_between_references"] < precision.small * row["last_total"], row
        assert row["fused_to_references"] <= 2 * row["most_between_references"], row


def test_a_wrong_gradient_of_any_term_is_found(parity: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right loss, but the gradient of one term wrong in the sixth digit: the curves part by more than 1e-9."""
    training = importlib.import_module("ablation.training")
    wrong = ""

    class Criterion(srf.SelfRegulationLoss):
        def forward(self, logits: Any, labels: Tensor, **arguments: Any) -> srf.SelfRegulationOutput:
            output = super().forward(logits, labels, **arguments)
            presence = srf.presence_vector(labels, 11, ignore_index=training.VOID)
            terms = {**output._asdict(), "image level": 0.2 * srf.presence_loss(arguments["image_logits"], presence)}
            if not wrong:
                return output
            return output._replace(total=output.total + 1e-6 * (terms[wrong] - terms[wrong].detach()))

    monkeypatch.setattr(training, "SelfRegulationLoss", Criterion)
    data, preset = setting(parity)
    expected = parity.curve(data, preset, parity.PRECISIONS[0], "reference", STEPS)
    apart = {}
    for wrong in ("", "mea", "image level", "sr_f", "sr_l"):
        apart[wrong] = parity.distance(parity.curve(data, preset, parity.PRECISIONS[0], "auto", STEPS), expected)
    print(apart)
    assert apart.pop("") <= parity.EXACT < min(apart.values()), apart
