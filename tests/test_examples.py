"""The examples: each learns, leaves no file behind, and is at most 80 lines long.

One whose packages are missing is skipped; with SELFREG_FAST_EXAMPLES=1 in the environment, that is a failure.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
NEEDS = {
    "deeplab": (),
    "distillation": (),
    "lightning_module": ("lightning",),
    "segformer": ("transformers",),
    "smp_unet": ("segmentation_models_pytorch",),
    "trainer": ("transformers", "accelerate"),
}
ELSEWHERE = {"ddp": TESTS / "two_ranks.py"}


@pytest.fixture(scope="module")
def torchvision() -> None:
    """Imports it, if it is there, as the other packages will: also one built for CUDA beside a torch without.

    That one's own operators cannot be loaded, and it then stops where it describes the first. No example calls them.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor boxes) -> Tensor")
        importlib.import_module("torchvision")


def _example(name: str) -> ModuleType:
    missing = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
    if missing and os.environ.get("SELFREG_FAST_EXAMPLES") != "1":
        pytest.skip(f"not installed: {', '.join(missing)}")
    assert not missing, "these packages are not installed"
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NEEDS)
def test_the_examples_learn(name: str, torchvision: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    losses = _example(name).main(6)
    assert len(losses) == 6
    assert sum(losses[-2:]) < 0.95 * sum(losses[:2])
    assert not list(tmp_path.iterdir()), "files are left behind"


def test_every_example_is_short_and_run() -> None:
    paths = {path.stem: path for path in EXAMPLES.iterdir() if path.name != "__pycache__"}
    assert paths.keys() == NEEDS.keys() | ELSEWHERE.keys()
    for name, path in paths.items():
        assert len(path.read_text().splitlines()) <= 80, path
        if name in ELSEWHERE:
            assert f'"examples" / "{path.name}"' in ELSEWHERE[name].read_text()
