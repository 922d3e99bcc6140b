"""Knowledge distillation: "Distilling the Knowledge in a Neural Network" (Hinton et al., 2015)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prune_cli.hooks import Progress, TrainingHooks


@dataclass(frozen=True)
class Distillation(TrainingHooks):
    """Adds weight * T^2 * KL(teacher / T || student / T), a mean over the batch, to the cross entropy.

    teacher      the network whose answers are taught, in evaluation mode; it is evaluated on the
                 student's batches, under autocast as the student
    temperature  T: the higher, the more the wrong classes count. The gradients of the softened answers
                 shrink by 1 / T^2, which the factor T^2 undoes (section 2)
    weight       of the term
    """

    teacher: nn.Module
    temperature: float
    weight: float

    def batch_loss(self, model: nn.Module, progress: Progress, x: Tensor, logits: Tensor) -> Mapping[str, Tensor]:
        with torch.no_grad():
            wanted = F.log_softmax(self.teacher(x).float() / self.temperature, dim=1)
        given = F.log_softmax(logits.float() / self.temperature, dim=1)
        divergence = F.kl_div(given, wanted, reduction="batchmean", log_target=True)
        return {"distillation": self.weight * self.temperature**2 * divergence}
