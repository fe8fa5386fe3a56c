"""Self-Regulation added to a DeepLab in five lines (numbered below): a torchvision-style network, generated data.

python examples/deeplab.py [STEPS]        some seconds on a CPU
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import selfreg_fast as srf

NUM_CLASSES = 5


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn(inputs, outputs, 3, stride), conv_bn(outputs, outputs, 3, 1, dilation)
        self.downsample = conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.downsample(x))


class DeepLab(nn.Module):
    """A small ResNet of output stride 8 with a DeepLab v3 head; returns {"out": logits at the images' size}."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.backbone = nn.Sequential()
        self.backbone.add_module("stem", conv_bn(3, width, 3, 2))
        for i, (stride, dilation) in enumerate([(1, 1), (2, 1), (2, 1), (1, 2)]):
            block = Block(width * 2 ** max(i - 1, 0), width * 2**i, stride, dilation)
            self.backbone.add_module(f"layer{i + 1}", block)
        self.aspp = nn.ModuleList(conv_bn(8 * width, width, 3, dilation=d) for d in (1, 2, 4))
        self.classifier = nn.Conv2d(3 * width, NUM_CLASSES, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.backbone(images)
        x = self.classifier(torch.cat([F.relu(branch(x)) for branch in self.aspp], 1))
        return {"out": F.interpolate(x, size=images.shape[2:], mode="bilinear", align_corners=False)}


def generated(batch: int, size: int = 64) -> tuple[Tensor, Tensor]:
    """Images of noisy squares, one colour a class, and their labels (uint8, ignored at the upper edge)."""
    labels = torch.randint(NUM_CLASSES, (batch, 4, 4)).repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2)
    colours = torch.linspace(0, 2.5, NUM_CLASSES)[labels]
    images = torch.stack([colours.cos(), colours.sin(), -colours.cos()], 1) + 0.3 * torch.randn(batch, 3, size, size)
    labels[:, :2] = 255
    return images, labels.to(torch.uint8)


def main(steps: int = 40) -> list[float]:
    torch.manual_seed(0)
    network = DeepLab()
    stages = ("backbone.layer1", "backbone.layer2", "backbone.layer3")  # 1
    model = srf.MultiExit(network, stages, NUM_CLASSES, example=torch.zeros(1, 3, 64, 64), feature_channels=16)  # 2
    criterion = srf.SelfRegulationLoss(sr_f_weight=0.1, sr_l_weight=0.2, ignore_index=255)  # 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for step in range(steps):
        images, labels = generated(4)
        out = model(images)  # 4
        loss = criterion(out.logits, labels, features=out.features)  # 5
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.mea.item())
        print(f"step {step:3}  total {loss.total:.3f}  MEA {loss.mea:.3f}  SR-F {loss.sr_f:.3f}  SR-L {loss.sr_l:.3f}")
    images, labels = generated(4)
    predicted = model.eval()(images)["out"].argmax(1)  # in evaluation mode the network alone runs
    print(f"pixel accuracy {(predicted == labels)[labels != 255].float().mean():.2f}")
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
