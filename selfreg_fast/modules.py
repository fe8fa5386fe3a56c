"""`SelfRegulationLoss`: options held, functions called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from . import functional
from .distributed import Group


class SelfRegulationLoss(nn.Module):
    r"""The whole Self-Regulation objective as a module: :func:`selfreg_fast.self_regulation_loss` with its options.

    The authors train on MEA alone first (10,000 iterations) and then add the SR terms. That switch depends on the step
    only, so that a resumed run needs no state::

        criterion = SelfRegulationLoss(temperature=2.0)
        for step, (images, labels) in enumerate(loader):
            criterion.enable_sr(step >= 10_000)
            loss = criterion(model(images), labels).total

    Args:
        mea_weight, sr_f_weight, sr_l_weight, seg_weight, cls_weight, temperature, renormalize, target, ignore_index,
            label_smoothing, exit_weights, size, align_corners, reduction, detach_teacher, process_group, backend,
            validate: as in :func:`selfreg_fast.self_regulation_loss`, same defaults.
        class_weight: (C,) floating, kept as a buffer that moves with the module but is not saved with it.
        image_level_sr_l: True: SR-L is :func:`selfreg_fast.presence_distillation_loss` of the image-level predictions
            instead of the loss between logits.

    Raises:
        TypeError, ValueError: on the first call, as :func:`selfreg_fast.self_regulation_loss`.

    Source: Zhang et al., ICCV 2021.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        mea_weight: float | None = 1.0,
        sr_f_weight: float | None = 1.0,
        sr_l_weight: float | None = 1.0,
        seg_weight: float = 0.8,
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
        self.register_buffer("class_weight", class_weight, persistent=False)

    @classmethod
    def published(cls, **options: Any) -> SelfRegulationLoss:
        """The variant of the paper's published code, which differs from the paper's formulas.

        SR-F by argmax of the shallowest logits as hard labels, SR-L as binary cross-entropy between image-level
        predictions, MEA = 0.8 segmentation + 0.2 image-level, both SR terms with weight 1. Its forward needs
        `image_logits`.

        Args:
            options: override any option of :class:`SelfRegulationLoss`.
        """
        return cls(**{"target": "argmax", "image_level_sr_l": True, **options})

    def enable_sr(self, enabled: bool = True) -> SelfRegulationLoss:
        """Switches SR-F and SR-L on or off; off, they are not computed and returned as 0. Returns the module."""
        self.sr_enabled = bool(enabled)
        return self

    def forward(
        self,
        logits: Sequence[Tensor],
        labels: Tensor,
        *,
        features: Sequence[Tensor] | None = None,
        image_logits: Sequence[Tensor] | None = None,
        presence: Tensor | None = None,
        pixel_weight: Tensor | None = None,
    ) -> functional.SelfRegulationOutput:
        """`SelfRegulationOutput(total, mea, sr_f, sr_l)`; arguments as :func:`selfreg_fast.self_regulation_loss`."""
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
            output = output._replace(total=output.total + sr_l_weight * sr_l, sr_l=sr_l)
        return output

    def extra_repr(self) -> str:
        shown = {name: value for name, value in self.options.items() if value is not None}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
