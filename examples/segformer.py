"""Self-Regulation added to a Hugging Face SegFormer in five lines (numbered below): built from its config, no weights.

python examples/segformer.py [STEPS]        some seconds on a CPU; needs `pip install transformers`
"""

import re
import sys

import torch
from torch import Tensor, nn

import selfreg_fast as srf

NUM_CLASSES = 5


def segformer() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        num_labels=NUM_CLASSES,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 32, 48, 64],
        num_attention_heads=[1, 2, 3, 4],
        decoder_hidden_size=64,
    )
    return SegformerForSemanticSegmentation(config)


def generated(batch: int, height: int = 64, width: int = 96) -> tuple[Tensor, Tensor]:
    """Images of noisy vertical bands, one brightness a class, and their labels."""
    labels = torch.randint(NUM_CLASSES, (batch, 1, 6)).repeat_interleave(width // 6, 2).expand(-1, height, -1)
    images = labels[:, None] / 2 - 1 + 0.3 * torch.randn(batch, 3, height, width)
    return images, labels.to(torch.uint8)


def main(steps: int = 40) -> list[float]:
    torch.manual_seed(0)
    network = segformer()
    # The norms that end its stages; their output is tokens (B, L, C). transformers 5 has other names than 4.
    norm = r"segformer\.(encoder\.layer_norm\.[0-2]|stages\.[0-2]\.layer_norm)"
    stages = [name for name, _ in network.named_modules() if re.fullmatch(norm, name)]  # 1
    model = srf.MultiExit(  # 2
        network,
        stages,
        NUM_CLASSES,
        example=torch.zeros(1, 3, 64, 96),
        feature_channels=32,
        as_map=srf.exits.tokens_to_map,
    )
    criterion = srf.SelfRegulationLoss(sr_f_weight=0.1, sr_l_weight=0.2)  # 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
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
    logits = model.eval()(images).logits  # in evaluation mode the network alone runs: its own output, at a quarter
    print(f"pixel accuracy {(logits.argmax(1) == labels[:, ::4, ::4]).float().mean():.2f}")
    return losses


if __name__ == "__main__":
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"not run, {error}: pip install transformers")
    else:
        main(*map(int, sys.argv[1:]))
