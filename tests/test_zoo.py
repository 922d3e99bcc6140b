"""torchvision's classification models take the data set's channels, resolution and classes."""

import pytest
import torch
from torch import nn

from prune_cli.build import build
from prune_cli.checkpoint import load_model, save_model
from prune_cli.errors import UserError
from prune_cli.models import zoo
from prune_cli.models.spec import ModelSpec
from prune_cli.vision import torchvision

TARGET = "prune_cli.models.zoo.classifier"


def spec(architecture: str, **arguments) -> ModelSpec:
    return ModelSpec(architecture, TARGET, {"architecture": architecture, **arguments})


@pytest.fixture
def trained(monkeypatch):
    """Weights of ImageNet's 1000 classes, as a download would bring them; how often is counted."""
    models, downloads = torchvision().models, []

    def state_dict(weights, **_):
        downloads.append(weights)
        torch.manual_seed(1)
        return models.get_model("squeezenet1_1", weights=None).state_dict()

    monkeypatch.setattr(models.SqueezeNet1_1_Weights, "get_state_dict", state_dict)
    return downloads


def test_it_is_chosen_by_name(compose):
    experiment = build(compose("model=torchvision", "model.name=resnet50", "method=fp"))
    assert experiment.name == "fp-resnet50-digits-0.5"
    assert experiment.model == spec("resnet50", weights=None)
    named = build(compose("model=torchvision", "model.name=mine", "model.architecture=resnet50"))
    assert named.model.arguments["architecture"] == "resnet50" and "mine" in named.name


@pytest.mark.parametrize(("architecture", "resolution"), [("resnet18", 8), ("squeezenet1_1", 32), ("googlenet", 32)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_data_set_decides_the_shapes(architecture, resolution, channels):
    model = spec(architecture).build(channels, resolution, classes=7).train()
    logits = model(torch.randn(2, channels, resolution, resolution))
    assert isinstance(logits, torch.Tensor) and logits.shape == (2, 7)  # GoogLeNet: no further outputs
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_trained_weights_arrive_but_for_another_number_of_classes(trained):
    colour, grey, whole = (
        spec("squeezenet1_1", weights="DEFAULT").build(c, 32, k).state_dict() for c, k in ((3, 10), (1, 10), (3, 1000))
    )
    torch.manual_seed(1)
    expected = torchvision().models.get_model("squeezenet1_1", weights=None).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(whole[name], tensor)
        if name.startswith("classifier"):
            assert len(colour[name]) == 10
        else:
            assert torch.equal(colour[name], tensor)
            summed = name == "features.0.weight"
            assert torch.equal(grey[name], tensor.sum(1, keepdim=True) if summed else tensor)


def test_a_saved_network_downloads_nothing(trained, tmp_path):
    chosen = spec("squeezenet1_1", weights="DEFAULT")
    model = chosen.build(3, 32, 10).eval()
    save_model(tmp_path / "model", model, chosen, classes=10)
    downloads = len(trained)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_model(tmp_path / "model")(x), model(x))
    assert downloads and len(trained) == downloads


@pytest.mark.parametrize(("architecture", "smallest"), [("alexnet", 63), ("squeezenet1_1", 17), ("inception_v3", 75)])
def test_images_too_small_are_refused_with_the_size_that_is_needed(architecture, smallest):
    with pytest.raises(UserError, match=rf"needs images of at least {smallest}x{smallest} pixels, .* have 8x8"):
        spec(architecture).build(1, 8, 10)
    zoo._check_resolution(zoo._made(architecture, 10), architecture, smallest)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.name=resnet5"], r"model\.architecture=resnet5: did you mean resnet50"),
        (["model.depth=50"], r"model\.depth"),
    ],
)
def test_a_wrong_name_is_a_sentence(compose, overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        build(compose("model=torchvision", *overrides))


def test_unknown_weights_and_a_download_that_fails(monkeypatch):
    with pytest.raises(UserError, match=r"model\.weights=BEST: resnet18 has no such weights.*IMAGENET1K_V1"):
        spec("resnet18", weights="BEST").build(3, 32, 10)

    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision().models.ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(UserError, match="the download failed"):
        spec("resnet18", weights="DEFAULT").build(3, 32, 10)


def test_a_model_of_one_size_only_says_which():
    with pytest.raises(UserError, match="cannot read images of 32x32 pixels .*Expected 224"):
        spec("vit_b_16").build(3, 32, 10)


def test_channels_that_no_trained_layer_has():
    first = spec("resnet18").build(5, 32, 10).conv1
    assert isinstance(first, nn.Conv2d) and first.weight.shape == (64, 5, 7, 7)
