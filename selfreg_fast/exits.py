"""Exits for a multi-exit network: the head that turns a stage's features into class logits."""

from __future__ import annotations

from torch import nn


class ExitHead(nn.Sequential):
    """The published exit: two 3x3 conv-BatchNorm-ReLU and a 1x1 conv to class logits.

    Called with features (B, in_channels, H, W), it returns logits (B, num_classes, H, W).

    Args:
        in_channels: channels of the stage's features (B, in_channels, H, W).
        num_classes: channels of the logits (B, num_classes, H, W).
        hidden_channels: channels in between; default 256, the published code's.

    Source: the published code of Zhang et al., ICCV 2021.
    """

    def __init__(self, in_channels: int, num_classes: int, hidden_channels: int = 256) -> None:
        super().__init__(
            *_conv_bn_relu(in_channels, hidden_channels),
            *_conv_bn_relu(hidden_channels, hidden_channels),
            nn.Conv2d(hidden_channels, num_classes, 1),
        )


def _conv_bn_relu(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]
