"""Self-Regulation added to a U-Net of segmentation-models-pytorch: python examples/smp_unet.py [STEPS]

Untrained, on generated data; some seconds on a CPU. Needs `pip install segmentation-models-pytorch`.
"""

import re
import sys

import segmentation_models_pytorch as smp
import torch
from torch import Tensor

import selfreg_fast as srf

NUM_CLASSES, SIZE = 5, 64


def generated(batch: int) -> tuple[Tensor, Tensor]:
    """Images of noisy squares, one colour a class, and their labels (uint8, ignored at the upper edge)."""
    labels = torch.randint(NUM_CLASSES, (batch, 4, 4)).repeat_interleave(SIZE // 4, 1).repeat_interleave(SIZE // 4, 2)
    colours = torch.linspace(0, 2.5, NUM_CLASSES)[labels]
    images = torch.stack([colours.cos(), colours.sin(), -colours.cos()], 1) + 0.3 * torch.randn(batch, 3, SIZE, SIZE)
    labels[:, :2] = 255
    return images, labels.to(torch.uint8)


def main(steps: int = 40) -> list[float]:
    torch.manual_seed(0)
    network, losses = smp.Unet("resnet18", encoder_weights=None, classes=NUM_CLASSES), []
    # Shallow to deep is the order of computation: the encoder's stages, the decoder's blocks, the network's own output.
    # The shallowest exit teaches details, so it belongs on an early stage of the encoder: the decoder begins with the
    # coarsest map of all. The deepest teaches semantics: the network's own output, behind the last decoder block.
    stages = [name for name, _ in network.named_modules() if re.fullmatch(r"encoder\.layer[1-3]", name)]
    model = srf.MultiExit(network, stages, NUM_CLASSES, example=torch.zeros(1, 3, SIZE, SIZE))
    criterion = srf.SelfRegulationLoss(sr_f_weight=0.1, sr_l_weight=0.1, ignore_index=255)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # the exits have parameters of their own
    for step in range(steps):
        images, labels = generated(4)
        criterion.enable_sr(step >= steps // 4)  # MEA alone first
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.mea.item())
        print(f"step {step:3}  total {loss.total:.3f}  MEA {loss.mea:.3f}  SR-F {loss.sr_f:.3f}  SR-L {loss.sr_l:.3f}")
    images, labels = generated(16)
    with torch.no_grad():
        predicted = model.eval()(images).argmax(1)  # in evaluation mode the network alone runs
    print(f"pixel accuracy {(predicted == labels)[labels != 255].float().mean():.2f}")
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
