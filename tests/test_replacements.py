"""Common PyTorch code and what replaces it: value and gradient of every row of docs/replacements.md, and its traps."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support import RELATIVE, Backend, assert_close, gradients, leaves, make_exits, make_labels
from torch import nn

import selfreg_fast as srf

H, W, C, TAU = 6, 8, 5, 2.0
DOUBLE = RELATIVE[torch.float64]
DOCUMENT = Path(__file__).parents[1] / "docs" / "replacements.md"


class Row(NamedTuple):
    """Two expressions with the same gradient, and what the fused one's value has above the plain one's."""

    plain: str
    fused: str
    above: str = "0"


# kl_div is below cross-entropy by the teacher's entropy, a constant; the document says how to compute it.
ROWS = {
    "cross-entropy of resized exits": Row(
        "sum(F.cross_entropy(F.interpolate(z, labels.shape[1:], mode='bilinear'), labels.long(), ignore_index=255)"
        " for z in logits)",
        "srf.mea_loss(logits, labels)",
    ),
    "auxiliary head": Row(
        "F.cross_entropy(s, labels, ignore_index=255) + 0.4 * F.cross_entropy(t, labels, ignore_index=255)",
        "srf.mea_loss([t, s], labels, exit_weights=[0.4, 1])",
    ),
    "class weights and void": Row(
        "F.cross_entropy(s, labels, class_weight, ignore_index=255)",
        "srf.mea_loss([s], labels, class_weight=class_weight)",
    ),
    "labels and a frozen teacher": Row(
        "F.cross_entropy(s, labels, ignore_index=255)"
        " + 0.5 * tau**2 * F.cross_entropy(s / tau, (t.detach() / tau).softmax(1))",
        "srf.self_regulation_loss([s, t], labels, exit_weights=[1, 0], sr_f_weight=None, sr_l_weight=0.5,"
        " temperature=tau, renormalize=True).total",
    ),
    "labels and a frozen teacher, kl_div": Row(
        "F.cross_entropy(s, labels, ignore_index=255) + 0.5 * tau**2 * F.kl_div((s / tau).log_softmax(1),"
        " (t.detach() / tau).softmax(1), reduction='none').sum(1).mean()",
        "srf.self_regulation_loss([s, t], labels, exit_weights=[1, 0], sr_f_weight=None, sr_l_weight=0.5,"
        " temperature=tau, renormalize=True).total",
        "0.5 * tau**2 * entropy",
    ),
    "mmseg CrossEntropyLoss": Row(
        "F.cross_entropy(s, labels, ignore_index=255, reduction='none').mean()",
        "srf.mea_loss([s], labels, reduction='sum') / labels.numel()",
    ),
    "hard pixels": Row(
        "F.cross_entropy(s, labels, ignore_index=255, reduction='none').flatten().topk(9)[0].mean()",
        "srf.mea_loss([s], labels, reduction='none').flatten().topk(9)[0].mean()",
    ),
    "soft labels": Row(
        "tau**2 * F.cross_entropy(s / tau, (t.detach() / tau).softmax(1))",
        "srf.sr_l_loss([s, t], temperature=tau, renormalize=True)",
    ),
    "kl_div by pixel": Row(
        "tau**2 * F.kl_div((s / tau).log_softmax(1), (t.detach() / tau).softmax(1), reduction='none').sum(1).mean()",
        "srf.sr_l_loss([s, t], temperature=tau, renormalize=True)",
        "tau**2 * entropy",
    ),
    "kl_div batchmean, mmrazor KLDivergence": Row(
        "tau**2 * F.kl_div((s / tau).log_softmax(1), (t.detach() / tau).softmax(1), reduction='batchmean')",
        "srf.sr_l_loss([s, t], temperature=tau, renormalize=True, reduction='sum') / len(s)",
        "tau**2 * entropy * H * W",
    ),
    "kl_div mean, no tau squared": Row(
        "F.kl_div((s / tau).log_softmax(1), (t.detach() / tau).softmax(1), reduction='mean')",
        "srf.sr_l_loss([s, t], temperature=tau, renormalize=True) / (tau**2 * s.shape[1])",
        "entropy / C",
    ),
    "distillation where there are labels": Row(
        "(tau**2 * F.kl_div((s / tau).log_softmax(1), (t.detach() / tau).softmax(1), reduction='none').sum(1)"
        " * (labels != 255)).sum() / (labels != 255).sum()",
        "srf.exit_loss_matrix([s, t], labels, teachers=[1], temperature=tau, renormalize=True, mask_soft=True)[1, 0]",
        "tau**2 * labelled_entropy",
    ),
    "mmrazor ChannelWiseDivergence": Row(
        "tau**2 * F.kl_div((s / tau).flatten(2).log_softmax(2), (t.detach() / tau).flatten(2).softmax(2),"
        " reduction='sum') / (s.shape[0] * s.shape[1])",
        "srf.sr_l_loss([z.flatten(2).transpose(1, 2) for z in (s, t)], temperature=tau, renormalize=True)",
        "tau**2 * spatial_entropy",
    ),
    "mutual learning": Row(
        "sum(F.kl_div(a.log_softmax(1), b.detach().softmax(1), reduction='none').sum(1).mean()"
        " for a in (s, t) for b in (s, t) if a is not b)",
        "srf.exit_loss_matrix([s, t], teachers=[0, 1])[1:].sum()",
        "entropies",
    ),
    "pseudo-labels": Row("F.cross_entropy(s, t.argmax(1))", "srf.sr_l_loss([s, t], target='argmax')"),
    "the paper's SR-L": Row(
        "sum(-(tau**2) * (t.detach().softmax(1)**(1/tau) * (z.softmax(1)**(1/tau)).log()).sum(1).mean() for z in [s])",
        "srf.sr_l_loss([s, t], temperature=tau)",
    ),
    "published SR-F": Row(
        "sum(F.nll_loss(z.log_softmax(1), out[1].argmax(1)) for z in out[2:] + out[:1])",
        "srf.sr_f_loss(logits, target='argmax', size=(H, W), align_corners=True)",
    ),
    "published SR-L": Row(
        "sum(F.binary_cross_entropy(p, pred[0].detach()) for p in pred[1:])",
        "srf.presence_distillation_loss(image_logits)",
    ),
    "published MEA": Row(
        "0.2 * sum(F.binary_cross_entropy(p, present) for p in pred)"
        " + 0.8 * sum(F.nll_loss(z.log_softmax(1), labels_100) for z in out)",
        "srf.SelfRegulationLoss.published(align_corners=True, ignore_index=-100).enable_sr(False)"
        "(logits, labels_100, image_logits=image_logits).total",
    ),
    "published objective": Row(
        "0.2 * sum(F.binary_cross_entropy(p, present) for p in pred)"
        " + 0.8 * sum(F.nll_loss(z.log_softmax(1), labels_100) for z in out)"
        " + sum(F.binary_cross_entropy(p, pred[0].detach()) for p in pred[1:])"
        " + sum(F.nll_loss(z.log_softmax(1), out[1].argmax(1)) for z in out[2:] + out[:1])",
        "srf.SelfRegulationLoss.published(align_corners=True, ignore_index=-100)"
        "(logits, labels_100, image_logits=image_logits).total",
    ),
}


def _on(backend: Backend) -> Any:
    """The package with `backend` as the default of every function and module."""
    functions = ("mea_loss", "sr_f_loss", "sr_l_loss", "self_regulation_loss", "exit_loss_matrix")
    bound = {name: functools.partial(getattr(srf, name), backend=backend.name) for name in functions}
    published = functools.partial(srf.SelfRegulationLoss.published, backend=backend.name)
    return SimpleNamespace(
        **bound,
        presence_distillation_loss=srf.presence_distillation_loss,
        SelfRegulationLoss=SimpleNamespace(published=published),
    )


def _names(backend: Backend) -> dict[str, Any]:
    """What the rows' names stand for: exits s and t of the labels' size, `logits` of all sizes, shallow to deep."""
    double = {"dtype": torch.float64, "device": backend.device}
    logits = leaves(make_exits(3, (2, C, H, W), sizes=[(5, 4), (6, 8), (3, 4)], **double))
    s, t = leaves(make_exits(2, (2, C, H, W), seed=7, **double))
    image_logits = leaves(make_exits(3, (2, C), seed=8, **double))
    labels = make_labels((2, H, W), C, device=backend.device)
    deepest_first = [-1, *range(len(logits) - 1)]
    resize = nn.UpsamplingBilinear2d((H, W))

    entropies: dict[str, Any] = {"s": s.detach(), "t": t.detach(), "labels": labels, "tau": TAU}
    exec(re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)[1], entropies)
    return entropies | {
        "F": F,
        "srf": _on(backend),
        "logits": logits,
        "s": s,
        "t": t,
        "image_logits": image_logits,
        "out": [resize(logits[i]) for i in deepest_first],  # as the published network returns them
        "pred": [image_logits[i].sigmoid() for i in deepest_first],
        "present": torch.stack([torch.histc(y.cpu().double(), C, 0, C - 1) > 0 for y in labels]).to(s),
        "labels": labels,
        "class_weight": torch.linspace(0.5, 2, C, **double),
        "labels_100": labels.where(labels != 255, -100),
        "tau": TAU,
        "H": H,
        "W": W,
        "C": C,
    }


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_the_fused_loss_replaces_the_plain_one(backend: Backend, name: str) -> None:
    row, names = ROWS[name], _names(backend)
    plain, fused, above = (eval(code, {**names}) for code in row)
    # Some rows are small differences of large numbers.
    assert_close(fused.detach() - above, plain.detach(), 10 * DOUBLE)
    inputs = [*names["logits"], names["s"], names["t"], *names["image_logits"]]
    actual, expected = gradients(fused, inputs), gradients(plain, inputs)
    assert any(g.any() for g in expected)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, DOUBLE)


def _rows_of(document: str) -> list[list[str]]:
    """The cells of its lines that have a replacement in the second one, without the marks of code."""
    lines = (Path(__file__).parents[1] / document).read_text().splitlines()
    cells = [[cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    return [line for line in cells if len(line) > 1 and line[1].startswith("srf.")]


def test_the_documents_have_these_rows() -> None:
    """Every line of their tables is a row here, and says with its sign what the value has above the plain one's."""
    stated = [(plain, fused, above.lstrip("+ `")) for plain, fused, above, _ in _rows_of("docs/replacements.md")]
    assert len(stated) == len(set(stated)) >= 14
    assert set(stated) <= set(map(tuple, ROWS.values()))
    same = {row[:2] for row in ROWS.values() if row.above == "0"}
    assert len(_rows_of("README.md")) >= 4 and set(map(tuple, _rows_of("README.md"))) <= same


def test_the_trap_of_255(backend: Backend) -> None:
    """F.cross_entropy ignores -100 unless told; here 255 is the default. All ignored: it gives NaN, and we 0."""
    names = _names(backend)
    s, labels = names["s"], names["labels"]
    if backend.device == "cpu":  # on a GPU the plain loss ends the process's use of it
        with pytest.raises(IndexError):
            F.cross_entropy(s, labels)
    ignored = torch.full_like(labels, 255)
    assert F.cross_entropy(s, ignored, ignore_index=255).isnan()
    assert names["srf"].mea_loss([s], ignored) == 0


def test_the_trap_of_align_corners(backend: Backend) -> None:
    """nn.UpsamplingBilinear2d is align_corners=True, which is not the default of F.interpolate, nor ours."""
    names = _names(backend)
    loss = functools.partial(names["srf"].mea_loss, names["logits"], names["labels"])
    plain = sum(F.cross_entropy(z, names["labels"], ignore_index=255) for z in names["out"])
    assert_close(loss(align_corners=True).detach(), plain.detach(), DOUBLE)
    assert (loss() - plain).abs() > 0.01


def test_the_trap_of_the_teacher_that_is_not_detached(backend: Backend) -> None:
    """kl_div's entropy has a gradient, too, if the teacher learns: the replacement needs it written beside."""
    names = _names(backend)
    s, t = names["s"], names["t"]
    plain = TAU**2 * F.kl_div((s / TAU).log_softmax(1), (t / TAU).softmax(1), reduction="none").sum(1).mean()
    fused = names["srf"].sr_l_loss([s, t], temperature=TAU, renormalize=True, detach_teacher=False)
    q = (t / TAU).log_softmax(1)
    entropy = -(q.exp() * q).sum(1).mean()
    expected, entropys = gradients(plain, [s, t]), gradients(TAU**2 * entropy, [s, t])
    for a, b, e in zip(gradients(fused, [s, t]), entropys, expected, strict=True):
        assert_close(a - b, e, DOUBLE)
    assert entropys[1].norm() > 0.1 * expected[1].norm()


def test_the_trap_of_the_order(backend: Backend) -> None:
    """The published network returns the deepest exit first; here exits go from shallow to deep."""
    names = _names(backend)
    right = names["srf"].sr_f_loss(names["out"][1:] + names["out"][:1], target="argmax")
    assert (names["srf"].sr_f_loss(names["out"], target="argmax") - right).abs() > 0.01
