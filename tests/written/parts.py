"""What the networks in this folder are made of."""

from torch import Tensor, nn

NETWORKS: list[type[nn.Module]] = []


def layer(inputs: int, outputs: int, kernel: int = 3, **options) -> nn.Sequential:
    """Convolution, batch norm, ReLU; the map keeps its size."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Net(nn.Module):
    """A stem of 8 channels, what a subclass makes of its maps, and a linear classifier of their means.

    pruned  the layers whose filters go, where layers that share channels are pruned jointly
    """

    pruned = ""

    def __init_subclass__(cls) -> None:
        if not cls.__name__.startswith("_"):
            NETWORKS.append(cls)

    def __init__(self, channels: int, resolution: int, classes: int, width: int = 8) -> None:
        super().__init__()
        self.stem = layer(channels, 8)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(self.stem(images)).mean((2, 3)))
