"""What the documents say: README.md's programs run, tests/README.md names tests, bounds are those that tests use."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
from support import ERRORS
from torch import nn

import selfreg_fast as srf

HERE = Path(__file__).parent
FRONT = (HERE.parent / "README.md").read_text()
README = (HERE / "README.md").read_text()
ACCURACY = (HERE.parent / "docs" / "accuracy.md").read_text()


def test_the_tests_named_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", README))
    defined = set(re.findall(r"^def (test_\w+)\(", "".join(p.read_text() for p in HERE.glob("test_*.py")), re.M))
    assert named and not named - defined


def test_the_error_bounds_are_those_that_tests_use() -> None:
    """Of the table, and of the docstring."""
    rows = re.findall(r"^\| (float\d+|bfloat16) \| ([\d.e-]+) \| (0|2\^-\d+) \|", ACCURACY, re.M)
    stated = {getattr(torch, dtype): {"sum": float(u), "result": _power(r)} for dtype, u, r in rows}
    assert stated == ERRORS
    said = re.search(
        r"u = (\S+) \((\S+) for float64 exits\).* float16\s+exits add (\S+) and bfloat16 exits (\S+) of the element",
        srf.exit_loss_matrix.__doc__ or "",
        re.S,
    )
    assert said
    assert [float(u) for u in said.groups()[:2]] == [ERRORS[d]["sum"] for d in (torch.float32, torch.float64)]
    assert [_power(r) for r in said.groups()[2:]] == [ERRORS[d]["result"] for d in (torch.float16, torch.bfloat16)]


def _code(heading: str) -> str:
    return re.search(rf"## {heading}\n.*?```python\n(.*?)```", FRONT, re.S)[1]


def test_the_front_door_is_short() -> None:
    assert len(FRONT.splitlines()) <= 150 and len(FRONT.split()) <= 1500


def test_links_lead_somewhere() -> None:
    root = HERE.parent
    documents = [*root.glob("*.md"), *(root / "docs").glob("*.md"), root / ".ci" / "README.md", HERE / "README.md"]
    assert len(documents) > 10
    for document in documents:
        for link in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
            assert link.startswith("https://") or (document.parent / link).exists(), (document.name, link)


def test_the_quick_start_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, on a network with these stages; the checkpoint loads, and SR is on after the warm-up only."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential()
    for i in range(3):
        net.add_module(f"layer{i + 1}", nn.Conv2d(3 if i == 0 else 8, 8, 3, stride=2, padding=1))
    net.add_module("classifier", nn.Conv2d(8, 19, 1))
    batch = (torch.randn(2, 3, 32, 32), torch.randint(19, (2, 32, 32)).to(torch.uint8))
    names = {"net": net, "loader": [batch] * 3, "warm_up": 2}
    code = _code("Quick start").replace("    optimizer.step()\n", "    optimizer.step()\n    seen.append(loss)\n")
    exec(code, names := names | {"seen": []})
    assert [bool(loss.sr_f > 0) and bool(loss.sr_l > 0) for loss in names["seen"]] == [False, False, True]
    assert names["seen"][-1].mea < names["seen"][0].mea
    assert names["output"].shape == (2, 19, 4, 4)
    names["model"].load_state_dict(torch.load("all.pt"))


def test_the_options_are_the_defaults() -> None:
    """All of the criterion, with their values."""
    call = next(node for node in ast.walk(ast.parse(_code("Options"))) if isinstance(node, ast.Call) and node.keywords)
    stated = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    of_images = re.search(r"# image-level predictions: (.*)", FRONT)[1]
    stated |= {k.arg: ast.literal_eval(k.value) for k in ast.parse(f"f({of_images})").body[0].value.keywords}
    parameters = inspect.signature(srf.SelfRegulationLoss.__init__).parameters
    assert stated == {name: p.default for name, p in parameters.items() if name != "self"}


def _power(text: str) -> float:
    return 2.0 ** float(text.removeprefix("2^")) if "^" in text else float(text)
