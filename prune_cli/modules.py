"""The modules of a network as PyTorch holds them: under several names, with tensors of several owners, or with a
class, a hook or a parametrization that makes something else of them than their type says."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from prune_cli.evaluation import evaluating

TENSORS = ("weight", "bias", "running_mean", "running_var")  # what is sliced, masked or folded of a layer
_FORWARD = ("forward", "_conv_forward", "__call__")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put another module in the place of the one called `name`, under all of its names."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


def why_not_replaced(module: nn.Module) -> str | None:
    """Why another layer with the same weights would not compute what this one does; None = it would. A training layer
    of ours has a `plain()` form, which does."""
    if computed(module):
        return "its weight is computed from other tensors"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "a hook is attached to it"
    kind = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn."))
    own = any(getattr(type(module), f, None) is not getattr(kind, f, None) for f in _FORWARD)
    if "forward" in vars(module) or (own and not hasattr(module, "plain")):
        return f"{type(module).__name__} computes something of its own"
    return None


def computed(module: nn.Module) -> bool:
    """Whether a tensor that the module seems to have is made of others each time (weight_norm and the like). It is not
    looked at: that alone may change what spectral_norm estimates."""
    made = (isinstance(getattr(type(module), name, None), property) for name in TENSORS)
    return is_parametrized(module) or any(made) or any(isinstance(vars(module).get(name), Tensor) for name in TENSORS)


def weight_shape(module: nn.Module) -> torch.Size | None:
    """Of its weight, also where that is computed; None where it has none."""
    with evaluating(module), torch.no_grad():  # a weight that is computed may depend on how often it was in training
        weight = getattr(module, "weight", None)
        return weight.shape if isinstance(weight, Tensor) else None


def tied(model: nn.Module) -> dict[str, str]:
    """Per module that has a parameter in common with another one the name of that one."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in _own_parameters(model):
        owners.setdefault(parameter, []).append(name)
    shared = [names for names in owners.values() if len(set(names)) > 1]
    return {name: next(other for other in names if other != name) for names in shared for name in names}


def fixed(model: nn.Module) -> Mapping[str, str]:
    """Per module whose tensors nobody may change the shape or the owner of: why."""
    reasons = {name: f"shares its weight with {other}" for name, other in tied(model).items()}
    for name, module in model.named_modules():
        if computed(module):
            reasons[name] = "its weight is computed from other tensors"
    return reasons


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Of every module, once, whatever its names."""
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                yield name, parameter
