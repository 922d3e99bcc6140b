"""How channels flow through a network, seen by Torch-Pruning, whose only importer this is.

Its DependencyGraph (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023) follows autograd
and takes every operation it does not know for an elementwise one, in which channel i stays channel i. So it
would walk through slices, padding, shuffles and sums over channels, and couple the wrong layers without a
word. Here such an operation, which a `ChannelTracker` finds, is a barrier: what it writes has channels of its
own, and neither those nor the ones it reads can be removed.
"""

import warnings
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from prune_cli.channels import INPUT, OUTPUT
from prune_cli.evaluation import blank_image
from prune_cli.slicing import block_size, follows
from prune_cli.tracking import Barrier, ChannelTracker, silenced
from prune_cli.user_code import what_failed


class _Blocks(tp.pruner.function.DepthwiseConvPruner):
    """To Torch-Pruning, a grouped convolution whose blocks of outputs go with the same blocks of inputs."""

    def prune_out_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
        raise NotImplementedError("only the graph is Torch-Pruning's, removal is not")

    prune_in_channels = prune_out_channels


class Trace(tp.DependencyGraph):
    """The graph of one network, traced with a blank image of `model.input_shape` (C, H, W).

    pointwise  the linear layers that work on the channels of maps (N, H, W, C), as 1x1 convolutions do
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._blocks = _Blocks()
        self._in_channel_pruning_fn.add(self._blocks.prune_in_channels)
        self._out_channel_pruning_fn.add(self._blocks.prune_out_channels)
        self._barriers: dict[nn.Module, str] = {}
        self._tracker = ChannelTracker(called_by=__file__)
        like = next(model.parameters())
        # Autograd is the tracer: without a gradient, layers behind frozen weights go unseen.
        example = torch.zeros(1, *model.input_shape, device=like.device, dtype=like.dtype, requires_grad=True)
        with torch.enable_grad(), silenced(model):
            # The addition is a node after the last layer: where the network's output begins.
            self.build_dependency(
                model, example, verbose=False, forward_fn=self._forward, output_transform=lambda logits: logits + 0
            )
        found = {m: self._tracker.pointwise.get(m._parameters.get("weight")) for m in model.modules() if isinstance(m, nn.Linear)}
        self.pointwise = {layer for layer, on_channels in found.items() if on_channels}
        self._astray = {layer for layer, on_channels in found.items() if on_channels is False}
        # Every look at a group computes the indices behind the other nodes anew, which nothing has changed.
        self.module2node = {m: node for m, node in self.module2node.items() if isinstance(m, (_ConvNd, nn.Linear))}

    def reason(self, dep: Any) -> str | None:
        """Why a channel cannot leave the layer or operation that `dep` leads to; None = it can, and the
        other channels are computed as before."""
        module, node = dep.target.module, dep.target
        if module in self._barriers:
            return self._barriers[module]
        if module in self._astray:
            return "a linear layer works along another axis"
        if module in self._own_weights and not self.is_out_channel_pruning_fn(dep.handler):
            return f"{type(module).__name__} makes its weight of all inputs"
        if node.grad_fn in self._tracker.hidden:
            return "they are read without a gradient, which cannot be traced"
        if isinstance(module, tp.ops._OutputOp):
            return OUTPUT
        if isinstance(module, nn.Parameter):
            return "they meet a parameter that belongs to no known layer"
        if _is_operation(module):
            return None
        if isinstance(module, _ConvNd) and module.groups > 1:
            return None if follows(module) else "a grouped convolution has another number of inputs than of outputs"
        if writes(module) or isinstance(module, (_NormBase, nn.PReLU)):
            return None
        mixes = "mixes channels" if isinstance(module, (nn.LayerNorm, nn.GroupNorm)) else "is a layer not known here"
        return f"{type(module).__name__} {mixes}"

    def constant(self, layer: nn.Module, inputs: list[int]) -> str | None:
        """Why the layer would feel that these of its inputs are gone although the layers that write them emit zeros:
        an operation between makes something else of a zero. None = it would not."""
        heard = self._tracker.constants.get(layer._parameters.get("weight"))
        return f"{heard.maker} makes something of a zero" if heard and bool(heard.inputs[inputs].any()) else None

    def is_gate(self, layer: nn.Module) -> bool:
        """Whether the layer only scales what others write, as the last one of squeeze-and-excitation does: all that
        is done with what it emits ends in products with channels that are zero where it is not."""
        start = self.module2node[layer]
        ways = [(start, reader) for reader in start.outputs]
        gates = bool(ways)
        while ways and gates:
            before, node = ways.pop()
            if node.grad_fn in self._tracker.gates:
                gates = self._tracker.gates[node.grad_fn] is before.grad_fn
            else:
                gates = _is_operation(node.module) and bool(node.outputs)
                ways += [(node, reader) for reader in node.outputs]
        return gates

    def get_pruner_of_module(self, module: nn.Module) -> Any:
        return self._blocks if block_size(module) > 1 else super().get_pruner_of_module(module)

    def _forward(self, model: nn.Module, image: Tensor) -> Tensor:
        image = image + 0
        self._tracker.barriers[image.grad_fn] = Barrier(INPUT, image.shape[1], image.shape[1])
        with self._tracker:
            return model(image)

    def _trace_computational_graph(self, module2node, output, gradfn2module, reused, visited) -> None:
        gradfn2module |= self._layers_by_weight(gradfn2module)
        for grad_fn, barrier in self._tracker.barriers.items():
            if grad_fn not in gradfn2module:  # a known layer speaks for itself
                stand_in = nn.Conv2d(barrier.inputs, barrier.outputs, 1, device="meta")  # where a walk along channels stops
                self._barriers[stand_in] = barrier.reason
                gradfn2module[grad_fn] = stand_in
        super()._trace_computational_graph(module2node, output, gradfn2module, reused, visited)


    def _layers_by_weight(self, gradfn2module: dict[Any, nn.Module]) -> dict[Any, nn.Module]:
        """The layers where their weights are used: behind a hook, or in a function, Torch-Pruning would look for them
        in vain. Those that make another weight of theirs are noted."""
        found = [module for module in self.model.modules() if writes(module)]
        owners = {weight: [m for m in found if m._parameters.get("weight") is weight] for weight in self._tracker.weights.values()}
        layers = {grad_fn: owners[weight][0] for grad_fn, weight in self._tracker.weights.items() if len(owners[weight]) == 1}
        heard = {module for modules in owners.values() for module in modules}
        self._own_weights = {m for m in gradfn2module.values() if writes(m)} - heard
        for grad_fn in [g for g, m in gradfn2module.items() if m in heard and g not in layers and m in layers.values()]:
            del gradfn2module[grad_fn]
        return layers


class Untraced:
    """Instead of the graph of a network that cannot be traced: no channels go together, none can be removed.

    reason  why it cannot
    """

    module2node: dict[nn.Module, Any] = {}
    pointwise: frozenset[nn.Module] = frozenset()

    def __init__(self, problem: Exception) -> None:
        self.reason = f"the network cannot be traced ({what_failed(problem)})"

    def get_all_groups(self) -> tuple[()]:
        return ()


def trace(model: nn.Module) -> Trace | Untraced:
    """How channels flow through the network. Raises what the network does where it does not run at all."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Torch-Pruning's search, which gives up at some depth
            return Trace(model)
    except Exception as problem:  # of code that was not written for such networks
        with torch.no_grad():
            model(blank_image(model, model.input_shape))
        return Untraced(problem)


def writes(module: nn.Module) -> bool:
    """Whether axis 0 of the layer's weight is its output channels."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))


def _is_operation(module: nn.Module) -> bool:
    """Whether it stands for an addition, a reshape, a concatenation, an activation."""
    return type(module).__module__.startswith("torch_pruning")
