"""Batch norms on a stream: a residual sum or a concatenation, which other layers go on reading.

A channel of a stream cannot go because one batch norm has no use for it. But it can be left out for the
layers behind that norm: channel selection, by which network slimming (Liu et al., ICCV 2017, section
3.3) prunes pre-activation ResNets and DenseNets. The stream stays as wide as it was.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from prune_cli.channels import united
from prune_cli.grouping import traced
from prune_cli.layers.select import SelectChannels, selected
from prune_cli.modules import replace_module
from prune_cli.slicing import take_out


def stream_norms(model: nn.Module) -> tuple[str, ...]:
    """The batch norms with a scale that belong to no single layer, and whose channels nothing but
    convolutions and linear layers behind them reads."""
    graph = traced(model)
    own = {graph.own_norm(producer) for group in graph.groups for producer in group.producers}
    candidates = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.weight is not None and name not in own
    ]  # fmt: skip
    with _as_convolutions(model, candidates):
        alone = {group.producers for group in traced(model).inner if not group.norms}
    return tuple(name for name in candidates if (name,) in alone)


def select(model: nn.Module, keep: Mapping[str, Tensor]) -> dict[str, str]:
    """Leave out, in place, the channels of stream norms that are not kept: before the norm, which
    shrinks, and in all layers behind it. Returns the new names of the norms that got another one."""
    with _as_convolutions(model, keep):
        graph = traced(model)
    gone = {
        group: (~keep[group.sources[0]]).nonzero().flatten().tolist()
        for group in graph.inner if group.sources[0] in keep
    }  # fmt: skip
    unread = united(graph.inputs(group, channels) for group, channels in gone.items())
    for reader, channels in unread.items():
        take_out(model.get_submodule(reader), inputs=channels)
    renamed = {}
    for name, kept in keep.items():
        norm, channels = model.get_submodule(name), kept.nonzero().flatten()
        width = norm.num_features
        take_out(norm, outputs=(~kept).nonzero().flatten().tolist())
        selection = _selection_before(model, name)
        if selection is None:
            replace_module(model, name, selected(norm, channels.to(norm.weight.device), width))
            renamed[name] = f"{name}.layer"
        else:
            selection.channels = selection.channels[channels.to(selection.channels.device)]
    return renamed


def _selection_before(model: nn.Module, norm: str) -> SelectChannels | None:
    """The selection that an earlier cut put before the norm."""
    parent = model.get_submodule(norm.rpartition(".")[0])
    found = getattr(parent, "select", None)
    return found if isinstance(found, SelectChannels) and norm.endswith(".layer") else None


@contextmanager
def _as_convolutions(model: nn.Module, norms: Iterable[str]) -> Iterator[None]:
    """Meanwhile the norms are convolutions: layers that write channels of their own, where the
    stream's channels end."""
    replaced = {name: model.get_submodule(name) for name in norms}
    for name, norm in replaced.items():
        like = norm.weight
        conv = nn.Conv2d(norm.num_features, norm.num_features, 1, bias=False, device=like.device, dtype=like.dtype)
        replace_module(model, name, conv)
    try:
        yield
    finally:
        for name, norm in replaced.items():
            replace_module(model, name, norm)
