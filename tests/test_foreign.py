"""Weights that another program saved become the dense network, or are refused with a sentence."""

import argparse
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TinyStream, TinyVGG, randomise
from toys import network

from prune_cli.build import build
from prune_cli.errors import UserError
from prune_cli.foreign import fill, read_weights
from prune_cli.models.spec import ModelSpec
from prune_cli.pipeline import run

RESNET = "prune_cli.models.resnet.CifarResNet"


def load_foreign(model, path: str) -> None:
    fill(model, read_weights(path), path)


def renamed(state: dict) -> dict:
    """As a network with the same layers under other names has it."""
    layers = {name: number for number, name in enumerate(dict.fromkeys(key.rpartition(".")[0] for key in state))}
    return OrderedDict((f"L{layers[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}", t) for key, t in state.items())


def without_counters(state: dict) -> dict:
    return {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}


FORMS = {
    "plain": lambda state: state,
    "under state_dict, from several GPUs": lambda state: {
        "epoch": 3, "acc": 93.8, "state_dict": OrderedDict((f"module.{k}", v) for k, v in state.items()),
    },
    "under net": lambda state: {"net": state, "optimizer": {"state": {0: torch.zeros(3)}}},
    "two levels down": lambda state: {"model": {"state_dict": state}},
    "other names": renamed,
    "other names, from before batches were counted": lambda state: {"model": renamed(without_counters(state))},
    "half precision, in another order": lambda state: {k: state[k].half() for k in sorted(state)},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".pth.tar", ".t7", ".safetensors"])
def test_the_weights_arrive(form, suffix, tmp_path):
    trained, model = network(RESNET, depth=20), randomise(network(RESNET, depth=20), seed=7)
    path, content = str(tmp_path / f"checkpoint{suffix}"), FORMS[form](trained.state_dict())
    if suffix == ".safetensors":
        content = next((v for k, v in content.items() if k in ("state_dict", "net", "model")), content)
        content = content.get("state_dict", content)  # such a file holds tensors only
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


def saved(tmp_path, content) -> str:
    torch.save(content, tmp_path / "checkpoint.pth")
    return str(tmp_path / "checkpoint.pth")


def edited(state: dict, **changes: torch.Tensor | None) -> dict:
    state = {**state, **{name.replace("__", "."): t for name, t in changes.items()}}
    return {name: t for name, t in state.items() if t is not None}


REFUSED = {
    "another width": (
        lambda state: edited(state, layer2__0__conv1__weight=torch.zeros(48, 16, 3, 3)),
        r"layer2\.0\.conv1\.weight \(48, 16, 3, 3\), does not fit the network's layer2\.0\.conv1\.weight \(32, 16, 3, 3\)",
    ),
    "another depth": (
        lambda _: network(RESNET, depth=32).state_dict(), r"layer1\.3\.conv1\.weight .* fit the network's layer2\.0\.conv1",
    ),
    "one too few": (lambda state: edited(state, fc__bias=None), r"none, does not fit the network's fc\.bias \(4,\)"),
    "one too many": (lambda state: edited(state, scale=torch.ones(1)), r"scale \(1,\), does not fit the network's none"),
    "of one shape, but something else": (
        lambda state: OrderedDict((f"x.{name}", t) for name, t in sorted(state.items())), "does not fit",
    ),
    "no tensors": (lambda state: {"acc": 93.8}, "holds no state dict, neither as it is nor under state_dict"),
    "an object": (
        lambda state: {"args": argparse.Namespace(lr=0.1), "state_dict": state},
        "holds a argparse.Namespace, and only tensors are loaded",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(content, sentence, tmp_path):
    model = network(RESNET, depth=20)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(UserError, match=sentence) as caught:
        load_foreign(model, saved(tmp_path, content(model.state_dict())))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_damaged_or_absent(suffix, tmp_path):
    path = tmp_path / f"checkpoint{suffix}"
    with pytest.raises(UserError, match="there is no such file"):
        load_foreign(network("tiny.TinyVGG"), str(path))
    for content in (b"", b"neither of the two", b"\x80\x02}q\x00."):
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged or holds no tensors|holds no state dict"):
            load_foreign(network("tiny.TinyVGG"), str(path))


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


def test_a_wrong_network_is_said_before_any_training(compose, tmp_path):
    config = compose("method=sfp", "debug=default", "dataset=digits", f"model.checkpoint={saved(tmp_path, TinyStream(1, 8, 10).state_dict())}")
    with pytest.raises(UserError, match=r"model\.checkpoint=.* tensor 6 of 23, conv1\.weight"):
        run(replace(build(config), model=ModelSpec("tiny", "tiny.TinyVGG")), tmp_path / "run", command="test")
    assert not list((tmp_path / "store").glob("sparse*"))
