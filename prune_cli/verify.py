"""Whether a cut network computes what the masked one does."""

import torch
from torch import Tensor, nn

from prune_cli.cutting import Cut
from prune_cli.errors import StageError
from prune_cli.evaluation import difference, observe, random_images

TOLERANCE = 1e-4  # relative to the largest value of a layer


def verify(masked: nn.Module, small: Cut, tolerance: float = TOLERANCE) -> None:
    """Compare the two networks layer by layer, in evaluation mode on random images.

    Raises StageError naming the first layer whose output differs by more than `tolerance`
    relative to the largest value of that layer.
    """
    found = first_difference(masked, small, tolerance)
    if found is not None:
        layer, how = found
        raise StageError(f"The cut network differs from the masked one: {layer or 'the output'} {how}")


def first_difference(masked: nn.Module, small: Cut, tolerance: float = TOLERANCE) -> tuple[str, str] | None:
    """The first layer ("" is the network) whose outputs differ, and how; None = none does.

    Not the outputs alone: behind many layers a network may say nearly the same for all images.
    """
    x = random_images(masked)
    # cuDNN's TensorFloat-32 alone would make the two forms of a layer differ by 1e-3.
    with torch.backends.cudnn.flags(enabled=False):
        expected, found = _outputs(masked, x), _outputs(small.model, x)
    for old, reference in expected.items():
        if old in small.shifted:
            continue
        name = small.renamed.get(old, old)
        axis = reference.ndim - 1 if isinstance(masked.get_submodule(old), nn.Linear) else 1
        kept = sorted(set(range(reference.shape[axis])) - set(small.removed.get(old, ())))
        reference = reference.index_select(axis, torch.tensor(kept, device=reference.device))
        if name not in found or reference.shape != found[name].shape:
            return old, "has another shape than the masks say"
        off = difference(reference, found[name])
        if not off <= tolerance:  # also where it is not a number
            return old, f"is off by {off:.1e} relative, allowed {tolerance:.0e}"
    return None


def _outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What every layer with parameters emits, in order of execution; "" is the network. A layer that emits no tensor
    (an LSTM) is left to those that read it."""
    outputs: dict[str, Tensor] = {}
    layers = {name: module for name, module in model.named_modules() if name and not isinstance(module, torch.jit.ScriptModule)}
    names = {module: name for name, module in layers.items() if list(module.parameters(recurse=False))}

    def note(layer: nn.Module, _, output: Tensor) -> None:
        if isinstance(output, Tensor) and output.ndim > 1:
            # A copy: behind a scatter, an activation that works in place no longer works upon this tensor.
            outputs.setdefault(names[layer], output.clone())

    observe(model, x, names, note)
    return {**outputs, "": observe(model, x, (), note)}  # some layers compute in another way where nobody listens
