"""Self-Regulation in the Trainer of transformers, with a SegFormer: python examples/trainer.py [STEPS]

It is built from its config, without weights; some seconds on a CPU. Needs `pip install transformers accelerate`.
Several GPUs: start it by torchrun, and give SelfRegulationLoss `process_group="world"`, too.
"""

import re
import sys
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import selfreg_fast as srf

NUM_CLASSES, SIZE = 5, 64


class WithLoss(nn.Module):
    """What Trainer trains: it returns the loss, and in evaluation the classes that the network predicts."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        norm = r"segformer\.(encoder\.layer_norm\.[0-2]|stages\.[0-2]\.layer_norm)"  # of transformers 4 and 5
        stages = [name for name, _ in network.named_modules() if re.fullmatch(norm, name)]
        example = torch.zeros(1, 3, SIZE, SIZE)
        self.model = srf.MultiExit(network, stages, NUM_CLASSES, example, as_map=srf.exits.tokens_to_map)
        self.criterion = srf.SelfRegulationLoss(sr_f_weight=0.1, sr_l_weight=0.1, ignore_index=255)
        self.mea: list[Tensor] = []

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.training:
            loss = self.criterion(self.model(pixel_values), labels)
            self.mea.append(loss.mea.detach())
            return {"loss": loss.total}
        logits = self.model(pixel_values).logits  # in evaluation mode the network alone runs
        # Trainer collects what is beside the loss over the whole data set: classes take less memory than logits.
        classes = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False).argmax(1)
        return {"loss": srf.mea_loss([logits], labels, ignore_index=255), "classes": classes}


class WarmUp(transformers.TrainerCallback):
    """MEA alone for the first quarter, then SR-F and SR-L, too: as told by the step, so that a run can be resumed."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: WithLoss, **kwargs: Any) -> None:
        model.criterion.enable_sr(state.global_step >= state.max_steps // 4)


def accuracy(of: transformers.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((of.predictions == of.label_ids)[of.label_ids != 255].mean())}


def generated(count: int) -> list[dict[str, Tensor]]:
    """Images of noisy squares, one colour a class, and their labels (uint8, ignored at the upper edge)."""
    labels = torch.randint(NUM_CLASSES, (count, 4, 4)).repeat_interleave(SIZE // 4, 1).repeat_interleave(SIZE // 4, 2)
    colours = torch.linspace(0, 2.5, NUM_CLASSES)[labels]
    images = torch.stack([colours.cos(), colours.sin(), -colours.cos()], 1) + 0.3 * torch.randn(count, 3, SIZE, SIZE)
    labels[:, :2] = 255
    return [{"pixel_values": x, "labels": y} for x, y in zip(images, labels.to(torch.uint8), strict=True)]


def main(steps: int = 40) -> list[float]:
    transformers.set_seed(0)
    network = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(num_labels=NUM_CLASSES))
    model, data = WithLoss(network), {"train_dataset": generated(64), "eval_dataset": generated(8)}
    with TemporaryDirectory() as folder:
        options = {"max_steps": steps, "learning_rate": 1e-3, "save_strategy": "no", "report_to": []}
        arguments = transformers.TrainingArguments(folder, **options)
        trainer = transformers.Trainer(model, arguments, compute_metrics=accuracy, callbacks=[WarmUp()], **data)
        trainer.train()
        print(trainer.evaluate())
        network.save_pretrained(folder)  # the network alone: from_pretrained() needs nothing of the exits
    return [mea.item() for mea in model.mea]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
