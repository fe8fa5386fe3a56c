"""Trains a small multi-exit network on two ranks: torchrun --nproc-per-node 2 examples/ddp.py

On GPUs with NCCL if there is one for every rank, else on CPUs with gloo. The ranks have unevenly many labels:
`process_group` makes the gradient that of one process with all images.
"""

import os
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import selfreg_fast as srf

NUM_CLASSES, STEPS = 4, 40
COLOURS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])


def network(width: int = 16) -> nn.Sequential:
    layers = OrderedDict()
    for i, inputs in enumerate((3, width, width)):
        layers[f"layer{i + 1}"] = nn.Sequential(nn.Conv2d(inputs, width, 3, 2, 1), nn.ReLU())
    return nn.Sequential(OrderedDict(**layers, classifier=nn.Conv2d(width, NUM_CLASSES, 1)))


def scenes(labelled: float) -> tuple[Tensor, Tensor]:
    """Four noisy images of four fields in their classes' colours; a share `labelled` of the pixels has a label."""
    classes = torch.randint(NUM_CLASSES, (4, 2, 2)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    images = COLOURS[classes].movedim(-1, 1) + 0.3 * torch.randn(4, 3, 32, 32)
    return images, classes.masked_fill(torch.rand(classes.shape) >= labelled, 255)


def train(device: torch.device) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    example = torch.zeros(1, 3, 32, 32)
    model = srf.MultiExit(network().to(device), ("layer1", "layer2", "layer3"), NUM_CLASSES, example)
    parallel = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    criterion = srf.SelfRegulationLoss(sr_f_weight=0.1, sr_l_weight=0.1, ignore_index=255, process_group="world")
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.02, momentum=0.9)
    torch.manual_seed(rank)  # other scenes for every rank
    for step in range(1, STEPS + 1):
        images, labels = scenes(0.5 / (1 + 4 * rank))
        criterion.enable_sr(step >= STEPS // 4)  # MEA alone first
        loss = criterion(parallel(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        if step % 10 == 0:
            mea = loss.mea.detach().clone()
            dist.all_reduce(mea)  # the mean over the ranks is the one over all pixels
            if rank == 0:
                print(f"step {step}: MEA {mea.item() / ranks:.3f}", flush=True)
    if rank == 0:
        images, labels = scenes(1.0)
        with torch.no_grad():
            logits = model.eval()(images.to(device))  # in evaluation mode the network alone runs, on this rank alone
        predicted = F.interpolate(logits.cpu(), size=labels.shape[1:], mode="bilinear", align_corners=False).argmax(1)
        print(f"pixel accuracy {(predicted == labels).float().mean():.2f}", flush=True)


def main() -> None:
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpus else "gloo", device_id=device if on_gpus else None)
    train(device)  # in a function: a DistributedDataParallel that outlives its process group can hang when it is freed
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
