"""A network is one file: it comes back in a fresh process, bit for bit, or with a sentence."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from toys import network, random_masks

import prune_cli
from prune_cli import surgery
from prune_cli.checkpoint import load_model, save_model
from prune_cli.errors import UserError
from prune_cli.layers.stripe import StripeConv2d
from prune_cli.models.spec import ModelSpec

RESNET, LENET = "prune_cli.models.resnet.CifarResNet", "prune_cli.models.lenet.LeNet5"
NETWORKS = {
    "ResNet A": (RESNET, {"depth": 20, "shortcut": "A"}, 3, 9),
    "LeNet-5": (LENET, {}, 1, 16),
    "a user's own": ("toys.Kernels", {}, 3, 8),
    "depthwise": ("toys.Grouped", {"groups": 6}, 3, 8),
    "concat": ("toys.Concat", {}, 3, 8),
    "pointwise": ("toys.Pointwise", {}, 3, 8),
    "on maps": ("toys.OnMaps", {}, 3, 8),
}
FORMS = ["dense", "filter", "folded", "stripe", "group", "weight"]


def form_of(model: nn.Module, form: str) -> nn.Module:
    if form == "dense":
        return model
    masks = random_masks(model, "filter" if form == "folded" else form, kept=0.4)
    for name, keep in masks.keep.items():
        if "expand" in name or "stem" in name:
            keep[0] = False
    return surgery.cut(model, masks, "fold" if form == "folded" else "drop").model.eval()


def saved(path: Path, case: str, form: str) -> nn.Module:
    target, arguments, channels, resolution = NETWORKS[case]
    model = form_of(network(target, channels, resolution, classes=4, **arguments), form)
    save_model(path, model, ModelSpec(case, target, arguments), classes=4)
    return model


READER = """
import sys, pickle, torch
def refuse(*_, **__): raise AssertionError("unpickled")
pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse
from safetensors.torch import load_file, save_file
from prune_cli.checkpoint import load_model
outputs = {}
for name, x in load_file("inputs").items():
    model = load_model(f"{name}.safetensors")
    assert not any(module.training for module in model.modules())
    with torch.inference_mode():
        outputs[name] = model(x).clone()
save_file(outputs, "outputs")
"""


def test_a_fresh_process_computes_the_same(tmp_path):
    """Elsewhere, without the folder that the files were written to: same outputs, bit for bit."""
    written, moved = tmp_path / "run", tmp_path / "elsewhere"
    written.mkdir()
    inputs, expected = {}, {}
    for number, (case, form) in enumerate((case, form) for case in NETWORKS for form in FORMS):
        model = saved(written / f"{number}.safetensors", case, form)
        inputs[str(number)] = torch.randn(2, *model.input_shape)
        with torch.inference_mode():
            expected[str(number)] = model(inputs[str(number)])
    save_file(inputs, written / "inputs")
    written.rename(moved)
    roots = [Path(prune_cli.__file__).parents[1], Path(__file__).parent]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", READER]
    done = subprocess.run(command, cwd=moved, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(moved / "outputs")
    assert len(found) == len(NETWORKS) * len(FORMS)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("case", NETWORKS)
@pytest.mark.parametrize("form", FORMS)
def test_everything_comes_back(case, form, tmp_path):
    model = saved(tmp_path / "model.safetensors", case, form)
    loaded = load_model(tmp_path / "model.safetensors")
    assert repr(loaded) == repr(model)
    assert loaded.input_shape == model.input_shape
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor)
        assert state[name].dtype == tensor.dtype
    assert {n for n, _ in loaded.named_parameters()} == {n for n, _ in model.named_parameters()}
    if form == "stripe":
        assert any(isinstance(module, StripeConv2d) for module in loaded.modules())


def test_a_loaded_network_can_be_saved_trained_and_cut_again(tmp_path):
    saved(tmp_path / "first", "ResNet A", "filter")
    loaded = load_model(tmp_path / "first")
    target, arguments, *_ = NETWORKS["ResNet A"]
    save_model(tmp_path / "second", loaded, ModelSpec("ResNet A", target, arguments), classes=4)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    loaded.train()(torch.randn(3, 3, 9, 9)).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    loaded.eval().zero_grad()
    masks = random_masks(loaded, "stripe", kept=0.5)
    surgery.verify(surgery.mask(loaded, masks), surgery.cut(loaded, masks))


@pytest.mark.parametrize(("case", "layers"), [("ResNet A", ()), ("on maps", ("narrow",))])
def test_scattered_channels_come_back(case, layers, tmp_path):
    """Also where a network was cut twice."""
    target, arguments, *shape = NETWORKS[case]
    model = network(target, *shape, classes=4, **arguments)
    for seed in (0, 1):
        masks = random_masks(model, "filter", kept=0.6, seed=seed, only=layers)
        model = surgery.cut(model, masks).model.eval()
        save_model(tmp_path / "model", model, ModelSpec(case, target, arguments), classes=4)
        loaded = load_model(tmp_path / "model")
        assert repr(loaded) == repr(model)
        assert "ScatterChannels" in repr(loaded)
        x = torch.randn(2, 3, shape[1], shape[1])
        assert torch.equal(loaded(x), model(x))
        layers = tuple(f"{name}.layer" for name in layers)


def test_a_file_of_before_channels_were_scattered(tmp_path):
    model = saved(tmp_path / "old", "ResNet A", "dense")
    edited(tmp_path / "old", header=lambda h: h.pop("scatters"))
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(load_model(tmp_path / "old")(x), model(x))


def test_channels_last_weights(tmp_path):
    """The trainer leaves them so, and safetensors refuses them."""
    model = network(RESNET, depth=20).to(memory_format=torch.channels_last)
    save_model(tmp_path / "model", model, ModelSpec("resnet20", RESNET, {"depth": 20}), classes=4)
    state = load_model(tmp_path / "model").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_saving_leaves_the_network_as_it_was(tmp_path):
    model = network(LENET, channels=1, resolution=16).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(tmp_path / "model", model, ModelSpec("lenet5", LENET), classes=4)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300
    return message


def test_a_missing_file(tmp_path):
    assert "no such file" in refusal(tmp_path / "model.safetensors")
    assert "no such file" in refusal(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 100, -1, -5000])
def test_a_truncated_file(size, tmp_path):
    path = tmp_path / "model.safetensors"
    saved(path, "ResNet A", "stripe")
    path.write_bytes(path.read_bytes()[:size])
    assert "damaged" in refusal(path)


def test_a_foreign_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("no tensors here, but enough text to be taken for a header")
    assert "damaged" in refusal(path)
    torch.save({"weight": torch.zeros(3)}, path)
    assert "damaged" in refusal(path)
    save_file({"weight": torch.zeros(3)}, path)
    assert "not written by prune-cli" in refusal(path)
    for header in ("[1]", "{}", "null", json.dumps({"format": "prune-cli/0"})):
        save_file({"weight": torch.zeros(3)}, path, metadata={"prune_cli": header})
        assert "not written by prune-cli" in refusal(path)
    save_file({"weight": torch.zeros(3)}, path, metadata={"prune_cli": "not json"})
    assert "damaged" in refusal(path)


def edited(path: Path, header=lambda h: None, tensors=lambda t: None) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        values = json.loads(file.metadata()["prune_cli"])
    content = load_file(path)
    header(values)
    tensors(content)
    save_file(content, path, metadata={"prune_cli": json.dumps(values)})


@pytest.mark.parametrize(
    ("header", "tensors"),
    [
        (lambda h: h.pop("widths"), lambda t: None),
        (lambda h: h["model"].update(surprise=1), lambda t: None),
        (lambda h: h["model"]["arguments"].update(depth=56), lambda t: None),
        (lambda h: h["scatters"].update(nowhere=3), lambda t: None),
        (lambda h: h["widths"].update(nowhere={"in_channels": 3}), lambda t: None),
        (lambda h: None, lambda t: t.pop("fc.weight")),
        (lambda h: None, lambda t: t.update(surprise=torch.zeros(1))),
        (lambda h: None, lambda t: t.pop("layer1.0.conv1.pattern")),
    ],
)
def test_a_file_that_makes_no_network(header, tensors, tmp_path):
    path = tmp_path / "model.safetensors"
    saved(path, "ResNet A", "stripe")
    edited(path, header, tensors)
    assert "do not make a network" in refusal(path)


def test_a_network_class_that_is_gone(tmp_path):
    path = tmp_path / "model.safetensors"
    saved(path, "a user's own", "dense")
    edited(path, header=lambda h: h["model"].update(target="toys.Missing"))
    with pytest.raises(UserError, match="toys.Missing"):
        load_model(path)


def test_the_file_is_plain_data(tmp_path):
    """A header of JSON and tensors: nothing in it that unpickling could run."""
    path = tmp_path / "model.safetensors"
    saved(path, "ResNet A", "stripe")
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert json.loads(header["__metadata__"]["prune_cli"])["model"]["target"] == RESNET
    shutil.copy(path, tmp_path / "copy.safetensors")
    load_model(tmp_path / "copy.safetensors")


def test_a_module_that_wants_its_version_is_loaded(tmp_path):
    """torchvision's MNASNet refuses tensors that do not say which version of it they come from."""
    spec = ModelSpec("mnasnet0_5", "prune_cli.models.zoo.classifier", {"architecture": "mnasnet0_5"})
    model = spec.build(3, 32, 4).eval()
    save_model(tmp_path / "model.safetensors", model, spec, 4)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "model.safetensors")(x), model(x))
