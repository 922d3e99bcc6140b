"""VGG with batch normalisation for small images (Simonyan & Zisserman, ICLR 2015, Table 1)."""

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

from prune_cli.settings import Count, Positive, checked

Depth = Literal[11, 13, 16, 19]
Classifier = Literal["single", "double"]

WIDTHS = (64, 128, 256, 512, 512)
CONVS_PER_STAGE = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, each followed by BN and ReLU, and max pooling between stages.

    classifier   `single`: one linear layer, as in network slimming (Liu et al., ICCV 2017) and
                 stripe-wise pruning (Meng et al., NeurIPS 2020); `double`: 512 - BN - ReLU -
                 classes, as in PFEC (Li et al., ICLR 2017) and neuron merging (Kim et al., 2020)
    width        of every layer, times the published one; None = 1

    Layers are numbered as in PFEC: `features.conv1` to `features.conv{depth - 3}`.
    Shapes: images (N, channels, resolution, resolution) -> logits (N, classes).
    Raises UserError: unknown depth or classifier.
    """

    def __init__(
        self, channels: Count, resolution: Count, classes: Count,
        depth: Depth, classifier: Classifier = "single", width: Positive | None = None,
    ):  # fmt: skip
        super().__init__()
        stages = CONVS_PER_STAGE[checked(depth, Depth, "depth")]
        widths = tuple(max(1, round(published * (width or 1))) for published in WIDTHS)
        self.features = _features(channels, resolution, widths, stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        double = checked(classifier, Classifier, "classifier") == "double"
        self.classifier = _two_layers(widths[-1], classes) if double else nn.Linear(widths[-1], classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.pool(self.features(x))))


def _features(channels: int, resolution: int, widths: tuple[int, ...], stages: tuple[int, ...]) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    number = 0
    for stage, (width, convs) in enumerate(zip(widths, stages, strict=True)):
        # A 1x1 map would leave a 3x3 kernel nothing but its centre: 2x2 is the least we pool to.
        if stage > 0 and resolution >= 4:
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
            resolution //= 2
        for _ in range(convs):
            number += 1
            layers[f"conv{number}"] = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            layers[f"bn{number}"] = nn.BatchNorm2d(width)
            layers[f"relu{number}"] = nn.ReLU()
            channels = width
    return nn.Sequential(layers)


def _two_layers(width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(fc1=nn.Linear(width, width), bn=nn.BatchNorm1d(width), relu=nn.ReLU(), fc2=nn.Linear(width, classes))
    )


def _initialise(module: nn.Module) -> None:
    """Kaiming convolutions, BN scales 0.5, linear weights N(0, 0.01): what network slimming and
    the VGGs derived from it start from."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.constant_(module.weight, 0.5)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
