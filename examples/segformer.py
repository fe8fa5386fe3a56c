"""Self-Regulation added to a SegFormer of transformers in five lines (numbered): python examples/segformer.py [STEPS]

It is built from its config, without weights; some seconds on a CPU. Needs `pip install transformers`.
"""

import re
import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SegformerConfig, SegformerForSemanticSegmentation

import selfreg_fast as srf

NUM_CLASSES, HEIGHT, WIDTH = 5, 64, 96
CONFIG = SegformerConfig(
    num_labels=NUM_CLASSES,
    depths=[1, 1, 1, 1],
    hidden_sizes=[16, 32, 48, 64],
    num_attention_heads=[1, 2, 3, 4],
    decoder_hidden_size=64,
)


def generated(batch: int) -> tuple[Tensor, Tensor]:
    """Images of noisy fields, one colour a class, and their labels (uint8, ignored at the upper edge)."""
    labels = torch.randint(NUM_CLASSES, (batch, 4, 4))
    labels = labels.repeat_interleave(HEIGHT // 4, 1).repeat_interleave(WIDTH // 4, 2)
    colours = torch.linspace(0, 2.5, NUM_CLASSES)[labels]
    colours = torch.stack([colours.cos(), colours.sin(), -colours.cos()], 1)
    labels[:, :2] = 255
    return colours + 0.3 * torch.randn(batch, 3, HEIGHT, WIDTH), labels.to(torch.uint8)


def main(steps: int = 40) -> list[float]:
    torch.manual_seed(0)
    network, losses = SegformerForSemanticSegmentation(CONFIG), []
    # The norms that end its stages; their output is tokens (B, L, C). transformers 5 has other names than 4.
    norm = r"segformer\.(encoder\.layer_norm\.[0-2]|stages\.[0-2]\.layer_norm)"
    stages = [name for name, _ in network.named_modules() if re.fullmatch(norm, name)]  # 1
    example = torch.zeros(1, 3, HEIGHT, WIDTH)
    model = srf.MultiExit(network, stages, NUM_CLASSES, example, as_map=srf.exits.tokens_to_map)  # 2
    criterion = srf.SelfRegulationLoss(sr_f_weight=0.1, sr_l_weight=0.1, ignore_index=255)  # 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)  # the exits have parameters of their own
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
        logits = model.eval()(images).logits  # in evaluation mode the network alone runs: its own output, at a quarter
    predicted = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False).argmax(1)
    print(f"pixel accuracy {(predicted == labels)[labels != 255].float().mean():.2f}")
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
