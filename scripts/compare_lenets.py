"""Why networks of our own lose more than the authors' when neurons of a LeNet-300-100 are removed.

    python scripts/compare_lenets.py CHECKPOINT RUN_DIR... --data DIR [--out FILE.json]

CHECKPOINT is the authors' network (Kim et al., NeurIPS 2020), RUN_DIR a run of
`experiment=neuron_merging/lenet_fashion_mnist` that trained its own. Of each dense network, on Fashion-MNIST's
test images: how large its weights are, how many hidden neurons are nearly gone, how often a neuron of each
hidden layer is active, and the accuracy that is left when 80 % of one hidden layer go, or of both.
"""

import argparse
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from prune_cli.checkpoint import load_model
from prune_cli.datasets.torchvision_sets import TorchvisionSet
from prune_cli.environment import machine, versions
from prune_cli.foreign import fill, read_weights
from prune_cli.models.lenet import LeNet300100
from prune_cli.record import Record

RATIO = 0.8  # of the neurons
GONE = 0.05  # a neuron whose weights' L1 norm is below this share of the layer's largest
HIDDEN = ("fc1", "fc2")


@dataclass(frozen=True)
class Network:
    """What is compared. Norm: L2, of all weights of the first layer; gone: neurons of the first layer; active:
    share of (image, neuron) per hidden layer; accuracies in percent, `without` by the layers that were pruned."""

    name: str
    norm: float
    gone: int
    active: dict[str, float]
    dense: float
    without: dict[str, float]


def strengths(model: LeNet300100, layer: str) -> Tensor:
    """(neurons,) L1 norm of each one's weights and bias: the criterion of the table."""
    linear = model.get_submodule(layer)
    return linear.weight.abs().sum(1) + linear.bias.abs()


@torch.no_grad()
def logits(model: LeNet300100, images: Tensor, pruned: Collection[str] = (), active: dict[str, float] | None = None) -> Tensor:
    """Of all images, without the weakest neurons of the `pruned` layers; notes how many answer in `active`."""
    x = images.flatten(1)
    for layer in HIDDEN:
        x = model.get_submodule(layer)(x).relu()
        if active is not None:
            active[layer] = round(float((x > 0).float().mean()), 4)
        if layer in pruned:
            kept = strengths(model, layer).topk(round(x.shape[1] * (1 - RATIO))).indices
            x = x * torch.zeros(x.shape[1]).index_fill(0, kept, 1)
    return model.fc3(x)


def described(name: str, model: LeNet300100, images: Tensor, labels: Tensor) -> Network:
    active: dict[str, float] = {}

    def accuracy(pruned: Collection[str] = ()) -> float:
        return round(100 * float((logits(model, images, pruned, active).argmax(1) == labels).float().mean()), 2)

    first = strengths(model, "fc1")
    without = {layer: accuracy([layer]) for layer in HIDDEN} | {"both": accuracy(HIDDEN)}
    dense = accuracy()  # last: `active` is that of the whole network
    gone = int((first < GONE * first.max()).sum())
    return Network(name, round(float(model.fc1.weight.detach().norm()), 2), gone, active, dense, without)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="the authors' network")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds FashionMNIST/raw")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = TorchvisionSet(name="fashion_mnist", source="FashionMNIST", mean=(0.5,), std=(0.5,))
    splits = dataset.load(arguments.data, torch.device("cpu"), validation=0.0, limit=None, workers=0)
    ((images, labels),) = splits.test.batches(len(splits.test))
    theirs = LeNet300100(splits.channels, splits.resolution, splits.classes)
    fill(theirs, read_weights(arguments.checkpoint), arguments.checkpoint)
    networks = [described("the authors'", theirs, images, labels)]
    for run in arguments.runs:
        model = load_model(run / "checkpoints/dense.safetensors")
        record = Record.read(run / "record.json")
        name = f"ours, learning rate {record.config['recipe']['pretrain']['lr']:g}, seed {record.seed}"
        networks.append(described(name, model, images, labels))
    for network in networks:
        print(network)
    if arguments.out:
        content = {"networks": [asdict(n) for n in networks], "machine": machine(), "versions": versions()}
        arguments.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
