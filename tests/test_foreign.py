"""Weights that another program saved become the dense network, or are refused with a sentence."""

import argparse
import re
import warnings
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TinyStream, TinyVGG, randomise
from torch import nn
from torch.nn.utils import prune
from toys import network

from prune_cli.build import build
from prune_cli.errors import UserError
from prune_cli.foreign import fill, read_weights
from prune_cli.models.spec import ModelSpec
from prune_cli.pipeline import run

RESNET, TINY = "prune_cli.models.resnet.CifarResNet", "tiny.TinyResNet"


def load_foreign(model, path: str) -> tuple[str, ...]:
    return fill(model, read_weights(path), path)


def renamed(state: dict) -> dict:
    """As a network with the same layers under other names has it."""
    layers = {name: number for number, name in enumerate(dict.fromkeys(key.rpartition(".")[0] for key in state))}
    return OrderedDict((f"L{layers[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}", t) for key, t in state.items())


def without_counters(state: dict) -> dict:
    return {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}


def behind(prefix: str, state: dict) -> dict:
    return OrderedDict((prefix + name, t) for name, t in state.items())


FORMS = {
    "plain": lambda state: state,
    "under state_dict, from several GPUs": lambda state: {
        "epoch": 3, "acc": 93.8, "state_dict": behind("module.", state),
    },
    "under net": lambda state: {"net": state, "optimizer": {"state": {0: torch.zeros(3)}}},
    "two levels down": lambda state: {"model": {"state_dict": state}},
    "other names": renamed,
    "other names, from before batches were counted": lambda state: {"model": renamed(without_counters(state))},
    "half precision, in another order": lambda state: {k: state[k].half() for k in sorted(state)},
    "in another order behind a prefix": lambda state: behind("backbone.net.", {k: state[k] for k in sorted(state)}),
    "compiled on several GPUs": lambda state: behind("_orig_mod.module.", state),
    "parts of it wrapped": lambda state: {
        name.replace("block1.", "block1._orig_mod.").replace("block2.", "block2.module."): t for name, t in state.items()
    },
    "averaged": lambda state: {"n_averaged": torch.tensor(5), **behind("module.", state)},
    "a moving average alone": lambda state: {"epoch": 1, "state_dict_ema": state},
    "a moving average beside nothing": lambda state: {"model": None, "ema": state},
    "under a name of its own": lambda state: {"weights of mine": state, "step": torch.tensor(3)},
    "parameters": lambda state: {k: nn.Parameter(t, t.is_floating_point()) for k, t in state.items()},
}  # fmt: skip
# What is no plain tensor, or not alone: only torch.save's newer form keeps these.
OBJECTS = {
    "with arguments": lambda net: {"args": argparse.Namespace(lr=0.1), "state_dict": net.state_dict()},
    "with numpy's numbers": lambda net: {"best": np.float64(93.8), "curve": np.ones(3), "state_dict": net.state_dict()},
    "beside tensors in a dictionary": lambda net: {**net.state_dict(), "curves": {str(n): torch.ones(9) for n in range(99)}},
    "a whole network": lambda net: net,
    "a whole network on several GPUs, nested": lambda net: {"net": nn.DataParallel(net), "acc": 1.0},
    "sparse": lambda net: {k: t.to_sparse() if t.ndim == 4 else t for k, t in net.state_dict().items()},
    "sparse rows": lambda net: {k: t.to_sparse_csr() if t.ndim == 2 else t for k, t in net.state_dict().items()},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".pth.tar", ".t7", ".safetensors"])
def test_the_weights_arrive(form, suffix, tmp_path):
    trained, model = network(TINY), randomise(network(TINY), seed=7)
    path, content = str(tmp_path / f"checkpoint{suffix}"), FORMS[form](trained.state_dict())
    if suffix == ".safetensors":
        while inner := next((v for v in content.values() if isinstance(v, dict) and "optimizer" not in v), None):
            content = inner  # such a file holds tensors only
        save_file(content, path)
        if "other names" in form:
            with pytest.raises(UserError, match=r"L0\.weight is not in both .* keeps no order"):
                load_foreign(model, path)
            return
    else:
        torch.save(content, path, _use_new_zipfile_serialization=suffix != ".t7")
    load_foreign(model, path)
    exact = "half" not in form
    for name, tensor in without_counters(trained.state_dict()).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0 if exact else 1e-3, atol=0 if exact else 1e-3)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("form", OBJECTS)
def test_the_weights_arrive_from_among_other_things(form, tmp_path):
    trained, model = randomise(network(TINY)), network(TINY)
    load_foreign(model, saved(tmp_path, OBJECTS[form](trained)))
    assert all(torch.equal(model.state_dict()[name], t) for name, t in without_counters(trained.state_dict()).items())


def test_quantized_weights_are_what_they_stand_for(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = network("tiny.TinyVGG").state_dict()
        state = {k: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8) if t.ndim == 4 else t for k, t in state.items()}
        path, model = saved(tmp_path, state), network("tiny.TinyVGG")
    load_foreign(model, path)
    name = next(name for name, t in state.items() if t.ndim == 4)
    assert torch.equal(model.state_dict()[name], state[name].dequantize())


def saved(tmp_path, content) -> str:
    torch.save(content, tmp_path / "checkpoint.pth")
    return str(tmp_path / "checkpoint.pth")


def edited(state: dict, **changes: torch.Tensor | None) -> dict:
    state = {**state, **{name.replace("__", "."): t for name, t in changes.items()}}
    return {name: t for name, t in state.items() if t is not None}


def with_value(state: dict, name: str, value: float) -> dict:
    changed = state[name].double()
    changed.view(-1)[1] = value
    return {**state, name: changed}


REFUSED = {
    "another width": (
        lambda state: edited(state, layer2__0__conv1__weight=torch.zeros(48, 16, 3, 3)),
        r"layer2\.0\.conv1\.weight \(48, 16, 3, 3\), does not fit the network's layer2\.0\.conv1\.weight \(32, 16, 3, 3\)",
    ),
    "deeper": (
        lambda _: network(RESNET, depth=32).state_dict(), r"layer1\.3\.conv1\.weight .*, has no place in the network; choose",
    ),
    "deeper, behind a prefix": (
        lambda _: behind("net.", network(RESNET, depth=32).state_dict()), r"net\.layer1\.3\.conv1\.weight .* has no place",
    ),
    "less deep": (
        lambda state: {k: t for k, t in state.items() if not k.startswith("layer1.2")}, r"layer2\.0\.conv1\.weight .* does not fit the network's layer1\.2",
    ),
    "one too few": (lambda state: edited(state, fc__bias=None), r"it has no tensor for the network's fc\.bias \(4,\)"),
    "other names, one too many": (
        lambda state: {**renamed(state), "scale": torch.ones(1)}, r"scale \(1,\), has no place in the network",
    ),
    "of one shape, but something else": (lambda state: renamed(dict(sorted(state.items()))), "does not fit"),
    "twice": (
        lambda state: {**behind("student.", state), **behind("teacher.", state)}, r"2 times, behind student\. and teacher\.",
    ),
    "not a number": (lambda state: with_value(state, "bn1.bias", float("nan")), r"its bn1\.bias holds nan at \[1\]"),
    "too large for its type": (lambda state: with_value(state, "bn1.running_var", 1e300), r"its bn1\.running_var holds inf at \[1\]"),
    "whole numbers": (
        lambda state: edited(state, fc__weight=torch.ones(4, 64, dtype=torch.int8)), r"fc\.weight \(4, 64\) int8, does not fit",
    ),
    "complex": (
        lambda state: edited(state, fc__weight=torch.ones(4, 64, dtype=torch.complex64)), r"\(4, 64\) complex64, does not fit",
    ),
    "without values": (lambda state: edited(state, fc__weight=torch.ones(4, 64, device="meta")), "fc.weight has no values"),
    "of one value, spread": (
        lambda state: edited(state, spread=torch.zeros(1).expand(2**20, 2**20)), "spread the most, more than 100 times the file",
    ),
    "sparse, and far larger than its file": (
        lambda state: edited(state, huge=torch.sparse_coo_tensor(size=(2**20, 2**20), check_invariants=True)),
        "huge the most, more than 100 times the file",
    ),
    "no tensors": (lambda state: {"acc": 93.8}, "holds no state dict, neither as it is nor under state_dict"),
    "tensors without names": (lambda state: list(state.values()), "holds no state dict"),
    "tensors under numbers": (lambda state: dict(enumerate(state.values())), "holds no state dict"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(content, sentence, tmp_path):
    model = network(RESNET, depth=20)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(UserError, match=sentence) as caught:
        load_foreign(model, saved(tmp_path, content(model.state_dict())))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_what_else_is_in_the_file_is_noted(tmp_path):
    state = network(TINY).state_dict()
    assert load_foreign(network(TINY), saved(tmp_path, state)) == ()
    more = {f"{name.rpartition('.')[0]}.total_ops": torch.zeros(1) for name in list(state)[:12]}
    (note,) = load_foreign(network(TINY), saved(tmp_path, behind("model.", {**state, **more, "aux.weight": torch.ones(2)})))
    assert re.fullmatch(r"Not in the network and not used: \d+ of the .* \(model\.stem\.0\.total_ops, .* and \d+ more\)\.", note)


class Tied(nn.Module):
    """One tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.other.weight = self.one.weight


def test_of_a_tensor_with_two_names_one_is_enough_and_two_must_agree(tmp_path):
    value = torch.arange(9.0).view(3, 3)
    for names in (["one.weight"], ["other.weight"], ["one.weight", "other.weight"]):
        model = Tied()
        assert load_foreign(model, saved(tmp_path, {name: value for name in names})) == ()
        assert torch.equal(model.one.weight, value) and model.one.weight is model.other.weight
    with pytest.raises(UserError, match=r"one\.weight and other\.weight differ, and are one tensor"):
        load_foreign(Tied(), saved(tmp_path, {"one.weight": value, "other.weight": value + 1}))


def test_a_tensor_may_be_called_as_what_holds_a_state_dict(tmp_path):
    model = nn.Module()
    model.net = nn.Parameter(torch.zeros(3))
    assert load_foreign(model, saved(tmp_path, {"net": torch.ones(3)})) == ()
    assert torch.equal(model.net, torch.ones(3))


def test_a_network_without_tensors_takes_none(tmp_path):
    (note,) = load_foreign(nn.Sequential(nn.ReLU()), saved(tmp_path, {"weight": torch.ones(1)}))
    assert note == "Not in the network and not used: 1 of the checkpoint's tensors (weight)."


def test_a_value_that_is_infinite_in_the_network_itself_may_be(tmp_path):
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))

    load_foreign(Masked(), saved(tmp_path, Masked().state_dict()))


# --- weights that torch computes ------------------------------------------------------------------


def convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(12, 2))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    ("parametrize", "note"),
    [
        (lambda layer: prune.ln_structured(layer, "weight", 0.5, n=1, dim=0), "Multiplied with their masks, .*: 2 of"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 3), "Multiplied with their masks, .*: 2 of"),
        (nn.utils.weight_norm, "Computed from direction and length, .*: 2 of"),
        (lambda layer: nn.utils.weight_norm(layer, dim=None), "Computed from direction and length, .*: 2 of"),
        (lambda layer: nn.utils.weight_norm(layer, dim=1), "Computed from direction and length, .*: 2 of"),
        (nn.utils.parametrizations.weight_norm, "Computed from direction and length, .*: 2 of"),
    ],
    ids=["filters pruned", "weights pruned", "weight norm", "of the whole", "along the input", "weight norm, parametrized"],
)
@pytest.mark.parametrize("prefix", ["", "module.m."])
def test_weights_that_torch_computes_are_computed(parametrize, note, prefix, tmp_path):
    trained, model = convolutions(), convolutions()
    for number in (2, 4):
        parametrize(trained[number])
        for parameter in trained[number].parameters():
            parameter.data.mul_(1.5)  # what is computed is not what it was made from
    images = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = trained(images)
    (found,) = load_foreign(model, saved(tmp_path, behind(prefix, trained.state_dict())))
    assert re.match(note, found)
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize(
    "parametrize", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.orthogonal]
)
def test_weights_that_are_computed_otherwise_are_named(parametrize, tmp_path):
    trained = convolutions()
    parametrize(trained[2])
    with pytest.raises(UserError, match=r"2\..* is what a weight is computed from by a parametrization .*remove_parametrizations"):
        load_foreign(convolutions(), saved(tmp_path, trained.state_dict()))


def test_it_is_the_dense_network_and_is_not_trained(compose, tmp_path):
    """Its key is its content: another path finds it again, other weights do not."""
    config = compose(
        "method=fp", "debug=default", "dataset=digits", "runtime.latency_seconds=0", f"model.checkpoint={tmp_path}/a.pth"
    )
    experiment = replace(build(config), model=ModelSpec("tiny", "tiny.TinyVGG"))
    weights = randomise(TinyVGG(1, 8, 10)).state_dict()
    torch.save(renamed(weights), tmp_path / "a.pth")
    torch.save(renamed(weights), tmp_path / "b.pth")
    torch.save(renamed(randomise(TinyVGG(1, 8, 10), seed=1).state_dict()), tmp_path / "c.pth")
    first = run(experiment, tmp_path / "first", command="test")
    dense = load_file(tmp_path / "first/checkpoints/dense.safetensors")
    assert all(torch.equal(dense[name], t) for name, t in weights.items())
    assert "dense" not in (tmp_path / "first/metrics.csv").read_text()
    assert "finetuned" in {stage.stage for stage in first.stages}
    for name, known in (("b", True), ("c", False)):
        other = replace(experiment, checkpoint=f"{tmp_path}/{name}.pth")
        assert {stage.cached for stage in run(other, tmp_path / name, command="test").stages} == {known}


def test_a_note_about_the_checkpoint_is_in_the_record_and_in_the_table(compose, tmp_path, capsys):
    state = {**TinyVGG(1, 8, 10).state_dict(), "total_ops": torch.zeros(1)}
    config = compose("method=fp", "debug=default", "dataset=digits", "runtime.latency_seconds=0", f"model.checkpoint={saved(tmp_path, state)}")
    experiment = replace(build(config), model=ModelSpec("tiny", "tiny.TinyVGG"))
    for folder in ("first", "from the store"):
        record = run(experiment, tmp_path / folder, command="test")
        assert "Not in the network and not used: 1 of the checkpoint's tensors (total_ops)." in record.notes
        assert "not used: 1 of the checkpoint's tensors (total_ops)." in " ".join(capsys.readouterr().out.split())


def test_a_wrong_network_is_said_before_any_training(compose, tmp_path):
    config = compose("method=sfp", "debug=default", "dataset=digits", f"model.checkpoint={saved(tmp_path, TinyStream(1, 8, 10).state_dict())}")
    with pytest.raises(UserError, match=r"model\.checkpoint=.* tensor 6 of 23, conv1\.weight"):
        run(replace(build(config), model=ModelSpec("tiny", "tiny.TinyVGG")), tmp_path / "run", command="test")
    assert not list((tmp_path / "store").glob("sparse*"))
