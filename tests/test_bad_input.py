"""What cannot be done with a network, or on a machine, is one sentence and exit code 2, before anything is trained."""

import pytest
import torch
from torch import Tensor, nn

QUICK = ("debug=default", "dataset=digits", "runtime.latency_seconds=0", "runtime.threads=1", "recipe.precision=float32")


class Pointwise(nn.Sequential):
    """No convolution larger than 1x1."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__(nn.Conv2d(channels, 8, 1), nn.ReLU(), nn.Conv2d(8, classes, 1), nn.AvgPool2d(resolution), nn.Flatten())


class TwoNorms(nn.Sequential):
    """Two batch norms between the layers, so that no filter is a multiple of another behind them."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        conv, norms = nn.Conv2d(channels, 8, 3), (nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
        super().__init__(conv, *norms, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


class OneLayer(nn.Module):
    """Nothing but the layer that writes the output."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels * resolution**2, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRUNE_STORE", str(tmp_path / "store"))
    return tmp_path


def custom(model: str) -> tuple[str, ...]:
    return "model=custom", f"model.target={model}"


REFUSED = [
    (("method=slimming", "model=lenet5"), "batch norm"),
    (("method=slim_magnitude", "model=lenet_300_100"), "batch norm"),
    (("method=stripe", *custom("test_bad_input.Pointwise")), "1x1"),
    (("method=stripe", "model=lenet_300_100"), "fully connected"),
    (("method=sfp", "model=lenet_300_100"), "nothing that it could prune; fc1 and 1 more: fully connected"),
    (("method=sfp", "method.ratio=0.3", "ratio=0.5", *custom("tiny.TinyVGG")), "method.ratio=0.3: is the run's ratio, 0.5"),
    (("method=neuron_merging", *custom("test_bad_input.TwoNorms")), "nothing to merge into"),
    (("method=fp", *custom("test_bad_input.OneLayer")), "nothing"),
    (("method=weight", "target=macs", *custom("tiny.TinyVGG")), "target=macs: single weights at zero"),
    (("method=fp", "target=macs", "ratio=0.995", *custom("tiny.TinyVGG")), "target=macs ratio=0.995: at most 9"),
    (("method=fpgm", "target=params", "ratio=0.999", *custom("tiny.TinyVGG")), "target=params ratio=0.999: at most 9"),
    (("method=stripe", "target=macs", "method.select=threshold", *custom("tiny.TinyVGG")), "does not depend on ratio"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_it_is_refused_before_any_training(arguments, sentence, command, here):
    code, _, err = command(*arguments, *QUICK)
    assert code == 2
    assert err.startswith("prune-cli: ") and err.count("\n") == 1
    assert sentence in err
    assert not [path for path in (here / "store").rglob("*") if path.name in ("model.safetensors", "manifest.json")]


@pytest.mark.parametrize("method", ["fp", "stripe", "group", "slimming", "neuron_merging"])
def test_a_ratio_that_would_empty_a_layer_meets_the_floor_and_says_so(method, command):
    code, shown, _ = command(f"method={method}", "ratio=0.999", *custom("tiny.TinyVGG"), *QUICK)
    out = " ".join(shown.split())
    assert code == 0
    assert "The selection would have emptied features." in out
    assert "is kept there" in out


def test_a_device_that_is_not_there_is_refused_before_anything_else(command, here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = command("runtime.device=cuda")
    assert code == 2 and "runtime.device=cuda: torch finds no CUDA device here" in err and err.count("\n") == 1
    assert not any((here / "store").iterdir())
