"""`SelfRegulationLoss`: options held, functions called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from . import checks, functional
from .backends import check_name
from .distributed import Group, check_kind
from .exits import MultiExitOutput


class SelfRegulationLoss(nn.Module):
    r"""The whole Self-Regulation objective as a module: `self_regulation_loss` with its options.

    Settings to begin with, on MEA alone for about a quarter of the steps (the authors: 10,000). That switch depends on
    the step only, so that a resumed run needs no state:

        criterion = SelfRegulationLoss(sr_f_weight=0.1, sr_l_weight=0.1, ignore_index=255)
        for step, (images, labels) in enumerate(loader):
            criterion.enable_sr(step >= warm_up)
            criterion(model(images), labels).total.backward()

    It returns a tuple, `SelfRegulationOutput(total, mea, sr_f, sr_l)`: back-propagate its `.total`. A `sum` over the
    tuple, as over losses in a dict, has every part twice.

        total = mea_weight MEA + sr_f_weight SR-F + sr_l_weight SR-L
        MEA = seg_weight Σ_i exit_weights[i] CE(exit i, labels) + cls_weight Σ_i BCE(image-level i, presence)
        SR-F = Σ_{i ≥ 1} L(exit 0 → exit i)        SR-L = Σ_{k < N-1} L(exit N-1 → exit k)

    Args:
        mea_weight: weight of MEA, each exit's cross-entropy with the labels. 0: computed and returned, but without part
            in the total. None: left out and returned as 0.
        sr_f_weight: weight of SR-F, by which the shallowest exit teaches every deeper one; 0 and None as above.
        sr_l_weight: weight of SR-L, by which the deepest exit teaches every shallower one; 0 and None as above.
        seg_weight: weight of MEA's part of pixels; None: 0.8 with image-level predictions, as published, else 1.
        cls_weight: weight of MEA's part of image-level predictions.
        temperature: tau > 0 of SR-F and SR-L. At 1 the two values of `renormalize` are the same.
        renormalize: False: teacher and student are powers of their softmax, as in the paper, whose sum is above 1 where
            tau is: the loss and its gradient grow with the channels. True: softmax(z / tau), as in distillation; to be
            preferred above tau = 1.
        target: "soft", or "argmax": the teacher's most likely class is a hard label, as in the published code.
        ignore_index: label that does not count in MEA (SR-F and SR-L count all pixels; see `pixel_weight`).
        class_weight: (C,) floating, as the `weight` of `nn.CrossEntropyLoss`: kept as a buffer that moves and is saved
            with the module. A `state_dict` without it can be loaded: the module keeps its own (which after `to_empty`
            is what lay in memory).
        label_smoothing: in [0, 1], as in `nn.CrossEntropyLoss`.
        exit_weights: a number for each exit's cross-entropy, shallow to deep; None: 1.
        size: (H, W) to which all exits are resized, bilinearly, within the kernels; None: the labels' size.
        align_corners: as in `F.interpolate`.
        reduction: "mean", over the pixels that count, and 0 where none does; "sum"; or "none": (B, H, W) maps.
        detach_teacher: True: teachers get no gradient from what they teach.
        image_level_sr_l: True: SR-L is `presence_distillation_loss` of the image-level predictions instead of the loss
            between logits, as in the published code.
        process_group: "world" or a `torch.distributed.ProcessGroup`: the mean is over the pixels of all its ranks,
            however unevenly they are labelled. None: over this process's.
        backend: "auto": CUDA tensors take "cuda", else "triton", else "reference"; CPU tensors "cpu", else "reference".
        validate: True: on a GPU, too, a label out of range is an error, for which every call waits; else it makes the
            loss NaN there. On a CPU it always is one.

    Raises:
        TypeError, ValueError: an option is not as described. Whether it fits the exits, a call tells, as
            `self_regulation_loss` does.

    Source: Zhang et al., ICCV 2021.
    """

    class_weight: Tensor | None

    @checks.named
    def __init__(
        self,
        *,
        mea_weight: float | None = 1.0,
        sr_f_weight: float | None = 1.0,
        sr_l_weight: float | None = 1.0,
        seg_weight: float | None = None,
        cls_weight: float = 0.2,
        temperature: float = 1.0,
        renormalize: bool = False,
        target: str = "soft",
        ignore_index: int = 255,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        exit_weights: Sequence[float] | None = None,
        size: Sequence[int] | None = None,
        align_corners: bool = False,
        reduction: str = "mean",
        detach_teacher: bool = True,
        image_level_sr_l: bool = False,
        process_group: Group = None,
        backend: str = "auto",
        validate: bool = False,
    ) -> None:
        super().__init__()
        for name, weight in (("mea", mea_weight), ("sr_f", sr_f_weight), ("sr_l", sr_l_weight), ("seg", seg_weight)):
            checks.part_weight(weight, f"{name}_weight")
        checks.number(cls_weight, "cls_weight")
        checks.exit_weights_of(exit_weights, None)
        checks.check_size(size)
        checks.check_options(
            temperature=temperature,
            target=target,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            renormalize=renormalize,
            align_corners=align_corners,
            detach_teacher=detach_teacher,
            image_level_sr_l=image_level_sr_l,
            validate=validate,
        )
        check_name(backend)
        check_kind(process_group, reduction)
        if class_weight is not None:
            checks.check_class_weight(class_weight)
        self.options: dict[str, Any] = {
            "mea_weight": mea_weight,
            "sr_f_weight": sr_f_weight,
            "sr_l_weight": sr_l_weight,
            "seg_weight": seg_weight,
            "cls_weight": cls_weight,
            "temperature": temperature,
            "renormalize": renormalize,
            "target": target,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "exit_weights": exit_weights,
            "size": size,
            "align_corners": align_corners,
            "reduction": reduction,
            "detach_teacher": detach_teacher,
            "process_group": process_group,
            "backend": backend,
            "validate": validate,
        }
        self.image_level_sr_l = image_level_sr_l
        self.sr_enabled = True
        self.register_buffer("class_weight", class_weight)

    @classmethod
    def published(cls, **options: Any) -> SelfRegulationLoss:
        """The variant of the paper's published code, which differs from the paper's formulas.

        SR-F by argmax of the shallowest logits as hard labels, SR-L as binary cross-entropy between image-level
        predictions, MEA = 0.8 segmentation + 0.2 image-level, both SR terms with weight 1. Its forward needs
        `image_logits`.

        Args:
            options: override any option of `SelfRegulationLoss`.
        """
        return cls(**{"target": "argmax", "image_level_sr_l": True, **options})

    def enable_sr(self, enabled: bool = True) -> SelfRegulationLoss:
        """Switches SR-F and SR-L on or off; off, they are not computed and returned as 0. Returns the module."""
        self.sr_enabled = bool(enabled)
        return self

    @checks.named
    def forward(
        self,
        logits: Sequence[Tensor] | MultiExitOutput,
        labels: Tensor,
        *,
        features: Sequence[Tensor] | None = None,
        image_logits: Sequence[Tensor] | None = None,
        presence: Tensor | None = None,
        pixel_weight: Tensor | None = None,
    ) -> functional.SelfRegulationOutput:
        """`SelfRegulationOutput(total, mea, sr_f, sr_l)`; arguments as `self_regulation_loss`.

        For `logits`, what `MultiExit` returns in training can be given: then `features` and
        `image_logits` are its own, unless others are given. (Not its features with `target="argmax"`, whose classes are
        those of logits, nor where there is only one: then SR-F runs on the logits.)
        """
        if isinstance(logits, MultiExitOutput):
            if features is None and len(logits.features) > 1 and self.options["target"] != "argmax":
                features = logits.features
            if image_logits is None:
                image_logits = logits.image_logits
            logits = logits.logits
        options = dict(self.options)
        sr_l_weight = options["sr_l_weight"]
        if not self.sr_enabled:
            options.update(sr_f_weight=None, sr_l_weight=None)
        elif self.image_level_sr_l:
            options["sr_l_weight"] = None
        output = functional.self_regulation_loss(
            logits,
            labels,
            features=features if self.sr_enabled else None,
            image_logits=image_logits,
            presence=presence,
            class_weight=self.class_weight,
            pixel_weight=pixel_weight,
            **options,
        )
        if self.image_level_sr_l and self.sr_enabled and sr_l_weight is not None:
            if image_logits is None:
                raise ValueError("image_logits: expected one (B, K) tensor for each exit (image_level_sr_l), got None")
            sr_l = functional.presence_distillation_loss(image_logits, process_group=options["process_group"])
            sr_l = sr_l.to(output.total.dtype)
            total = output.total + float(sr_l_weight) * sr_l if sr_l_weight else output.total
            output = output._replace(total=total, sr_l=sr_l)
        return output

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes what was saved without class weights, as version 0.1 did, too; not where there are none on meta."""
        if self.class_weight is not None and not self.class_weight.is_meta:
            state_dict.setdefault(prefix + "class_weight", self.class_weight)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        shown = {name: repr(value) for name, value in self.options.items() if value is not None}
        if self.class_weight is not None:
            few = len(self.class_weight) <= 8 and checks.has_values(self.class_weight)
            values = ", ".join(f"{w:g}" for w in self.class_weight.tolist()) if few else "..."
            shown["class_weight"] = f"[{values}] of {len(self.class_weight)} classes"
        if self.image_level_sr_l:
            shown["image_level_sr_l"] = "True"
        if not self.sr_enabled:
            shown["sr_enabled"] = "False"
        return ", ".join(f"{name}={value}" for name, value in shown.items())
