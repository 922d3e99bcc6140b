"""The two LeNets of the pruning literature (LeCun et al., "Gradient-Based Learning Applied to
Document Recognition", Proc. IEEE 1998), with ReLU as in Han et al. (NeurIPS 2015, Table 1)."""

from torch import Tensor, nn

from prune_cli.errors import UserError
from prune_cli.settings import Count


class LeNet300100(nn.Module):
    """Fully connected 300-100; 266,610 parameters on MNIST (Han et al.: 267K).

    Shapes: images (N, channels, resolution, resolution) -> logits (N, classes).
    """

    def __init__(self, channels: Count, resolution: Count, classes: Count):
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(channels * resolution**2, 300)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(300, 100)
        self.relu2 = nn.ReLU()
        self.fc3 = nn.Linear(100, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.fc1(self.flatten(x)))
        x = self.relu2(self.fc2(x))
        return self.fc3(x)


class LeNet5(nn.Module):
    """Convolutions 20-50 (5x5, max-pooled) and a hidden layer of 500: the variant of Caffe that
    Han et al. prune; 431,080 parameters on MNIST (Han et al.: 431K).

    Shapes: images (N, channels, resolution, resolution) -> logits (N, classes).
    Raises UserError: resolution below 4, where nothing is left after two poolings.
    """

    def __init__(self, channels: Count, resolution: Count, classes: Count):
        super().__init__()
        if resolution < 4:
            raise UserError(f"resolution={resolution}: LeNet5 needs images of at least 4x4 pixels")
        # Unpadded as published where two 5x5 convolutions fit, "same" padding on smaller images.
        padding = 0 if resolution >= 16 else 2
        shrink = 4 - 2 * padding
        self.conv1 = nn.Conv2d(channels, 20, 5, padding=padding)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, 5, padding=padding)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        side = ((resolution - shrink) // 2 - shrink) // 2
        self.fc1 = nn.Linear(50 * side**2, 500)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        x = self.relu3(self.fc1(self.flatten(x)))
        return self.fc2(x)
