"""Multiply-adds of what has no formula: attention, transposed convolutions, products in a user's own forward.

PyTorch's own counter sees every matrix product that is executed; here they are attributed to the module in whose
forward they stand, without those of the modules inside it.
"""

from collections.abc import Collection
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prune_cli.evaluation import evaluating

_LIBRARIES = ("torch.nn.", "torchvision.", "prune_cli.")  # whose modules leave products to layers that have a formula


def has_products(model: nn.Module, known: Collection[nn.Module]) -> bool:
    """Whether there may be products outside of the `known` layers."""
    return any(
        not type(module).__module__.startswith(_LIBRARIES) or any(p.ndim > 1 for p in module.parameters(recurse=False))
        for module in model.modules() if module not in known
    )  # fmt: skip


def own_products(model: nn.Module, x: Tensor, known: Collection[nn.Module]) -> dict[nn.Module, int]:
    """Multiply-adds that each module executes itself on the images `x`, outside of the `known` layers in it."""
    found: dict[nn.Module, int] = {}
    counter, inside = FlopCounterMode(display=False), [0]  # per open module what the modules in it have spent

    def enter(module: nn.Module, *_: Any) -> None:
        inside.extend((counter.get_total_flops(), 0))

    def leave(module: nn.Module, *_: Any) -> None:
        inner, start = inside.pop(), inside.pop()
        spent = counter.get_total_flops() - start
        found[module] = found.get(module, 0) + (spent - inner) // 2
        inside[-1] += spent

    modules = list(_outside(model, known))
    hooks = [hook for m in modules for hook in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        with evaluating(model), torch.no_grad(), _in_single_steps(), counter:
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return {module: spent for module, spent in found.items() if spent and module not in known}


def _outside(module: nn.Module, known: Collection[nn.Module]) -> list[nn.Module]:
    """The known layers and all modules around them; what lies inside one (a parametrization) is part of it."""
    if isinstance(module, torch.jit.ScriptModule):  # takes no hooks; what it executes is its parent's
        return []
    if module in known:
        return [module]
    inner = (found for child in module.children() for found in _outside(child, known))
    return list(dict.fromkeys([module, *inner]))


@contextmanager
def _in_single_steps():
    """Attention in products that can be counted, not as one fused kernel."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
