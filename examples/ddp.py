"""Trains a small multi-exit network on two ranks: torchrun --nproc-per-node 2 examples/ddp.py

On GPUs with NCCL if there is one for every rank, else on CPUs with gloo. The ranks have unevenly many labels:
`process_group` makes the gradient that of one process with all images.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import selfreg_fast as srf

CLASSES, VOID, STEPS = 4, 255, 40
COLOURS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])


class Network(nn.Module):
    """Three stages, an exit after each: logits of 1/2, 1/4 and 1/8 of the image's size, shallow to deep."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(c, width, 3, stride=2, padding=1) for c in (3, width, width))
        self.exits = nn.ModuleList(srf.ExitHead(width, CLASSES, hidden_channels=width) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        logits = []
        for stage, head in zip(self.stages, self.exits, strict=True):
            x = stage(x).relu()
            logits.append(head(x))
        return logits


def scenes(labelled: float) -> tuple[Tensor, Tensor]:
    """Four noisy images of four fields in their classes' colours; a share `labelled` of the pixels has a label."""
    classes = torch.randint(CLASSES, (4, 2, 2)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    images = COLOURS[classes].movedim(-1, 1) + 0.3 * torch.randn(4, 3, 32, 32)
    return images, classes.masked_fill(torch.rand(classes.shape) >= labelled, VOID)


def train(device: torch.device) -> None:
    torch.manual_seed(0)
    network = DistributedDataParallel(Network().to(device), device_ids=[device] if device.type == "cuda" else None)
    criterion = srf.SelfRegulationLoss(ignore_index=VOID, process_group="world")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(dist.get_rank())  # other scenes for every rank
    for step in range(1, STEPS + 1):
        images, labels = scenes(0.5 / (1 + 4 * dist.get_rank()))
        loss = criterion.enable_sr(step > STEPS // 2)(network(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        if step % 10 == 0:
            mea = loss.mea.detach().clone()
            dist.all_reduce(mea)  # the mean over the ranks is the one over all pixels
            if dist.get_rank() == 0:
                print(f"step {step}: MEA {mea.item() / dist.get_world_size():.3f}", flush=True)


def main() -> None:
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpus else "gloo", device_id=device if on_gpus else None)
    train(device)  # in a function: a DistributedDataParallel that outlives its process group can hang when it is freed
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
