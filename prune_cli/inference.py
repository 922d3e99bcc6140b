"""A network made for computing only: batch norm folded, ReLU fused, stripes on the fastest kernel.

The copy is never saved: it belongs to one machine. What is saved is the network it was made from.
"""

import copy
import logging
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from prune_cli.evaluation import difference, evaluating, random_images
from prune_cli.kernels.operation import Implementation, Operation, memory_format
from prune_cli.kernels.plan import choose
from prune_cli.layers.stripe import StripeConv2d
from prune_cli.modules import replace_module, tied, why_not_replaced

log = logging.getLogger(__name__)

TOLERANCE = 1e-3  # relative to the largest logit: folding rounds once more


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
        key = (x.shape, x.stride(), x.dtype, x.device, _threads())
        implementation = self._chosen.get(key)
        if implementation is None:
            implementation = self._chosen[key] = self._plan(x, key)
        return implementation(x)

    @torch.compiler.disable
    def _plan(self, x: Tensor, key: tuple) -> Implementation:
        with torch.no_grad():
            operation = self.operation.to(x.device)
            x = x.detach().contiguous(memory_format=memory_format(x))
            self.plans[key], implementation = choose(operation, x, self.kernel)
        log.info("%s: %s for an input of %s", self.name, self.plans[key], tuple(x.shape))
        return implementation

    @property
    def weight(self) -> Tensor:
        """(O, C, K, K): the dense weight, for code that reads it."""
        return self.operation.weight

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


@torch.compiler.assume_constant_result  # it cannot be traced
def _threads() -> int:
    return torch.get_num_threads()


@torch.no_grad()
def for_inference(model: nn.Module, kernel: str = "auto") -> nn.Module:
    """A copy of the network in evaluation mode that computes the same, faster.

    Batch norm is folded into the convolution before it; a stripe convolution also takes the ReLU
    that follows, and runs on the backend that `kernel` (auto, torch, cpp or cupy) allows. Sums and
    other ReLUs of what a layer made are computed in its memory. Layers with a forward of their own, a
    hook or a parametrization are left alone; a network that cannot be traced, or computes something else
    afterwards, keeps all of its norms and ReLUs. For torch.compile run the copy once before, on an input
    of the same shape: choosing a plan cannot be traced.
    """
    model, rectified = _fused(model)
    borrowed = _read_by_others(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, StripeConv2d) and name not in borrowed:
            operation = Operation(
                layer.pattern, layer.stripes.float(), _bias(layer).float(), layer.stride, layer.padding, name in rectified
            )
            replace_module(model, name, InferenceConv2d(operation, kernel, name))
    return model


def _fold(layer: nn.Module, norm: nn.BatchNorm2d) -> None:
    """Make the convolution compute norm(layer(x)) in evaluation mode."""
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


def _bias(layer: nn.Module) -> Tensor:
    if layer.bias is not None:
        return layer.bias
    like = next(layer.parameters())
    return torch.zeros(layer.out_channels, dtype=like.dtype, device=like.device)


def _fused(model: nn.Module) -> tuple[nn.Module, set[str]]:
    """A copy with folded norms and without the ReLUs behind stripe convolutions, and the names of those; a plain
    copy where that cannot be made."""
    try:
        fused, rectified = _rewritten(copy.deepcopy(model).eval())
        if not hasattr(model, "input_shape") or _same(model, fused, rectified):
            return fused, rectified
        log.warning("Batch norm is not folded: the network would compute something else")
    except Exception as problem:  # whatever a user's forward does that is not a graph
        log.info("Batch norm is not folded, the network cannot be traced: %s", problem)
    return copy.deepcopy(model).eval(), set()


def _rewritten(model: nn.Module) -> tuple[nn.Module, set[str]]:
    graph = _Tracer().trace(model)
    rectified = _fuse(model, graph)
    _work_in_place(model, graph)
    made = fx.GraphModule(model, graph, type(model).__name__)
    made.__dict__.update({name: value for name, value in vars(model).items() if name not in made.__dict__})
    return made.eval(), rectified


def _same(model: nn.Module, fused: nn.Module, rectified: set[str]) -> bool:
    """Whether both compute the same, the stripe convolutions of `rectified` with the ReLU that they are going to take."""
    x = random_images(model)
    hooks = [fused.get_submodule(name).register_forward_hook(lambda _, x, y: y.relu()) for name in rectified]
    try:
        with evaluating(model), torch.backends.cudnn.flags(enabled=False):
            return difference(model(x), fused(x)) <= TOLERANCE
    finally:
        for hook in hooks:
            hook.remove()


class _Tracer(fx.Tracer):
    """Every module without children is one step, ours as well."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not list(m.children())


def _fuse(model: nn.Module, graph: fx.Graph) -> set[str]:
    """Fold every batch norm into the convolution that it alone follows, and take the ReLUs behind stripe
    convolutions out of the graph; returns the names of those convolutions."""
    rectified, shared = set(), tied(model).keys() | _owners_read(graph)
    for node in list(graph.nodes):
        layer = _module(model, node)
        if not _is(layer, nn.Conv2d, StripeConv2d) or node.target in shared or not _called_once(model, graph, layer):
            continue
        after = _only_user(node)
        norm = _module(model, after)
        if _is(norm, nn.BatchNorm2d) and norm.running_mean is not None and _called_once(model, graph, norm):
            _fold(layer, norm)
            _skip(graph, after, node)
            after = _only_user(node)
        if isinstance(layer, StripeConv2d) and _is_relu(model, after):
            _skip(graph, after, node)
            rectified.add(node.target)
    return rectified


def _read_by_others(model: nn.Module) -> set[str]:
    """The layers whose tensors the traced network uses besides calling them."""
    return _owners_read(model.graph) if isinstance(model, fx.GraphModule) else set()


def _owners_read(graph: fx.Graph) -> set[str]:
    return {node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}


def _work_in_place(model: nn.Module, graph: fx.Graph) -> None:
    """Sums and ReLUs of what a layer has made, and nothing else reads, need no memory of their own."""
    makers = (nn.Conv2d, StripeConv2d, nn.BatchNorm2d)
    own = {node for node in graph.nodes if _is(_module(model, node), *makers)}
    for node in graph.nodes:
        if _is_sum(node):
            kept = next((k for k in (0, 1) if node.args[k] in own and _only_user(node.args[k]) is node), None)
            if kept is not None:
                node.op, node.target = "call_function", _add_into
                node.args = (node.args[kept], node.args[1 - kept])
            own.add(node)
        elif _is_relu(model, node) and node.args[0] in own and _only_user(node.args[0]) is node:
            node.op, node.target, node.args, node.kwargs = "call_function", torch.relu_, node.args[:1], {}
            own.add(node)


def _add_into(y: Tensor, x: Any) -> Tensor:
    """y + x, in the memory of y where the sum fits."""
    fits = isinstance(x, Tensor) and (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
    return y.add_(x) if fits else y + x


def _is_sum(node: fx.Node) -> bool:
    functions = (operator.add, operator.iadd, torch.add)
    called = node.target in functions if node.op == "call_function" else node.op == "call_method" and node.target in ("add", "add_")
    return called and len(node.args) == 2 and not node.kwargs


def _is_relu(model: nn.Module, node: fx.Node | None) -> bool:
    if node is None or not node.args:
        return False
    function = node.op == "call_function" and node.target in (F.relu, torch.relu, torch.relu_)
    method = node.op == "call_method" and node.target in ("relu", "relu_")
    return function or method or _is(_module(model, node), nn.ReLU)


def _is(module: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    """Whether it is a layer of one of these kinds that computes what its kind does, and nobody listens."""
    return isinstance(module, kinds) and (isinstance(module, StripeConv2d) or why_not_replaced(module) is None)


def _module(model: nn.Module, node: fx.Node | None) -> nn.Module | None:
    return model.get_submodule(node.target) if node is not None and node.op == "call_module" else None


def _called_once(model: nn.Module, graph: fx.Graph, module: nn.Module) -> bool:
    return sum(_module(model, node) is module for node in graph.nodes) == 1


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _skip(graph: fx.Graph, node: fx.Node, before: fx.Node) -> None:
    """Take the node, whose input is `before`, out of the graph."""
    node.replace_all_uses_with(before)
    graph.erase_node(node)
