"""Self-Regulation added to a torchvision-style DeepLab in five lines (numbered): python examples/deeplab.py [STEPS]"""

import sys
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import selfreg_fast as srf

NUM_CLASSES, SIZE = 5, 64


def conv_bn(c: int, out: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c, out, kernel, stride, kernel // 2 * dilation, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


class Block(nn.Module):
    def __init__(self, c: int, out: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn(c, out, 3, stride), conv_bn(out, out, 3, 1, dilation)
        self.downsample = conv_bn(c, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.downsample(x))


class DeepLab(nn.Module):
    """A small ResNet of output stride 8 with a DeepLab v3 head; returns {"out": logits at the images' size}."""

    def __init__(self, w: int = 16) -> None:
        super().__init__()
        blocks = {"layer1": Block(w, w, 1, 1), "layer2": Block(w, 2 * w, 2, 1), "layer3": Block(2 * w, 4 * w, 2, 1)}
        self.backbone = nn.Sequential(OrderedDict(stem=conv_bn(3, w, 3, 2), **blocks, layer4=Block(4 * w, 8 * w, 1, 2)))
        self.aspp = nn.ModuleList(conv_bn(8 * w, w, 3, dilation=d) for d in (1, 2, 4))
        self.classifier = nn.Conv2d(3 * w, NUM_CLASSES, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.backbone(images)
        x = self.classifier(torch.cat([F.relu(branch(x)) for branch in self.aspp], 1))
        return {"out": F.interpolate(x, size=images.shape[2:], mode="bilinear", align_corners=False)}


def generated(batch: int) -> tuple[Tensor, Tensor]:
    """Images of noisy squares, one colour a class, and their labels (uint8, ignored at the upper edge)."""
    labels = torch.randint(NUM_CLASSES, (batch, 4, 4)).repeat_interleave(SIZE // 4, 1).repeat_interleave(SIZE // 4, 2)
    colours = torch.linspace(0, 2.5, NUM_CLASSES)[labels]
    images = torch.stack([colours.cos(), colours.sin(), -colours.cos()], 1) + 0.3 * torch.randn(batch, 3, SIZE, SIZE)
    labels[:, :2] = 255
    return images, labels.to(torch.uint8)


def main(steps: int = 40) -> list[float]:
    torch.manual_seed(0)
    network, losses = DeepLab(), []
    stages = ("backbone.layer1", "backbone.layer2", "backbone.layer3")  # 1
    model = srf.MultiExit(network, stages, NUM_CLASSES, example=torch.zeros(1, 3, SIZE, SIZE))  # 2
    criterion = srf.SelfRegulationLoss(sr_f_weight=0.1, sr_l_weight=0.1, ignore_index=255)  # 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)  # the exits have parameters of their own
    for step in range(steps):
        images, labels = generated(4)
        criterion.enable_sr(step >= steps // 4)  # 4: MEA alone first
        loss = criterion(model(images), labels)  # 5
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.mea.item())
        print(f"step {step:3}  total {loss.total:.3f}  MEA {loss.mea:.3f}  SR-F {loss.sr_f:.3f}  SR-L {loss.sr_l:.3f}")
    images, labels = generated(16)
    with torch.no_grad():
        predicted = model.eval()(images)["out"].argmax(1)  # in evaluation mode the network alone runs
    print(f"pixel accuracy {(predicted == labels)[labels != 255].float().mean():.2f}")
    DeepLab().load_state_dict(network.state_dict())  # a checkpoint of the network knows nothing of exits
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
