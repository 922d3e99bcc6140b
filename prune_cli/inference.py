"""A network made for computing only: batch norm folded, ReLU fused, stripes on the fastest kernel.

The copy is never saved: it belongs to one machine. What is saved is the network it was made from.
"""

import copy
import logging
from typing import Any

import torch
from torch import Tensor, fx, nn

from prune_cli.kernels.operation import Implementation, Operation, memory_format
from prune_cli.kernels.plan import choose
from prune_cli.layers.stripe import StripeConv2d

log = logging.getLogger(__name__)


class InferenceConv2d(nn.Module):
    """A StripeConv2d for inference, with what was folded into it, on the plan that its input deserves.

    The first input of a shape chooses the plan (by measurement, where the machine has not yet), the
    following ones use it.
    """

    def __init__(self, operation: Operation, kernel: str = "auto", name: str = "") -> None:
        super().__init__()
        self.operation, self.kernel, self.name = operation, kernel, name
        self.plans: dict[tuple, str] = {}
        self._chosen: dict[tuple, Implementation] = {}

    def forward(self, x: Tensor) -> Tensor:
        key = (x.shape, x.stride(), x.dtype, x.device, torch.get_num_threads())
        implementation = self._chosen.get(key)
        if implementation is None:
            implementation = self._chosen[key] = self._plan(x, key)
        return implementation(x)

    def _plan(self, x: Tensor, key: tuple) -> Implementation:
        with torch.no_grad():
            operation = self.operation.to(x.device)
            x = x.detach().contiguous(memory_format=memory_format(x))
            self.plans[key], implementation = choose(operation, x, self.kernel)
        log.info("%s: %s for an input of %s", self.name, self.plans[key], tuple(x.shape))
        return implementation

    def macs(self, output: Tensor) -> int:
        """Multiply-adds of one image whose output is (N, O, H, W)."""
        return self.operation.stripes.numel() * output.shape[-2] * output.shape[-1]

    def _save_to_state_dict(self, *arguments: Any) -> None:
        raise RuntimeError("A network made for inference is not saved; save the one it was made from")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chosen": {}}  # prepared layers belong to this object

    def extra_repr(self) -> str:
        operation = self.operation
        alive, total = len(operation.stripes), operation.pattern.numel()
        return f"{operation.channels}, {operation.filters}, stripes={alive}/{total}, relu={operation.relu}"


@torch.no_grad()
def for_inference(model: nn.Module, kernel: str = "auto") -> nn.Module:
    """A copy of the network in evaluation mode that computes the same, faster.

    Batch norm is folded into the convolution before it; a stripe convolution also takes the ReLU
    that follows, and runs on the backend that `kernel` (auto, torch or cpp) allows.
    """
    model = copy.deepcopy(model).eval()
    for conv, norm, relu in _chains(model):
        layer = model.get_submodule(conv)
        if norm is not None:
            layer = _fold(layer, model.get_submodule(norm))
            model.set_submodule(norm, nn.Identity())
        if isinstance(layer, StripeConv2d):
            operation = Operation(
                layer.pattern, layer.stripes.float(), _bias(layer).float(), layer.stride, layer.padding, bool(relu)
            )
            layer = InferenceConv2d(operation, kernel, conv)
            if relu is not None:
                model.set_submodule(relu, nn.Identity())
        model.set_submodule(conv, layer)
    return model


def _fold(layer: nn.Module, norm: nn.BatchNorm2d) -> nn.Module:
    """The convolution that computes norm(layer(x)) in evaluation mode."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = 0 if norm.bias is None else norm.bias
    bias = (_bias(layer) - norm.running_mean) * scale + shift
    if isinstance(layer, StripeConv2d):
        filters = layer.pattern.permute(1, 2, 0).nonzero()[:, 2]
        layer.stripes.mul_(scale[filters].unsqueeze(1))
    else:
        layer.weight.mul_(scale.view(-1, 1, 1, 1))
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _bias(layer: nn.Module) -> Tensor:
    if layer.bias is not None:
        return layer.bias
    like = next(layer.parameters())
    return torch.zeros(layer.out_channels, dtype=like.dtype, device=like.device)


class _Tracer(fx.Tracer):
    """Every module without children is one step, ours as well."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not list(m.children())


def _chains(model: nn.Module) -> list[tuple[str, str | None, str | None]]:
    """(convolution, batch norm or None, ReLU or None) that follow each other and feed nothing else.

    A network that cannot be traced keeps its batch norms and ReLUs.
    """
    names = {module: name for name, module in model.named_modules()}
    convs = [name for module, name in names.items() if isinstance(module, (nn.Conv2d, StripeConv2d))]
    try:
        graph = _Tracer().trace(model)
    except Exception as problem:  # whatever a user's forward does that is not a graph
        log.info("Batch norm is not folded, the network cannot be traced: %s", problem)
        return [(name, None, None) for name in convs]
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    calls = [model.get_submodule(node.target) for node in nodes]
    chains = {}
    for node, module in zip(nodes, calls, strict=True):
        if names[module] in convs:
            norm = _follower(model, node, calls, nn.BatchNorm2d) if calls.count(module) == 1 else None
            relu = _follower(model, norm or node, calls, nn.ReLU) if calls.count(module) == 1 else None
            chains[names[module]] = tuple(n and names[model.get_submodule(n.target)] for n in (norm, relu))
    return [(name, *chains.get(name, (None, None))) for name in convs]


def _follower(model: nn.Module, node: fx.Node, calls: list[nn.Module], kind: type) -> fx.Node | None:
    """The only user of the node, if it is a module of this kind that is called once."""
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module":
        return None
    module = model.get_submodule(users[0].target)
    fixed = not isinstance(module, nn.BatchNorm2d) or module.running_mean is not None
    return users[0] if isinstance(module, kind) and calls.count(module) == 1 and fixed else None
