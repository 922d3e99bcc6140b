"""Top-1 accuracy."""

import torch
from torch import nn

from prune_cli.datasets.dataset import Split
from prune_cli.evaluation import evaluating

# Input values per batch: 1000 images of 32x32x3, 20 of 224x224x3 per million and a half of them.
BATCH_VALUES = 3_000_000


@torch.inference_mode()
def accuracy(model: nn.Module, split: Split) -> float:
    """Fraction in [0, 1] of the split that `model` classifies right, in float32 and evaluation mode.

    The precision of training does not enter: what ships is the float32 network.
    """
    values = model.input_shape[0] * model.input_shape[1] * model.input_shape[2]
    layout = memory_format(model)
    right = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)
    with evaluating(model):
        for x, y in split.batches(max(1, min(1000, BATCH_VALUES // values))):
            right += (model(x.contiguous(memory_format=layout)).argmax(1) == y).sum()
    return right.item() / len(split)


def memory_format(model: nn.Module) -> torch.memory_format:
    """The layout of the model's convolution weights, which its input should share."""
    channels_last = any(
        p.ndim == 4 and not p.is_contiguous() and p.is_contiguous(memory_format=torch.channels_last)
        for p in model.parameters()
    )
    return torch.channels_last if channels_last else torch.contiguous_format
