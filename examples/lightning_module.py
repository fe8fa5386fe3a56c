"""Self-Regulation in a LightningModule: python examples/lightning_module.py [STEPS]

A small network on generated data; some seconds on a CPU. Needs `pip install lightning`.
On several GPUs, give SelfRegulationLoss `process_group="world"`, too.
"""

import sys
from collections import OrderedDict

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import selfreg_fast as srf

NUM_CLASSES, SIZE = 5, 64


def stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Segmentation(lightning.LightningModule):
    def __init__(self, network: nn.Module, stages: tuple[str, ...], warm_up: int) -> None:
        super().__init__()
        self.model = srf.MultiExit(network, stages, NUM_CLASSES, example=torch.zeros(1, 3, SIZE, SIZE))
        self.criterion = srf.SelfRegulationLoss(sr_f_weight=0.1, sr_l_weight=0.1, ignore_index=255)
        self.warm_up = warm_up
        self.mea: list[Tensor] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        self.criterion.enable_sr(self.global_step >= self.warm_up)  # MEA alone first
        loss = self.criterion(self.model(images), labels)
        self.log_dict({"mea": loss.mea, "sr_f": loss.sr_f, "sr_l": loss.sr_l})
        self.mea.append(loss.mea.detach())
        return loss.total

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        logits = self.model(images)  # Lightning has called eval(), where the network alone runs
        predicted = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False).argmax(1)
        self.log("accuracy", (predicted == labels)[labels != 255].float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)  # of the exits, too


def generated(count: int) -> DataLoader:
    """Images of noisy squares, one colour a class, and their labels (uint8, ignored at the upper edge)."""
    labels = torch.randint(NUM_CLASSES, (count, 4, 4)).repeat_interleave(SIZE // 4, 1).repeat_interleave(SIZE // 4, 2)
    colours = torch.linspace(0, 2.5, NUM_CLASSES)[labels]
    images = torch.stack([colours.cos(), colours.sin(), -colours.cos()], 1) + 0.3 * torch.randn(count, 3, SIZE, SIZE)
    labels[:, :2] = 255
    return DataLoader(TensorDataset(images, labels.to(torch.uint8)), batch_size=4)


def main(steps: int = 40) -> list[float]:
    torch.manual_seed(0)
    stages = OrderedDict(layer1=stage(3, 16), layer2=stage(16, 32), layer3=stage(32, 64))
    network = nn.Sequential(OrderedDict(**stages, classifier=nn.Conv2d(64, NUM_CLASSES, 1)))
    module = Segmentation(network, tuple(stages), warm_up=steps // 4)
    trainer = lightning.Trainer(max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, generated(32), generated(8))
    print({name: round(value.item(), 3) for name, value in trainer.logged_metrics.items()})
    return [mea.item() for mea in module.mea]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
