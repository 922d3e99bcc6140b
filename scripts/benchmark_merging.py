"""How fast neuron merging is: all pairs of filters at once, against a Python loop over them.

    python scripts/benchmark_merging.py [--turns N] [--out FILE.json]

A VGG-16 of random weights and batch norm statistics at the ratios of the paper (Kim et al., NeurIPS
2020: 64 % of the parameters go). Both find the same kept filter and scale for every pruned filter of
every layer and fold them into the next layer; that they do is checked before they are timed, in turns.
"""

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from prune_cli.environment import machine, versions
from prune_cli.masks import Masks
from prune_cli.methods.neuron_merging import NeuronMerging
from prune_cli.models.vgg import VGG

HALF = {"features.conv1": 0.5, "features.conv[89]": 0.5, "features.conv1[0-3]": 0.5}
METHOD = NeuronMerging(ratios=HALF)


def network(width: float = 1.0) -> VGG:
    """VGG-16 with `width` times its channels and two classifier layers, nothing of its batch norms left as it is
    initialised."""
    torch.manual_seed(0)
    model = VGG(3, 32, 10, depth=16, width=width, classifier="double").eval()
    model.input_shape = (3, 32, 32)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 2)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_()
    return model


def by_loop(model: VGG, masks: Masks) -> VGG:
    """Every pruned filter looks at every kept one, one after the other (the paper's algorithm 1)."""
    merged = copy.deepcopy(model)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    for name, reader in zip(convolutions, [*convolutions[1:], "classifier.fc1"], strict=True):
        if name not in masks.keep:
            continue
        norm = model.get_submodule(name.replace("conv", "bn"))
        folded = merged.get_submodule(reader).weight.data
        for pruned, kept, scale in _merges(model.get_submodule(name).weight, norm, masks.keep[name]):
            folded[:, kept] += scale * model.get_submodule(reader).weight.data[:, pruned]
            folded[:, pruned] = 0  # a constant of the pruned filter has no part in it any more
    return merged


def _merges(weight: Tensor, norm: nn.BatchNorm2d, keep: Tensor):
    """(pruned filter, kept filter, scale) of every pruned filter that is similar enough to a kept one."""
    filters = list(weight.detach().flatten(1).double().numpy())
    lengths = [float(np.linalg.norm(f)) for f in filters]
    gamma, beta, mean, variance = (
        t.detach().double().tolist() for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    kept = keep.nonzero().flatten().tolist()
    for i in (~keep).nonzero().flatten().tolist():
        similar, distances, scales = [], [], []
        for j in kept:
            s = lengths[i] / lengths[j]
            scale = s * (gamma[j] / gamma[i]) * (variance[i] / variance[j])  # bn_scale=authors
            offset = mean[j] - beta[j] * variance[j] / gamma[j]
            constant = gamma[i] / variance[i] * (s * offset - mean[i]) + beta[i]
            similar.append(float(filters[i] @ filters[j]) / (lengths[i] * lengths[j]))
            distances.append(math.fabs(constant) / math.fabs(scale))
            scales.append(scale)
        low, high = min(distances), max(distances)
        costs = [
            METHOD.lam * (1 - c) + (1 - METHOD.lam) * (d - low) / (high - low)
            for c, d in zip(similar, distances, strict=True)
        ]
        best = costs.index(min(costs))
        if similar[best] >= METHOD.threshold and scales[best] >= 0:
            yield i, kept[best], scales[best]


def check(model: VGG, masks: Masks) -> None:
    """Raises AssertionError: the two do not make the same network."""
    ours, loop = METHOD.compensate(model, masks), by_loop(model, masks)
    for (name, found), expected in zip(ours.state_dict().items(), loop.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def seconds(work: Callable[[], nn.Module]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="how often each is timed")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    arguments = parser.parse_args()
    model = network()
    masks = METHOD.prune(model, 0.0)
    check(model, masks)
    ways = {"ours": lambda: METHOD.compensate(model, masks), "loop": lambda: by_loop(model, masks)}
    turns = [{name: seconds(way) for name, way in ways.items()} for _ in range(arguments.turns)]
    ratios = [turn["loop"] / turn["ours"] for turn in turns]
    result = {
        "pruned": sum(int((~keep).sum()) for keep in masks.keep.values()),
        "seconds": {name: round(statistics.median(turn[name] for turn in turns), 4) for name in ways},
        "ratio": round(statistics.median(ratios), 2), "ratio_low": round(min(ratios), 2),
        "ratio_high": round(max(ratios), 2), "turns": arguments.turns,
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    if arguments.out:
        content = {"benchmark": "neuron merging", "machine": machine(), "versions": versions(), **result}
        arguments.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
