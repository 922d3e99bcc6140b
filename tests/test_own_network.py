"""What cannot be trained, measured or pruned of a user's network is a sentence before anything is trained."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune_cli.errors import UserError
from prune_cli.models.own_network import check
from prune_cli.models.spec import ModelSpec


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def scores(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))

    forward = scores


class DropsForEver(_Net):
    def forward(self, x):
        return self.fc(F.dropout(self.conv(x), 0.5).mean((2, 3)))


class TwoInTraining(_Net):
    def forward(self, x):
        return (self.scores(x), x) if self.training else self.scores(x)


class OverwritesWhatBackwardNeeds(_Net):
    def forward(self, x):
        x = torch.relu(self.conv(x))
        return self.fc(x.mul_(x.sigmoid()).mean((2, 3)))


class Locked(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class OldWeightNorm(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.spectral_norm(self.conv)


class Strict(_Net):
    def forward(self, x):
        if x.shape[-1] != 16:
            raise RuntimeError("made for 16 pixels")
        return self.scores(x)


class Nothing(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :5]


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (DropsForEver, r"gives other answers to the same images each time, also in evaluation mode \(dropout without"),
        (TwoInTraining, r"in training mode: makes tuple of two images, must be \(2, 5\)"),
        (OverwritesWhatBackwardNeeds, r"cannot be trained \(one of the variables needed for gradient"),
        (Locked, r"cannot be copied \(cannot pickle '_thread.lock' object\)"),
        (OldWeightNorm, r"cannot be copied \(.*\); where that is weight_norm or spectral_norm of torch.nn.utils"),
        (Strict, r'\(test_own_network.py, line \d+, raise RuntimeError\("made for 16 pixels"\): made for 16 pixels\)'),
        (Nothing, "has no parameters, there is nothing to train"),
        (list, "makes a list, must make a torch.nn.Module"),
    ],
)
def test_it_is_refused_with_the_reason(network, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        check(network(), "model.target=my_net.MyNet", 3, 8, 5)
    assert str(caught.value).startswith("model.target=my_net.MyNet: ") and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_a_network_is_left_as_it_was_and_so_is_chance():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    check(model, "model", 3, 8, 5)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and model.training and all(p.grad is None for p in model.parameters())


def test_a_constructor_that_fails_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "broken_net.py").write_text("def broken(classes):\n    return [1, 2][classes]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"cannot be built \(broken_net.py, line 2, return \[1, 2\]\[classes\]: list index"):
        ModelSpec("broken", "broken_net.broken").build(3, 8, 5)
