"""The parameter-free shortcut of CIFAR ResNets."""

from torch import Tensor, nn
from torch.nn import functional as F

from prune_cli.errors import UserError


class ShortcutA(nn.Module):
    """Option A: every `stride`-th pixel of the input, then zero channels up to `out_channels`
    (He et al., CVPR 2016, section 3.3).

    One module, because a shortcut without weights shows a channel tracer no layer to stop at.
    Shapes: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).
    Raises UserError: fewer channels out than in.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        if out_channels < in_channels:
            raise UserError(f"out_channels={out_channels}: shortcut A adds channels, so at least {in_channels}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.out_channels - self.in_channels))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"
