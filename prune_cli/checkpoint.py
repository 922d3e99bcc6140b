"""A network as one self-contained file: safetensors with the recipe for its modules in the header.

The header says how to build the dense network (`ModelSpec`) and what surgery changed: attributes
of layers, which layers hold stripes or gathered columns only, behind which ones channels are scattered
into a residual sum, and before which ones they are selected from a stream. All of it is plain data;
loading builds the dense network, replays the surgery, and fills in the tensors. No pickle, no run folder.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prune_cli.errors import UserError, one_line
from prune_cli.layers.gathered import GatheredConv2d
from prune_cli.layers.scatter import ScatterChannels, scattered
from prune_cli.layers.select import SelectChannels, selected
from prune_cli.layers.stripe import StripeConv2d
from prune_cli.models.spec import ModelSpec
from prune_cli.modules import replace_module

FORMAT = "prune-cli/1"
# What says how wide a layer is, besides its tensors.
WIDTHS = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_parameters")


def save_model(path: Path, model: nn.Module, spec: ModelSpec, classes: int) -> None:
    """Write `model`, which `spec` built and surgery may have cut, to `path`."""
    channels, resolution = model.input_shape[0], model.input_shape[1]
    widths, stripes, groups, scatters, selections = {}, {}, {}, {}, {}
    for name, module in model.named_modules():
        if isinstance(module, StripeConv2d):
            stripes[name] = {"in_channels": module.in_channels}
        elif isinstance(module, GatheredConv2d):
            groups[name] = {"out_channels": module.out_channels}
        elif isinstance(module, ScatterChannels):
            scatters[name.rpartition(".")[0]] = module.out_channels
        elif isinstance(module, SelectChannels):
            selections[name.rpartition(".")[0]] = module.in_channels
        elif found := {a: getattr(module, a) for a in WIDTHS if isinstance(getattr(module, a, None), int)}:
            widths[name] = found
    header = {
        "format": FORMAT,
        "model": asdict(spec.without_weights()),
        "shape": {"channels": channels, "resolution": resolution, "classes": classes},
        "widths": widths,
        "stripes": stripes,
        "groups": groups,
        "scatters": scatters,
        "selections": selections,
    }
    save_file(tensors_of(model), path, metadata={"prune_cli": json.dumps(header)})


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The state of the network as it is written: a tensor that has several names under the first of them."""
    first = {tensor: name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    return {name: t.detach().cpu().contiguous().clone() for t, name in reversed(first.items())}


def load_model(path: Path | str) -> nn.Module:
    """The network in the file, on the CPU, in evaluation mode.

    Raises UserError: no such file, or not one of ours.
    """
    header, tensors = _read(Path(path))
    try:
        return _rebuilt(header, tensors).eval()
    except UserError as problem:  # the user's own module lies elsewhere, or has changed
        raise UserError(f"{path}: its network cannot be built: {problem}") from problem
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as problem:
        raise UserError(f"{path}: its header and its tensors do not make a network ({one_line(problem)})") from problem


def describe(path: Path | str) -> dict:
    """The header of the file: `model`, `shape`, and what surgery changed. Raises UserError as `load_model`."""
    return _read(Path(path))[0]


def file_bytes(path: Path) -> int:
    """Size of the file."""
    return path.stat().st_size


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a checkpoints/*.safetensors of a run")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("prune_cli", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as problem:
        raise UserError(f"{path}: damaged or not a safetensors file ({problem})") from problem
    found = header.get("format") if isinstance(header, dict) else None
    if found != FORMAT:
        raise UserError(f"{path}: not written by prune-cli (format {found}, expected {FORMAT})")
    return header, tensors


def _rebuilt(header: dict, tensors: dict[str, Tensor]) -> nn.Module:
    """The dense network, the surgery replayed, the tensors filled in."""
    model = ModelSpec(**header["model"]).build(**header["shape"])
    scatters, selections = (header.get(key, {}) for key in ("scatters", "selections"))  # not in the oldest files
    for name in sorted([*scatters, *selections], key=len):  # the outer one first
        wrap, kind, widths = (scattered, "scatter", scatters) if name in scatters else (selected, "select", selections)
        channels = tensors[f"{name}.{kind}.channels"]
        replace_module(model, name, wrap(model.get_submodule(name), channels, widths[name]))
    for name, width in header["widths"].items():
        module = model.get_submodule(name)
        for attribute, value in width.items():
            if getattr(module, attribute) != value:  # a compiled part, which is never cut, takes none
                setattr(module, attribute, value)
    for name, stripe in header["stripes"].items():
        conv = model.get_submodule(name)
        pattern = tensors[f"{name}.pattern"]
        layer = StripeConv2d(stripe["in_channels"], pattern, conv.stride, conv.padding, conv.bias is not None)
        replace_module(model, name, layer)
    for name, gathered in header.get("groups", {}).items():
        conv = model.get_submodule(name)
        pattern = tensors[f"{name}.pattern"]
        layer = GatheredConv2d(pattern, gathered["out_channels"], conv.stride, conv.padding, conv.bias is not None)
        replace_module(model, name, layer)
    _resize(model, tensors)
    load_tensors(model, tensors)
    return model


def load_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load the tensors, which a network of the same code wrote: some modules (MNASNet) refuse what does not say
    which version of them it comes from, and safetensors has no place for that. A further name of a tensor that is
    there needs none of its own."""
    owned = model.state_dict(keep_vars=True)
    there = {owned[name] for name in tensors if name in owned}
    missing = {name for name, tensor in owned.items() if name not in tensors and tensor not in there}
    if missing:
        raise KeyError(f"{min(missing)} is missing")
    state = model.state_dict()
    state.update(tensors)
    model.load_state_dict(state)


def _resize(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give every parameter and buffer the shape it has in the file."""
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        old = getattr(module, leaf)
        if old.shape != tensor.shape:
            new = torch.empty_like(tensor)
            setattr(module, leaf, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
