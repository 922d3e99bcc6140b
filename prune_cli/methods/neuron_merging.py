"""Neuron merging: "Neuron Merging: Compensating for Pruned Neurons" (Kim et al., NeurIPS 2020)."""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from prune_cli.channels import ChannelGraph, ChannelGroup
from prune_cli.criteria import Criterion, filter_score
from prune_cli.errors import UserError
from prune_cli.filters import FilterMethod
from prune_cli.masks import Masks
from prune_cli.method import selection_field
from prune_cli.prunable import sorted_out
from prune_cli.settings import Fraction
from prune_cli.trial import channel_graph


@dataclass(frozen=True, kw_only=True)
class NeuronMerging(FilterMethod):
    """Prunes filters by a criterion, without data and without fine-tuning, and lets each removed
    filter live on in the most similar kept one.

    A removed filter i with w_i = s * w_j behaves, behind batch norm and ReLU, like S times the kept
    filter j; so the next layer's weights for i, times S, are added to those for j (section 3).

    criterion  which filters are kept
    threshold  merge only where the cosine similarity of w_i and w_j is at least this
    lam        how much the cosine counts beside the constant B that batch norm leaves (section 3.3)
    bn_scale   `exact`: S and B with the standard deviation of the batch norm; `authors`: as in the
               published code, which takes the variance for it and the ratio of both inverted
    merge      false prunes only: the comparison of the paper's tables
    """

    criterion: Criterion = selection_field(default="l1")
    threshold: Fraction = selection_field(default=0.1)
    lam: Fraction = selection_field(default=0.85)
    bn_scale: Literal["authors", "exact"] = selection_field(default="authors")
    merge: bool = selection_field(default=True)

    def score(self, layer: nn.Module, scales: Tensor | None) -> Tensor:
        return filter_score(_with_bias(layer), self.criterion)

    def compensate(self, model: nn.Module, masks: Masks) -> nn.Module:
        if not self.merge:
            return model
        merged, mergeable, graph = copy.deepcopy(model), False, channel_graph(model)
        # All similarities are those of the original network: merging changes the next layer's weights.
        for name, filters in sorted_out(self.candidates_of(graph), self.exclude).layers.items():
            group = filters.group
            if name not in masks.keep or group.producers != (name,):  # a sum passes on no multiple of one filter
                continue
            places = graph.outputs(group, range(group.width))
            for reader, channels in _readers(graph, group, name).items():
                if (norms := _norms_between(graph, name, reader)) is None:
                    continue
                norm = _Norm(model.get_submodule(norms[0]), places[norms[0]]) if norms else None
                removed, kept, scale = self._merges(model.get_submodule(name), norm, masks.keep[name])
                _fold(merged.get_submodule(reader).weight, channels, removed, kept, scale)
                mergeable = True
        if not mergeable:
            raise UserError(
                "method=neuron_merging: there is nothing to merge into: no pruned layer is followed by another "
                "with at most one batch norm between them; method.merge=false prunes only"
            )
        return merged

    def _merges(self, layer: nn.Module, norm: "_Norm | None", keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Filters i, the kept filters j that they merge into, and the scales S: three (M,)."""
        removed, kept = (~keep).nonzero().flatten(), keep.nonzero().flatten()
        weights = _with_bias(layer)
        norms = torch.linalg.vector_norm(weights, dim=1).double().clamp_min(1e-30)
        cosine = (weights[removed] @ weights[kept].T) / (norms[removed].unsqueeze(1) * norms[kept])
        scale = norms[removed].unsqueeze(1) / norms[kept]
        best = cosine
        if norm is not None:
            scale, constant = self._behind_norm(norm, removed, kept, scale)
            # Behind a scale or a variance of zero, as training with a penalty leaves them, nothing is a multiple.
            valid = scale.isfinite() & constant.isfinite()
            distance = constant.abs() / scale.abs().clamp_min(1e-30)
            low = distance.where(valid, torch.inf).amin(1, keepdim=True)
            high = distance.where(valid, -torch.inf).amax(1, keepdim=True)
            cost = self.lam * (1 - cosine) + (1 - self.lam) * (distance - low) / (high - low).clamp_min(1e-30)
            best, scale = (-cost).where(valid, -torch.inf), scale.where(valid, -1)
        nearest = best.argmax(1, keepdim=True)
        cosine, scale = cosine.gather(1, nearest).flatten(), scale.gather(1, nearest).flatten()
        # relu(S x) = S relu(x) holds for S >= 0 only
        merged = (cosine >= self.threshold) & (scale >= 0)
        return removed[merged], kept[nearest.flatten()[merged]], scale[merged].float()

    def _behind_norm(self, norm: "_Norm", removed: Tensor, kept: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """S and B with bn_i(s x) = S bn_j(x) + B, for all pairs (removed, kept)."""
        gamma, beta, mean, variance = norm.tensors
        sigma = (variance + norm.module.eps).sqrt() if self.bn_scale == "exact" else variance
        gamma_i, sigma_i, beta_i, mean_i = (t[removed].unsqueeze(1) for t in (gamma, sigma, beta, mean))
        gamma_j, sigma_j, beta_j, mean_j = (t[kept].unsqueeze(0) for t in (gamma, sigma, beta, mean))
        ratio = (gamma_i / gamma_j) * (sigma_j / sigma_i)
        scale = s * (ratio if self.bn_scale == "exact" else 1 / ratio)
        constant = gamma_i / sigma_i * (s * (mean_j - beta_j * sigma_j / gamma_j) - mean_i) + beta_i
        return scale, constant


@dataclass(frozen=True)
class _Norm:
    """A batch norm, and the places of a layer's filters among its channels: in a DenseNet it has others too."""

    module: nn.Module
    places: list[int]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """(O,): scale, shift, mean and variance of each filter."""
        module, mean = self.module, self.module.running_mean
        gamma = torch.ones_like(mean) if module.weight is None else module.weight.detach()
        beta = torch.zeros_like(mean) if module.bias is None else module.bias.detach()
        return tuple(t.double()[self.places] for t in (gamma, beta, mean, module.running_var))


def _norms_between(graph: ChannelGraph, layer: str, reader: str) -> tuple[str, ...] | None:
    """The batch norm on the way from the layer to one that reads it, none or one; None where no filter is a multiple
    of another behind what lies between: several norms, several ways, or a norm without statistics of its own."""
    norms, *others = graph.ways(layer).get(reader, set()) or [("", "")]
    known = (graph.model.get_submodule(norm).running_mean is not None for norm in norms)
    return None if others or len(norms) > 1 or not all(known) else norms


def _with_bias(layer: nn.Module) -> Tensor:
    """(O, I * K * K [+ 1]): each filter as one vector, its bias the last entry."""
    weight = layer.weight.detach().flatten(1)
    return weight if layer.bias is None else torch.cat([weight, layer.bias.detach().unsqueeze(1)], dim=1)


def _readers(graph: ChannelGraph, group: ChannelGroup, name: str) -> dict[str, Tensor]:
    """Per layer that reads the group's channels: (channels, positions), its input index of each
    channel at each position (more than one behind a flatten)."""
    readers = graph.inputs(group, range(group.width))
    if not readers:
        raise UserError(f"method=neuron_merging: no layer reads {name}, there is nothing to merge into")
    return {reader: torch.tensor(inputs).view(group.width, -1) for reader, inputs in readers.items()}


@torch.no_grad()
def _fold(weight: Tensor, channels: Tensor, removed: Tensor, kept: Tensor, scale: Tensor) -> None:
    """weight (O, I, ...): add S_ij times the inputs of i to those of j; a constant of i has no part in them any more."""
    moved = channels[removed].flatten()
    scales = scale.repeat_interleave(channels.shape[1]).view(1, -1, *[1] * (weight.ndim - 2))
    weight.index_add_(1, channels[kept].flatten(), weight[:, moved] * scales)
    weight[:, moved] = 0
