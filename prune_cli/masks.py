"""Which units of which layers are kept: an immutable mapping from layer name to bool tensor."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

# The axes of a convolution's weight (O, I, K, K) that index one unit; the unit spans the others.
UNIT_AXES = {"filter": (0,), "stripe": (0, 2, 3), "group": (1, 2, 3), "weight": (0, 1, 2, 3)}


@dataclass(frozen=True)
class Coupled:
    """Layers whose masks are one and the same, chosen in blocks of neighbouring units."""

    layers: tuple[str, ...]
    block: int = 1


@dataclass(frozen=True)
class Masks:
    """The outcome of a selection.

    unit       what is removed together, a key of UNIT_AXES
    keep       per layer, bool, True = kept; its shape is the weight's shape at UNIT_AXES[unit]:
               (O,) for filters, (O, K, K) for stripes
    requested  fraction of the units that was to be removed
    notes      sentences a user should read: where a floor acted, why a ranking is not to be trusted
    coupled    which layers were decided together
    """

    unit: str
    keep: Mapping[str, Tensor]
    requested: float
    notes: tuple[str, ...] = ()
    coupled: tuple[Coupled, ...] = ()

    @property
    def total(self) -> int:
        """Number of prunable units."""
        return sum(keep.numel() for keep in self.keep.values())

    @property
    def obtained(self) -> float:
        """Fraction of the units that is removed; 0 where there are none."""
        if not self.total:
            return 0.0
        return 1 - sum(int(keep.sum()) for keep in self.keep.values()) / self.total

    def of(self, layer: str, weight: Tensor) -> Tensor:
        """The layer's mask as a bool tensor that broadcasts against `weight`.

        The weight of a linear layer has the axes (O, I) only; its filters are its neurons.
        """
        axes = [axis for axis in UNIT_AXES[self.unit] if axis < weight.ndim]
        shape = [size if axis in axes else 1 for axis, size in enumerate(weight.shape)]
        return self.keep[layer].to(weight.device).reshape(shape)

    def with_notes(self, *notes: str) -> "Masks":
        """The same masks with further notes."""
        return replace(self, notes=self.notes + notes)

    def to(self, device: torch.device) -> "Masks":
        """The same masks on a device, so that applying them at every step copies nothing."""
        return replace(self, keep={layer: keep.to(device) for layer, keep in self.keep.items()})

    def save(self, path: Path) -> None:
        """Write to a safetensors file."""
        header = {
            "unit": self.unit, "requested": self.requested, "notes": self.notes,
            "coupled": [asdict(together) for together in self.coupled],
        }  # fmt: skip
        tensors = {layer: keep.cpu().contiguous() for layer, keep in self.keep.items()}
        save_file(tensors, path, metadata={"masks": json.dumps(header)})

    @classmethod
    def load(cls, path: Path) -> "Masks":
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["masks"])
            keep = {layer: file.get_tensor(layer) for layer in file.keys()}
        coupled = tuple(Coupled(tuple(c["layers"]), c["block"]) for c in header.get("coupled", ()))
        return cls(header["unit"], keep, header["requested"], tuple(header["notes"]), coupled)


def dead_filters(masks: Masks, layer: str, module: nn.Module) -> Tensor:
    """(O,) bool: filters of the layer of which no weight is kept; none for an unmasked layer."""
    if layer not in masks.keep:
        return torch.zeros(module.weight.shape[0], dtype=torch.bool)
    keep = masks.of(layer, module.weight).expand_as(module.weight)
    return ~keep.flatten(1).any(1).cpu()


def random_like(masks: Masks, seed: int) -> Masks:
    """The control: as many units removed from every layer as in `masks`, chosen at random, where layers
    are coupled for all of them at once."""
    generator = torch.Generator().manual_seed(seed)
    together = {layer: coupled for coupled in masks.coupled for layer in coupled.layers}
    keep: dict[str, Tensor] = {}
    for layer, mask in masks.keep.items():
        coupled = together.get(layer, Coupled((layer,)))
        blocks = mask.flatten().cpu().view(-1, coupled.block)
        if layer not in keep:
            chosen = blocks[torch.randperm(len(blocks), generator=generator)].reshape(mask.shape)
            keep |= dict.fromkeys(coupled.layers, chosen)
    return Masks(masks.unit, keep, masks.requested, coupled=masks.coupled)
