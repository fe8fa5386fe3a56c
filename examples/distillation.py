"""A frozen teacher distils into a student, labels and teacher in one launch: python examples/distillation.py [STEPS]

Knowledge distillation (Hinton et al., 2015) on generated data; some seconds on a CPU.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import selfreg_fast as srf

NUM_CLASSES, SIZE = 5, 64


def network(width: int, stride: int) -> nn.Sequential:
    """Logits at the images' size over 2 * stride: the loss resizes those of the student and of the teacher."""
    layers: list[nn.Module] = []
    for inputs, s in ((3, 2), (width, stride), (width, 1)):
        layers += [nn.Conv2d(inputs, width, 3, s, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, NUM_CLASSES, 1))


def generated(batch: int) -> tuple[Tensor, Tensor]:
    """Images of noisy squares, one colour a class, and their labels (uint8, ignored at the upper edge)."""
    labels = torch.randint(NUM_CLASSES, (batch, 4, 4)).repeat_interleave(SIZE // 4, 1).repeat_interleave(SIZE // 4, 2)
    colours = torch.linspace(0, 2.5, NUM_CLASSES)[labels]
    images = torch.stack([colours.cos(), colours.sin(), -colours.cos()], 1) + 0.3 * torch.randn(batch, 3, SIZE, SIZE)
    labels[:, :2] = 255
    return images, labels.to(torch.uint8)


def train(student: nn.Module, steps: int, teacher: nn.Module | None = None) -> list[float]:
    """The losses against the labels."""
    # Cross-entropy of the student alone, + 0.5 * 2**2 * KL(softmax(teacher / 2) || softmax(student / 2)), to which the
    # loss adds a constant: the entropy of the softened teacher. The deepest exit teaches, so the teacher comes last.
    criterion = srf.SelfRegulationLoss(
        exit_weights=[1, 0], sr_f_weight=None, sr_l_weight=0.5, temperature=2.0, renormalize=True, ignore_index=255
    )
    optimizer, losses = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9), []
    for step in range(steps):
        images, labels = generated(4)
        if teacher is None:
            total = mea = srf.mea_loss([student(images)], labels, ignore_index=255)
        else:
            with torch.no_grad():
                soft = teacher(images)
            total, mea, _, taught = criterion([student(images), soft], labels)
            print(f"step {step:3}  total {total:.3f}  labels {mea:.3f}  teacher {taught:.3f}")
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(mea.item())
    return losses


def main(steps: int = 40) -> list[float]:
    torch.manual_seed(0)
    teacher, student = network(64, 1), network(8, 2)
    train(teacher, steps)
    losses = train(student, steps, teacher.eval().requires_grad_(False))
    images, labels = generated(16)
    for name, net in {"teacher": teacher, "student": student}.items():
        with torch.no_grad():
            predicted = F.interpolate(net.eval()(images), size=labels.shape[1:], mode="bilinear").argmax(1)
        print(f"pixel accuracy of the {name} {(predicted == labels)[labels != 255].float().mean():.2f}")
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
