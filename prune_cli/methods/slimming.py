"""Network slimming: "Learning Efficient Convolutional Networks through Network Slimming" (Liu et al., ICCV 2017)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from prune_cli.channels import ChannelGraph
from prune_cli.hooks import Progress
from prune_cli.masks import Coupled, Masks
from prune_cli.method import PruningMethod, selection_field
from prune_cli.prunable import Skip, weighted
from prune_cli.selection import select_global, separation_note
from prune_cli.settings import Bounds, NonNegative, Positive
from prune_cli.streams import stream_norms
from prune_cli.trial import channel_graph, indispensable, why_not_for_itself


@dataclass(frozen=True, kw_only=True)
class NetworkSlimming(PruningMethod):
    """The scale of a channel's batch norm says what the channel is worth: an L1 penalty on all of
    them (section 3), then one threshold for the whole network.

    The penalty is on every scale, also where a residual sum keeps a channel from being removed. Of a batch
    norm that reads a stream (pre-activation ResNets, DenseNets) the channels are selected for the layers
    behind it. The paper fine-tunes with the whole schedule again: set recipe.finetune as recipe.pretrain.

    lam       weight of the penalty lam * sum |gamma|; None derives it from the schedule
    strength  used when lam is None: how many times over the schedule would drive an unused scale
              from one to zero. The published CIFAR-10 settings are a strength of 9.5 for VGG
              (lam 1e-4) and 2.7 for ResNet and DenseNet (lam 1e-5)
    most      no layer loses more than this fraction of its filters in one round (section 4.5: in each
              of six passes half of all, and at most half of a layer)
    residual  also remove filters that write into a residual sum, each layer for itself, and those that a grouped
              convolution reads, in its blocks by their mean scale; the paper leaves the sums of ResNets whole
    """

    unit: ClassVar[str] = "filter"
    scope: ClassVar[str] = "global"
    version: ClassVar[int] = 2  # 2: residual=true reaches what grouped convolutions read
    start: Literal["init", "dense"] = "init"
    finetune: bool = selection_field(default=True)
    lam: NonNegative | None = None
    strength: Positive = 2.7
    residual: bool = selection_field(default=False)
    exclude: tuple[str, ...] | None = selection_field(default=None)
    most: Annotated[float, Bounds(0, 1, low_open=True)] | None = selection_field(default=None)

    def candidates(self, model: nn.Module) -> Mapping[str, Tensor | Skip]:
        """(O,) |gamma| of the batch norm behind every prunable layer, and of those on a stream by their own name."""
        graph, norms = channel_graph(model), _scaled_norms(model)
        whole = indispensable(model, "selection")
        found = {name: self._candidate(graph, norms, name) for name in weighted(model)}
        return found | {name: norms[name].weight.detach().abs() for name in stream_norms(model) if (name,) not in whole}

    def _candidate(self, graph: ChannelGraph, norms: Mapping[str, nn.Module], name: str) -> Tensor | Skip:
        reason = graph.why_not_alone(name)
        if reason and self.residual:
            reason = why_not_for_itself(graph, name)
        if reason:
            return Skip(reason)
        # Not a norm behind a concatenation or a sum: its channels are other layers' too.
        norm = graph.own_norm(name)
        return norms[norm].weight.detach().abs() if norm in norms else Skip("no batch norm with a scale of its own")

    def penalty(self, model: nn.Module, progress: Progress) -> dict[str, Tensor]:
        # The gradient of |gamma| is sign(gamma), zero at zero: the paper's sub-gradient.
        scales = torch.cat([norm.weight for norm in _scaled_norms(model).values()])
        weight = progress.penalty_weight(self.strength) if self.lam is None else self.lam
        return {"scale_l1": weight * scales.abs().sum()}

    def prune(self, model: nn.Module, ratio: float) -> Masks:
        scores = self.prunable(model).layers
        blocks = _blocks(model, scores) if self.residual else {}
        scores = scores | {n: scores[n].view(-1, b).mean(1).repeat_interleave(b) for n, b in blocks.items()}
        masks = select_global(scores, ratio, self.unit, 1.0 if self.most is None else self.most)
        # Where the ratio or the floor ends within a block, the block stays.
        whole = {n: masks.keep[n].view(-1, b).any(1).repeat_interleave(b) for n, b in blocks.items()}
        coupled = tuple(Coupled((name,), block) for name, block in blocks.items())
        masks = replace(masks, keep={**masks.keep, **whole}, coupled=coupled)
        return masks.with_notes(*separation_note(scores, masks, "scale of batch norm"))

    def watch(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: norm.weight.detach().abs() for name, norm in _scaled_norms(model).items()}


def _blocks(model: nn.Module, layers: Iterable[str]) -> dict[str, int]:
    """Of the layers whose filters a grouped convolution reads, and no sum, how many go with a block of its."""
    groups = {group.sources: group for group in channel_graph(model).groups if group.removable and group.block > 1}
    return {name: groups[name,].block for name in layers if (name,) in groups}


def _scaled_norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, _NormBase) and m.weight is not None}
